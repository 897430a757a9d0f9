"""Every algorithm by name: accuracy of the quickstart, and resumed runs of algorithms with more state."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.config.algorithm_presets import ALGORITHM_DEFAULTS
from tests.helpers.jobs import QUICKSTART, SMALL, read_json, read_lines, run_job_successfully, without_times

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", [n for n in ALGORITHM_DEFAULTS if n != "grpo"])  # test_quickstart_long.py has grpo
def test_the_quickstart_reaches_an_accuracy_of_0_85(tmp_path: Path, name: str) -> None:
    arguments = (QUICKSTART, f"algorithm.name={name}", f"run.dir={tmp_path / 'run'}")
    run_job_successfully(*arguments, output=tmp_path / "log", timeout_seconds=580)
    assert read_json(tmp_path / "run" / "summary.json")["eval_after"]["accuracy"] >= 0.85


@pytest.mark.parametrize(
    "keys",
    [
        ("algorithm.kl_target=0.01", "algorithm.ref_update_every=1"),
        ("algorithm.name=dapo", "algorithm.kl_coef=0.01"),  # steps of several rounds
        ("algorithm.name=reinforce_plus_plus",),
        ("algorithm.name=ppo",),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path: Path, keys: tuple[str, ...]) -> None:
    arguments = (*SMALL, *keys, "checkpoint.every=1", "checkpoint.export_hf=false")
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for last in steps:
            run = (f"run.dir={tmp_path / name}", f"train.steps={last}")
            run_job_successfully(*arguments, *run, output=tmp_path / f"{name}{last}")
    whole, parts = ([without_times(x) for x in read_lines(tmp_path / n / "metrics.jsonl")] for n in ("whole", "parts"))
    assert len(whole) == 4
    assert parts == whole
    digests = {read_json(tmp_path / n / "summary.json")["policy_digest"] for n in ("whole", "parts")}
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["gspo", "dapo", "rloo", "reinforce_plus_plus", "ppo"])
def test_a_step_is_the_same_on_two_ranks(tmp_path: Path, name: str) -> None:
    """Compare rollouts on one rank and on two ranks with two pipeline stages of the policy."""
    lines = []
    for world, keys in ((1, ()), (2, ("run.world_size=2", "parallel.pp=2", "engine.tp=2"))):
        out = tmp_path / str(world)
        arguments = (*SMALL, f"algorithm.name={name}", "algorithm.kl_coef=0.01", "train.steps=1", f"run.dir={out}")
        run_job_successfully(*arguments, *keys, output=tmp_path / f"log{world}")
        lines.append(read_lines(out / "metrics.jsonl")[0])
    for key in ("train/loss", "train/grad_norm", "train/kl", "train/entropy"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-3, abs=1e-6), key
