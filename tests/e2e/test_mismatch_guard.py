"""A run whose engine is wrong although the sync was verified stops at its first step, on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.jobs import SMALL, read_lines, run_job
from tests.helpers.tiny_models import make_tiny_model


@pytest.mark.parametrize(
    ("reward", "bound", "code"),
    [
        ("tests.helpers.wrong_engine.length", "auto", 1),
        pytest.param("tests.helpers.wrong_engine.length", "null", 0, marks=pytest.mark.long),
        pytest.param("exact", "auto", 0, marks=pytest.mark.long),
    ],
)
def test_a_wrong_engine_stops_the_run_although_the_sync_was_verified(
    tmp_path: Path, reward: str, bound: str, code: int
) -> None:
    """Only the engine of rank 1 is wrong; both ranks stop before a checkpoint is written."""
    model, run = make_tiny_model(tmp_path / "model"), tmp_path / "run"
    keys = ("model.base=null", f"model.path={model}", f"reward.terms=[{{name: {reward}}}]", f"run.dir={run}")
    keys += ("run.world_size=2", "train.steps=2", "checkpoint.every=1", f"guard.max_mismatch={bound}")
    ended = run_job(*SMALL, *keys, output=tmp_path / "log")
    assert ended.code == code, ended.stderr[-2000:]
    checkpoints = list((run / "checkpoints").glob("step_*"))
    if code == 0:
        worst = max(line["train/mismatch_likely_max"] for line in read_lines(run / "metrics.jsonl"))
        assert (worst > 0.01) == (reward != "exact")
        return
    assert "guard.max_mismatch=auto with precision.dtype=fp32" in ended.stderr
    assert "the digests of policy and engine were equal" in ended.stderr
    assert checkpoints == []
    logs = [path.read_text() for path in (run / "logs").glob("rank_*.log")]
    assert any("step 1: policy and engine differ" in text for text in logs)  # the first one ends the other rank
    assert "this command continues past it: launch/train.sh" in ended.stderr
    assert "Traceback" not in ended.stderr


# tests/unit/trainer/test_mismatch_guard.py has the bounds; the test above has them in a run.
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        pytest.param("layer_norm", 1, marks=pytest.mark.long),
        pytest.param("stale_layer", 2, marks=pytest.mark.long),
        pytest.param("embedding_row", 1, marks=pytest.mark.long),
        pytest.param("heads", 1, marks=pytest.mark.long),
    ],
)
def test_a_small_error_of_one_layer_stops_a_run_in_fp32(tmp_path: Path, kind: str, step: int) -> None:
    """The base model of the quickstart on one rank; the stale layer is right until the policy's first update."""
    run = tmp_path / "run"
    keys = ("reward.terms=[{name: tests.helpers.wrong_engine.length}]", f"run.dir={run}", "run.world_size=1")
    keys += ("precision.dtype=fp32", "train.steps=2", "weight_sync.verify=every")
    ended = run_job(*SMALL, *keys, output=tmp_path / "log", env={"WRONG_ENGINE": kind})
    assert ended.code == 1, ended.stderr[-2000:]
    logs = [path.read_text() for path in (run / "logs").glob("rank_*.log")]
    assert any(f"step {step}: policy and engine differ" in text for text in logs), ended.stderr[-2000:]


@pytest.mark.long  # tests/engine/test_weight_sync.py makes the same comparison without a job
def test_weights_that_change_after_the_verification_stop_a_run_in_bf16(tmp_path: Path) -> None:
    """A layer norm of all ones changes the log-probs by as little as rounding of bf16 does."""
    run = tmp_path / "run"
    keys = ("reward.terms=[{name: tests.helpers.wrong_engine.length}]", f"run.dir={run}", "run.world_size=1")
    keys += ("precision.dtype=bf16", "train.steps=2")
    env = {"WRONG_ENGINE": "layer_norm_ones", "WRONG_ENGINE_SHOWN": "1"}
    ended = run_job(*SMALL, *keys, output=tmp_path / "log", env=env)
    assert ended.code == 1, ended.stderr[-2000:]
    assert "model.layers.1.input_layernorm.weight: the weights of version 0 were equal" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((run / "checkpoints").glob("step_*"))
