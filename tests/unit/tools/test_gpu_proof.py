"""tools/gpu_proof.py without a GPU: it refuses, and prints and writes no number; one part never voids another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.config.model_sections import ArchitectureConfig
from grpo_mega.engines.engine_rules import check_engine_fp8
from grpo_mega.models.tiny_recipe import recipe_spec
from tests.helpers.jobs import REPOSITORY
from tools import gpu_proof
from tools.proof import subject

WITHOUT_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="this machine has GPUs")


@WITHOUT_GPU
def test_without_a_gpu_nothing_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_proof.main(["--out", str(tmp_path / "out"), "--json"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "error: tools/gpu_proof.py measures on a GPU, and this machine has none; run it where one is"
    ]
    assert not (tmp_path / "out").exists()


@WITHOUT_GPU
@pytest.mark.parametrize("part", gpu_proof.PARTS)
def test_a_part_by_itself_refuses_too(part: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-m", gpu_proof.PROGRAM, part, "small", "h100-80g", str(answer)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "no CUDA device: the GPU proof measures on a GPU only\n")
    assert not answer.exists()


@WITHOUT_GPU
@pytest.mark.parametrize("measure", [subject.conditions, lambda: subject.seconds_of(lambda: None)])
def test_no_helper_measures_a_cpu(measure: object) -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        measure()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--parts", "bf16,fp16"],
            "--parts=bf16,fp16: fp16 is no part; use bf16, fp8, engine, engine_fp8, engine_sglang",
        ),
        (["--parts", ""], "--parts=: nothing is no part"),
        (["--gpu", "h101"], "--gpu=h101: not known; use one of a100-80g"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_proof.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_part_that_fails_says_why_in_its_file_and_leaves_the_others_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for the parts; a file of an earlier run does not stand for this one's."""
    (tmp_path / "stands_in.py").write_text(
        "import json, sys\n"
        "part, size, gpu, answer = sys.argv[1:]\n"
        "if part == 'fp8':\n"
        "    sys.exit('ImportError: no transformer_engine')\n"
        "open(answer, 'w').write(json.dumps({'part': part, 'status': 'measured', 'numbers': {}}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_proof, "num_visible_gpus", lambda env: 1)
    monkeypatch.setattr(gpu_proof, "PROGRAM", "stands_in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu_fp8.json").write_text('{"status": "measured"}')
    assert gpu_proof.main(["--out", str(out), "--json"]) == 1
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {part: result["status"] for part, result in results.items()} == {
        "bf16": "measured",
        "fp8": "failed",
        "engine": "measured",
        "engine_fp8": "measured",
    }
    assert "no transformer_engine" in json.loads((out / "gpu_fp8.json").read_text())["why"]


def test_the_batch_of_the_proof_is_full_and_valid(tmp_path: Path) -> None:
    """What needs no GPU of the subject: its config loads, and its rows are as long as they may be."""
    (tmp_path / "model").mkdir()
    config = subject.config_of(tmp_path / "model", "precision.fp8.recipe=mxfp8")
    batch, objective = subject.batch_of(subject.random_groups(vocab_size=100), config)
    assert not objective.algorithm.needs_reference
    tokens = [len(microbatch.token_ids) for microbatch in batch.microbatches]
    assert sum(tokens) == subject.NUM_PROMPTS * subject.GROUP_SIZE * (subject.PROMPT_TOKENS + subject.COMPLETION_TOKENS)
    assert set(tokens) == {config.train.max_tokens_per_microbatch}
    assert all(count % 32 == 0 for count in tokens)


@pytest.mark.parametrize("size", subject.SHAPES)
def test_models_of_the_proof_can_be_held_in_fp8(size: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = subject.config_of(tmp_path / "model", "engine.fp8=scales_fp32")
    shape = {
        name: value for name, value in vars(subject.SHAPES[size]).items() if name in ArchitectureConfig.model_fields
    }
    check_engine_fp8(recipe_spec(ArchitectureConfig(**shape)), config, "the model")
