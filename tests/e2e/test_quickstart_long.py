"""The whole quickstart: accuracy for several seeds, and no gain with shuffled rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.load import load_config
from tests.helpers.engine_contract import sglang_here
from tests.helpers.jobs import QUICKSTART, REPOSITORY, read_json, read_lines, run_job_successfully

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("kind", "seed"), [("vllm", 0), ("vllm", 1), ("vllm", 2), pytest.param("sglang", 0, marks=sglang_here)]
)
def test_held_out_accuracy_ends_at_0_90_and_0_30_above_the_base(tmp_path: Path, kind: str, seed: int) -> None:
    arguments = (QUICKSTART, f"engine.kind={kind}", f"run.seed={seed}", f"run.dir={tmp_path / 'run'}")
    run_job_successfully(*arguments, output=tmp_path / "log", timeout_seconds=580)
    summary = read_json(tmp_path / "run" / "summary.json")
    before, after = summary["eval_before"], summary["eval_after"]
    assert before["num_prompts"] == after["num_prompts"] == 300
    assert 0.20 <= before["accuracy"] <= 0.60
    assert after["accuracy"] >= 0.90
    assert after["accuracy"] >= before["accuracy"] + 0.30
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(line["train/mismatch_max"] for line in lines) <= 1e-4
    assert max(line["train/clip_fraction"] for line in lines) > 0


def test_shuffled_rewards_give_no_gain(tmp_path: Path) -> None:
    """Permute the rewards of each step over its rollouts."""
    arguments = (QUICKSTART, "reward.shuffle=true", f"run.dir={tmp_path / 'run'}")
    run_job_successfully(*arguments, output=tmp_path / "log", timeout_seconds=580)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["steps"] == load_config(REPOSITORY / QUICKSTART).train.steps
    assert summary["eval_after"]["accuracy"] < summary["eval_before"]["accuracy"] + 0.05
