"""Commands of the guides, run in the order of the text in a copy of the checkout. Every guide has a test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.guides import command_pages, python_blocks, shell_blocks
from tests.helpers.jobs import REPOSITORY, clean_environment, read_json
from tests.helpers.stub_checkout import python_environment
from tests.helpers.tiny_models import make_family_model

# The test file that runs the commands of each guide.
TESTS = {
    "algorithms.md": "tests/e2e/test_readme_commands.py",
    "asynchrony.md": "tests/unit/docs/test_asynchrony_guide.py",
    "checkpoints.md": "tests/e2e/test_guides.py",
    "convert.md": "tests/e2e/test_readme_commands.py",
    "data.md": "tests/e2e/test_readme_commands.py",
    "environments.md": "tests/e2e/test_readme_commands.py",
    "faults.md": "tests/unit/docs/test_faults_guide.py",
    "first-own-run.md": "tests/e2e/test_first_own_run.py",
    "first-run.md": "tests/e2e/test_guides.py",
    "fp8.md": "tests/unit/docs/test_fp8_guide.py",
    "gpu-check.md": "tests/unit/tools/test_gpu_rehearsal.py",
    "layouts.md": "tests/unit/docs/test_layouts_guide.py",
    "rewards.md": "tests/e2e/test_readme_commands.py",
    "servers.md": "tests/e2e/test_server.py",
    "sft.md": "tests/e2e/test_guides.py",
    "slurm.md": "tests/e2e/test_slurm.py",
    "troubleshooting.md": "tests/unit/docs/test_troubleshooting.py",
    "watching.md": "tests/unit/docs/test_watching_guide.py",
}


def test_every_guide_with_commands_has_a_test_that_runs_them() -> None:
    assert {path.name for path in command_pages()} <= set(TESTS)
    for guide, test in TESTS.items():
        assert guide in (REPOSITORY / test).read_text() or "docs" in (REPOSITORY / test).read_text(), guide


def copy_of_the_checkout(folder: Path) -> Path:
    """Copy the files of the repository, tracked and not ignored, to `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def run_blocks(guide: str, checkout: Path, limit_seconds: float) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**clean_environment(), **python_environment(), "PATH": path, "PYTHONPATH": str(checkout)}
    for block in shell_blocks(guide):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=checkout,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_commands_of_the_first_guide_give_the_described_results(tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    run_blocks("first-run.md", checkout, limit_seconds=1200)
    summary = read_json(checkout / "runs" / "quickstart" / "summary.json")
    assert (summary["status"], summary["steps"]) == ("done", 54)
    assert summary["eval_after"]["accuracy"] > 0.85
    assert read_json(checkout / "runs" / "two-ranks" / "summary.json")["layout"]["tp"] == 2


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_commands_of_the_checkpoint_guide_continue_and_convert_a_run(tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    run_blocks("checkpoints.md", checkout, limit_seconds=600)
    assert read_json(checkout / "runs" / "demo" / "summary.json")["steps"] == 6


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_commands_of_the_guide_to_fine_tuning_train_the_model_with_which_rl_starts(tmp_path: Path) -> None:
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    run_blocks("sft.md", checkout, limit_seconds=600)
    tuned = read_json(checkout / "runs" / "sft-tiny" / "summary.json")
    assert tuned["status"] == "done"
    assert tuned["eval_before"]["accuracy"] < 0.01
    assert tuned["eval_after"]["accuracy"] > 0.03  # three epochs: 0.08 when it was written
    begun = read_json(checkout / "runs" / "after-sft" / "summary.json")
    assert begun["eval_before"]["accuracy"] == tuned["eval_after"]["accuracy"], "the same weights, seed and engine"


def test_the_guide_to_a_new_family_gives_a_family_whose_logits_equal_transformers(tmp_path: Path) -> None:
    """Run the first command of docs/guides/family.md in a copy of the package with the two additions of the guide."""
    package = tmp_path / "grpo_mega"
    shutil.copytree(REPOSITORY / "grpo_mega", package, ignore=shutil.ignore_patterns("__pycache__"))
    added = python_blocks("guides/family.md")
    readers = package / "models" / "config_readers.py"
    before, found, after = readers.read_text(encoding="utf-8").partition("READERS = {\n")
    assert found
    readers.write_text(f"{before}{added['reader']}\n\n{found}{added['entry']}{after}", encoding="utf-8")
    sizes = {"vocab_size": 21, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    folder = make_family_model(tmp_path / "HF_DIR", mistral | sizes | heads)
    (line,) = [
        line for line in shell_blocks("guides/family.md")[0].splitlines() if "logits" in line and "layout" not in line
    ]
    call = "import sys; from grpo_mega.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", call, *line.replace("HF_DIR", str(folder)).split()[1:], "--json"],
        cwd=tmp_path,
        env={**clean_environment(), "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["family"] == "mistral"
