"""Killed runs with more state than the policy: each equals the uninterrupted run; in another layout up to rounding.

Other files test this with a critic, a moving reference, adaptive KL and dynamic sampling (test_algorithms_long.py),
with partial rollouts (test_partial_rollouts.py), servers (test_server.py) and SGLang (test_resume.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.family_configs import raw_family_config
from tests.helpers.jobs import (
    SMALL,
    kill_when_complete,
    read_json,
    read_lines,
    rollouts_of,
    run_job_successfully,
    without_times,
)
from tests.helpers.tiny_models import make_family_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
STEPS, KILLED_AFTER = 4, 2
KEYS = (*SMALL, f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=4", "checkpoint.export_hf=false")
TURNS = (
    "sampling.max_tokens=24",
    "environment.name=tests.helpers.plain_environments:asks_on",
    "environment.max_turns=4",
)
ROUTING = (
    "model.base=null",
    "precision.dtype=bf16",
    "data.template=plain",
    "sampling.max_tokens=16",
    "optimizer.lr=1e-3",
    "reward.terms=[{name: tests.helpers.plain_rewards:digits}]",
    "algorithm.routing_replay=true",
)


@pytest.mark.parametrize("keys", [pytest.param(TURNS, id="environment"), pytest.param(ROUTING, id="routing replay")])
def test_a_killed_and_continued_run_equals_the_uninterrupted_run(tmp_path: Path, keys: tuple[str, ...]) -> None:
    if keys is ROUTING:
        config = raw_family_config("qwen3_moe", num_experts=32, num_experts_per_tok=4)
        keys = (*keys, f"model.path={make_family_model(tmp_path / 'moe', config, router_scale=0.05)}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_job_successfully(*KEYS, *keys, f"run.dir={whole}", output=tmp_path / "whole_log")
    kill_when_complete(cut, KILLED_AFTER, tmp_path / "killed", (*KEYS, *keys))
    assert not (cut / "checkpoints" / f"step_{STEPS:06d}").exists(), "it ended before it was killed"
    run_job_successfully(*KEYS, *keys, f"run.dir={cut}", output=tmp_path / "continued")
    ours, theirs = ([without_times(x) for x in read_lines(run / "metrics.jsonl")] for run in (cut, whole))
    assert len(theirs) == STEPS
    assert ours == theirs
    rows = [[rollouts_of(run, step) for step in range(1, STEPS + 1)] for run in (cut, whole)]
    assert rows[0] == rows[1]
    last = rows[1][-1]
    if keys is TURNS:
        assert max(row["num_turns"] for row in last) > 1
    else:
        assert all(row["expert_choices"] for row in last)
    digests = {read_json(run / "summary.json")["policy_digest"] for run in (cut, whole)}
    assert len(digests) == 1


def test_a_run_continued_in_another_layout_makes_the_same_step_up_to_rounding(tmp_path: Path) -> None:
    """The rollouts of the step are the same, and so is what it learns from them."""
    whole, other = tmp_path / "whole", tmp_path / "other"
    run_job_successfully(*KEYS, f"run.dir={whole}", output=tmp_path / "whole_log")
    run_job_successfully(*KEYS, f"run.dir={other}", f"train.steps={KILLED_AFTER}", output=tmp_path / "first")
    layout = ("run.world_size=2", "parallel.pp=2", "engine.tp=2")
    steps = f"train.steps={KILLED_AFTER + 1}"
    run_job_successfully(*KEYS, *layout, f"run.dir={other}", steps, output=tmp_path / "continued")
    ours, theirs = (read_lines(run / "metrics.jsonl") for run in (other, whole))
    assert [line["step"] for line in ours] == list(range(1, KILLED_AFTER + 2))
    for key in ("train/loss", "train/grad_norm", "train/entropy", "reward/mean"):
        assert ours[-1][key] == pytest.approx(theirs[KILLED_AFTER][key], rel=1e-3, abs=1e-6), key
    step = KILLED_AFTER + 1
    tokens = [sorted(row["completion_ids"] for row in rollouts_of(run, step)) for run in (other, whole)]
    assert tokens[0] == tokens[1]
