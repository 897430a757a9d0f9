"""A resumed run is bit-equal in the same layout and equal within rounding in another; checkpoints appear atomically."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.formats.checkpoint_manifest import require_undamaged
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.trainer.phases import Phases
from tests.helpers.checkpointed_training import (
    RATES,
    SAVED_AFTER,
    resume_training,
    run_with_checkpoint,
    train_on,
    weights_of,
)
from tests.helpers.recorded_rollouts import (
    ONE,
    Layout,
    Recorded,
    make_rows,
    open_policy,
    optimizer_moments,
)
from tests.parallel.conftest import Laboratory

PP2VPP2, PP2, CP2 = Layout(2, pp=2, vpp=2), Layout(2, pp=2, more=(("num_layers_last_stage", 3),)), Layout(2, cp=2)
TP2PP2, DP2, TP2 = Layout(4, tp=2, pp=2), Layout(2), Layout(2, tp=2)


@pytest.mark.parametrize(
    ("model", "layout", "other", "dtype"),
    [
        ("qwen3-tied", TP2PP2, ONE, "fp32"),
        ("qwen3-tied", TP2PP2, ONE, "bf16"),
        ("qwen3-tied", DP2, TP2, "fp32"),
        pytest.param("qwen3-tied", DP2, TP2, "bf16", marks=pytest.mark.long),
        ("deep", PP2VPP2, PP2, "fp32"),
        pytest.param("deep", PP2, PP2VPP2, "fp32", marks=pytest.mark.long),
        ("deep", CP2, ONE, "fp32"),
    ],
    ids=str,
)
def test_a_resumed_run_equals_the_uninterrupted_one_within_rounding_at_another_layout(
    laboratory: Laboratory, tmp_path: Path, model: str, layout: Layout, other: Layout, dtype: str
) -> None:
    recorded = replace(laboratory.recorded(model), dtype=dtype)
    checkpoints = RunFolder(tmp_path).checkpoints
    whole = laboratory.pool.call(layout.world, run_with_checkpoint, recorded, layout, checkpoints)
    (checkpoint,) = RunFolder(tmp_path).complete_checkpoints().values()
    for (stats, state), (loop, resumed, resumed_state) in zip(
        whole, laboratory.pool.call(layout.world, resume_training, recorded, layout, checkpoint), strict=True
    ):
        assert loop == LoopState(step=1, policy_version=SAVED_AFTER)
        assert resumed == stats[SAVED_AFTER:]
        assert resumed_state == state
    if dtype == "bf16":
        return  # another layout sums in another order; bf16 rounds too much for a tight tolerance
    for loop, resumed, _ in laboratory.pool.call(other.world, resume_training, recorded, other, checkpoint):
        assert loop.policy_version == SAVED_AFTER
        for found, wanted in zip(resumed, whole[0][0][SAVED_AFTER:], strict=True):
            assert abs(found.sums["loss"] - wanted.sums["loss"]) <= 1e-5 * wanted.sums["loss_magnitude"]
            assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)


def processes_left_by_a_save(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> list[str]:
    policy = open_policy(rank, recorded, layout)
    train_on(rank, policy, recorded, layout, RATES[:1])
    before = set(psutil.Process().children(recursive=True))
    policy.save(folder, {})
    return [" ".join(child.cmdline()) for child in set(psutil.Process().children(recursive=True)) - before]


def test_a_save_leaves_no_process_behind(laboratory: Laboratory, tmp_path: Path) -> None:
    recorded = laboratory.recorded("qwen3")
    assert laboratory.pool.call(2, processes_left_by_a_save, recorded, DP2, tmp_path) == [[], []]


def reference_after_load(rank: int, recorded: Recorded, layout: Layout, checkpoint: Path) -> bool:
    policy = open_policy(rank, recorded, layout, with_reference=True)
    rows = make_rows(rank, recorded, layout).microbatches
    base = policy.log_probs(rows)
    policy.load(checkpoint)
    with policy.reference():
        reference = policy.log_probs(rows)
    loaded = policy.log_probs(rows)
    same = all(torch.equal(a, b) for a, b in zip(base, reference, strict=True))  # type: ignore[arg-type]
    return same and not any(torch.equal(a, b) for a, b in zip(base, loaded, strict=True))  # type: ignore[arg-type]


def run_moving_reference(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> list[dict[str, bytes]]:
    """Return the weights after one update (the new reference), after a second update, and of the final reference."""
    policy = open_policy(rank, recorded, layout, with_reference=True, ref_update_every=1)
    train_on(rank, policy, recorded, layout, RATES[:1])
    policy.update_reference()
    found = [weights_of(policy)]
    train_on(rank, policy, recorded, layout, RATES[1:2])
    policy.save(folder, {})
    found.append(weights_of(policy))
    with policy.reference():
        found.append(weights_of(policy))
    return found


def load_with_reference(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> list[dict[str, bytes]]:
    """Return the weights of policy and reference after a load."""
    policy = open_policy(rank, recorded, layout, with_reference=True, ref_update_every=1)
    policy.load(folder)
    found = [weights_of(policy)]
    with policy.reference():
        found.append(weights_of(policy))
    return found


@pytest.mark.parametrize("other", [TP2, ONE], ids=str)
def test_an_updated_reference_is_part_of_a_checkpoint_at_any_layout(
    laboratory: Laboratory, tmp_path: Path, other: Layout
) -> None:
    recorded = laboratory.recorded("qwen3")
    first, second, reference = laboratory.pool.call(2, run_moving_reference, recorded, DP2, tmp_path)[0]
    assert first == reference
    assert first != second
    for policy, loaded in laboratory.pool.call(other.world, load_with_reference, recorded, other, tmp_path):
        assert policy == second
        assert loaded == reference


def stage_and_publish(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> dict[str, Any]:
    """Return the checkpoints that are visible after each operation."""
    policy = open_policy(rank, recorded, layout)
    manager = CheckpointManager(folder, 2, Phases(policy).checkpointing, is_first=rank == 0)
    run = RunFolder(folder.parent)

    def visible() -> list[int]:
        torch.distributed.barrier()
        steps = list(run.complete_checkpoints())
        torch.distributed.barrier()
        return steps

    train_on(rank, policy, recorded, layout, RATES[:1])
    manager.stage_if_due(policy, LoopState(3, 3), is_due=False)
    not_due = visible()
    stale = folder / "step_000004.tmp" / "left_over_by_a_kill"
    if rank == 0:
        stale.mkdir(parents=True)
    torch.distributed.barrier()
    manager.stage_if_due(policy, LoopState(4, 4), is_due=True)
    seen = {"not_due": not_due, "staged": visible(), "stale_is_gone": not stale.exists()}
    manager.publish(wait=True)
    seen["published"] = visible()
    history = []
    for step in (6, 8, 9):
        manager.stage_if_due(policy, LoopState(step, step), is_due=True)
        manager.publish(wait=True)
        history.append(visible())
    manager.stage_if_due(policy, LoopState(9, 9), is_due=True)
    manager.publish(wait=True)
    manager.close()  # waits for deletions
    return seen | {"history": history, "again": visible(), "names": sorted(p.name for p in folder.iterdir())}


def test_staged_checkpoints_are_not_visible_stale_ones_are_replaced_and_old_ones_deleted(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    recorded, folder = laboratory.recorded("qwen3"), RunFolder(tmp_path).checkpoints
    for seen in laboratory.pool.call(2, stage_and_publish, recorded, DP2, folder):
        assert not seen["not_due"]
        assert seen["staged"] == []
        assert seen["stale_is_gone"]
        assert seen["published"] == [4]
        assert seen["history"] == [[4, 6], [6, 8], [8, 9]]
        assert seen["again"] == [8, 9]
        assert seen["names"] == ["step_000008", "step_000009"]
    checkpoint = RunFolder(tmp_path).complete_checkpoints()[9]
    assert laboratory.pool.call(1, reference_after_load, recorded, ONE, checkpoint) == [True]


def save_what_is_not_live(rank: int, recorded: Recorded, layout: Layout, folder: Path, part: str) -> str:
    """Save while Megatron writes other values than those of the live state; return the error."""
    from grpo_mega.policy import sharded_state

    policy = open_policy(rank, recorded, layout)
    train_on(rank, policy, recorded, layout, RATES[:1])
    real_save = sharded_state.dist_checkpointing.save
    tensor = {"weights": policy.parts.parameters[-1], "moments": optimizer_moments(policy)[0]}[part]

    def save_old_values(state: Any, *args: Any, **kwargs: Any) -> None:
        if part == "moments":
            moment = next(s["exp_avg"][0] for s in state["optimizer"]["param_state"].values())
            moment.data = moment.data + 1
        else:
            tensor.data.add_(1)
        real_save(state, *args, **kwargs)
        if part == "weights":
            tensor.data.sub_(1)

    manager = CheckpointManager(folder, 2, Phases(policy).checkpointing, is_first=rank == 0)
    with mock.patch.object(sharded_state.dist_checkpointing, "save", save_old_values):
        try:
            manager.stage_if_due(policy, LoopState(step=2, policy_version=2), is_due=True)
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("part", "tensor"), [("weights", "./output_layer.weight"), ("moments", "./optimizer.state.exp_avg.")]
)
def test_a_save_of_values_that_are_not_live_fails_on_every_rank_and_is_not_visible(
    laboratory: Laboratory, tmp_path: Path, part: str, tensor: str
) -> None:
    folder = RunFolder(tmp_path).checkpoints
    for message in laboratory.pool.call(2, save_what_is_not_live, laboratory.recorded("qwen3"), DP2, folder, part):
        assert "is not the present state" in message
        assert tensor in message
    assert RunFolder(tmp_path).complete_checkpoints() == {}


def save_until_it_fails(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> str:
    policy = open_policy(rank, recorded, layout)
    manager = CheckpointManager(folder, 9, Phases(policy).checkpointing, is_first=rank == 0)
    train_on(rank, policy, recorded, layout, RATES[:1])
    for step in range(1, 9):
        try:
            manager.stage_if_due(policy, LoopState(step, step), is_due=True)
        except RuntimeError as error:
            return str(error)
        manager.publish(wait=True)
    return ""


def test_a_full_disk_stops_the_run_with_its_earlier_checkpoints_whole(laboratory: Laboratory, small_disk: Path) -> None:
    folder = RunFolder(small_disk).checkpoints
    (message,) = laboratory.pool.call(1, save_until_it_fails, laboratory.recorded("qwen3"), ONE, folder)
    free, size = (int(number) for number in re.findall(r"has (\d+) bytes", message))
    assert free < size
    assert "step_000003.tmp cannot be written" in message
    complete = RunFolder(small_disk).complete_checkpoints()
    assert complete
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in complete.values()]
    for path in complete.values():
        require_undamaged(path)


def publish_without_disk(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> str:
    policy = open_policy(rank, recorded, layout)
    train_on(rank, policy, recorded, layout, RATES[:1])
    manager = CheckpointManager(folder, 2, Phases(policy).checkpointing, is_first=rank == 0)
    manager.stage_if_due(policy, LoopState(1, 1), is_due=True)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("pathlib.Path.rename", side_effect=full):
        try:
            manager.publish(wait=True)
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_failure_on_rank_0_is_raised_on_all_ranks(laboratory: Laboratory, tmp_path: Path) -> None:
    for message in laboratory.pool.call(2, publish_without_disk, laboratory.recorded("qwen3"), DP2, tmp_path):
        assert "No space left on device" in message
        assert str(tmp_path) in message
