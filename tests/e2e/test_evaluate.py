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
from tests.helpers.jobs import read_json

NUMBERS = ("accuracy", "greedy_accuracy", "reward_mean", "length_mean", "num_prompts", "pass_at_k", "majority_at_k")
PLAIN = ("--reward", "exact", "--max-tokens", "8", "data.template=plain", "data.max_prompt_tokens=16")


def run_evaluation(checkpoint: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), str(checkpoint), *arguments, "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_run_folder_gives_the_numbers_of_the_runs_last_evaluation(quickstart: Run) -> None:
    found = run_evaluation(quickstart.folder, "--data", "arithmetic:heldout")
    expected = read_json(quickstart.folder / "summary.json")["eval_after"]
    assert {name: found[name] for name in NUMBERS} == {name: expected[name] for name in NUMBERS}
    assert found["checkpoint"].endswith(f"checkpoints/step_{QUICKSTART_STEPS:06d}")


@pytest.mark.long
def test_the_exported_weights_give_the_same_numbers_and_replicas_share_the_prompts(quickstart: Run) -> None:
    expected = read_json(quickstart.folder / "summary.json")["eval_after"]
    arguments = ("--data", "arithmetic:heldout", *PLAIN, "precision.dtype=fp32")
    exported = run_evaluation(quickstart.folder / "hf", *arguments)
    assert {name: exported[name] for name in NUMBERS} == {name: expected[name] for name in NUMBERS}
    checkpoint = quickstart.folder / "checkpoints" / f"step_{QUICKSTART_STEPS:06d}"
    four = run_evaluation(checkpoint, *arguments, "--k", "1", "2", "run.world_size=4", "engine.tp=2")
    assert four["num_prompts"] == 300
    assert four["greedy_accuracy"] == pytest.approx(expected["greedy_accuracy"], abs=0.01)
    assert set(four["pass_at_k"]) == {"1", "2"}
