"""tools/evaluate.py gives the numbers of the run's own evaluation for each format of its last weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.helpers.finished_runs import QUICKSTART_STEPS, Run
from tests.helpers.jobs import SMALL, read_json, run_job_successfully

NUMBERS = ("accuracy", "greedy_accuracy", "reward_mean", "length_mean", "num_prompts", "pass_at_k", "majority_at_k")
PLAIN = ("--reward", "exact", "--max-tokens", "8", "data.template=plain", "data.max_prompt_tokens=16")


def run_evaluation(checkpoint: Path, *arguments: str, folder: Path = REPOSITORY) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), str(checkpoint), *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1])), done.stderr


@pytest.mark.long  # test_first_own_run.py compares the numbers of a smaller run
def test_a_run_folder_gives_the_numbers_of_the_runs_last_evaluation(quickstart: Run) -> None:
    found, errors = run_evaluation(quickstart.folder)
    expected = read_json(quickstart.folder / "summary.json")["eval_after"]
    assert {name: found[name] for name in NUMBERS} == {name: expected[name] for name in NUMBERS}
    assert found["checkpoint"].endswith(f"checkpoints/step_{QUICKSTART_STEPS:06d}")
    assert "not the same evaluation" not in errors


@pytest.mark.long  # test_first_own_run.py has one replica
def test_a_run_with_replicas_and_a_seed_gives_its_own_numbers_from_any_folder(tmp_path: Path) -> None:
    """The seeds of the samples depend on the run's seed and on the number of its engine replicas."""
    evaluation = (
        "data.eval=arithmetic:heldout",
        "evaluation.k=3",
        "evaluation.temperature=0.9",
        "evaluation.max_prompts=24",
    )
    layout = ("run.world_size=2", "run.seed=7", "train.steps=1", "train.minibatches_per_epoch=1")
    (tmp_path / "own_code.py").write_text(
        "def digits(prompt, completion, reference):\n    return sum(c.isdigit() for c in completion) / 8\n"
    )
    arguments = (*SMALL, *evaluation, *layout, f"reward.terms=[{{name: {tmp_path}/own_code.py:digits}}]")
    run_job_successfully(*arguments, f"run.dir={tmp_path / 'run'}", output=tmp_path / "output")
    expected = read_json(tmp_path / "run" / "summary.json")["eval_after"]
    found, errors = run_evaluation(tmp_path / "run", folder=tmp_path)
    assert {name: found[name] for name in NUMBERS} == {name: expected[name] for name in NUMBERS}
    assert "not the same evaluation" not in errors
    other, errors = run_evaluation(tmp_path / "run", "--seed", "8", "run.world_size=1", folder=tmp_path)
    assert other["reward_mean"] != expected["reward_mean"]
    assert "run.seed=8 (run: 7), run.world_size=1 (run: 2)" in errors


@pytest.mark.long
def test_the_exported_weights_give_the_same_numbers_and_replicas_share_the_prompts(quickstart: Run) -> None:
    expected = read_json(quickstart.folder / "summary.json")["eval_after"]
    arguments = ("--data", "arithmetic:heldout", *PLAIN, "precision.dtype=fp32")
    exported, _ = run_evaluation(quickstart.folder / "hf", *arguments)
    assert {name: exported[name] for name in NUMBERS} == {name: expected[name] for name in NUMBERS}
    checkpoint = quickstart.folder / "checkpoints" / f"step_{QUICKSTART_STEPS:06d}"
    four, _ = run_evaluation(checkpoint, *arguments, "run.world_size=4", "engine.tp=2", "--k", "1", "2")
    assert four["num_prompts"] == 300
    assert four["greedy_accuracy"] == pytest.approx(expected["greedy_accuracy"], abs=0.01)
    assert set(four["pass_at_k"]) == {"1", "2"}
