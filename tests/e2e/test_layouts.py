"""Runs on several ranks, started by the command."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.finished_runs import Run
from tests.helpers.jobs import QUICKSTART, read_json, read_lines, rollouts_of, run_job_successfully, running_job

GIB = 1 << 30


def test_four_ranks_finish_and_print_their_layout(four_ranks: Run) -> None:
    summary = read_json(four_ranks.folder / "summary.json")
    assert summary["status"] == "done"
    assert summary["steps"] == 2
    layout = {"world_size": 4, "tp": 2, "pp": 2, "vpp": 1, "cp": 1, "dp": 1, "engine_tp": 2, "engine_replicas": 2}
    assert summary["layout"] == layout | {"ep": 1, "etp": 1, "edp": 2}
    assert (four_ranks.folder / "hf" / "model.safetensors").is_file()
    assert len(list((four_ranks.folder / "logs").glob("rank_*.log"))) == 4


def test_two_replicas_share_the_prompts_and_their_tokens_add_up(four_ranks: Run) -> None:
    for line in read_lines(four_ranks.folder / "metrics.jsonl"):
        shares = [line["rollout/tokens_per_replica/0"], line["rollout/tokens_per_replica/1"]]
        rows = rollouts_of(four_ranks.folder, line["step"])
        assert min(shares) > 0
        assert sum(shares) == line["rollout/tokens"] == sum(len(row["completion_ids"]) for row in rows)
        sampled_by = {(row["prompt_index"], row["replica"]) for row in rows}
        assert len(rows) == 8 * 4
        assert len(sampled_by) == 8  # no prompt is sampled by both
        assert line["train/mismatch_max"] <= 1e-4


def test_before_the_first_update_the_policy_equals_its_reference_and_every_ratio_is_1(four_ranks: Run) -> None:
    first, second = read_lines(four_ranks.folder / "metrics.jsonl")
    assert first["train/updates"] == 1
    assert first["train/kl"] == 0.0
    assert first["train/ratio_max"] == 1.0
    assert first["train/clip_fraction"] == 0.0
    assert abs(first["train/loss"]) < 1e-6  # advantages of a group add up to zero
    assert second["train/kl"] > 0.0


@pytest.mark.long
def test_eight_ranks_of_the_quickstart_stay_below_18_gib_together(tmp_path: Path) -> None:
    arguments = [
        QUICKSTART,
        "parallel.tp=2",
        "parallel.pp=2",
        "run.world_size=8",
        "train.steps=3",
        f"run.dir={tmp_path / 'run'}",
    ]
    peak = 0
    with running_job(arguments, tmp_path / "log") as process:
        deadline = time.monotonic() + 540
        while process.poll() is None:
            assert time.monotonic() < deadline
            peak = max(peak, _memory_bytes(process))
            time.sleep(0.5)
        assert process.returncode == 0, (tmp_path / "log.err").read_text()[-3000:]
    assert GIB < peak < 18 * GIB
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "done"


def _memory_bytes(process: psutil.Popen) -> int:
    """Return the memory of the process tree; pages that several processes share are counted once (PSS)."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += member.memory_full_info().pss
    return total


@pytest.mark.long
def test_a_bf16_run_learns(tmp_path: Path) -> None:
    """Train in bf16; rounding makes the sampler differ from the policy, within a tolerance."""
    arguments = (QUICKSTART, "precision.dtype=bf16", "train.steps=10", f"run.dir={tmp_path / 'run'}")
    run_job_successfully(*arguments, output=tmp_path / "log", timeout_seconds=500)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["eval_after"]["accuracy"] >= summary["eval_before"]["accuracy"] + 0.15
    worst = max(line["train/mismatch_max"] for line in read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert 1e-4 < worst < 1.0
    assert max(line["train/mismatch_kl"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")) < 1e-3
