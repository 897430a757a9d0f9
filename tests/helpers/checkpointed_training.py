"""Short trainings on ranks that save a checkpoint, resume from it, and return their weights and optimizer state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.trainer.phases import Phases
from grpo_mega.types import UpdateStats
from tests.helpers.recorded_rollouts import (
    LOSS,
    Layout,
    Recorded,
    as_array,
    make_rows,
    open_policy,
    optimizer_moments,
    optimizer_states,
    torch_optimizers,
    with_recorded,
)

RATES = (2e-3, 1.5e-3, 1e-3, 2e-3)  # the loop sets the learning rate; the checkpoint does not contain it


SAVED_AFTER = 2


def state_bytes(policy: Any) -> list[bytes]:
    """Return parameters, master weights, moments and step counters of this rank."""
    masters = [p for adam in torch_optimizers(policy) for group in adam.param_groups for p in group["params"]]
    steps = [state["step"] for state in optimizer_states(policy)]
    tensors = [*policy.parts.parameters, *masters, *optimizer_moments(policy), *steps]
    return [as_array(t).tobytes() for t in tensors]


def train_on(rank: int, policy: Any, recorded: Recorded, layout: Layout, rates: tuple[float, ...]) -> list[UpdateStats]:
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    return [policy.update(batch.microbatches, LOSS, rate)[0] for rate in rates]


def run_with_checkpoint(
    rank: int, recorded: Recorded, layout: Layout, folder: Path
) -> tuple[list[UpdateStats], list[bytes]]:
    """Run four updates, with a checkpoint after the second."""
    policy = open_policy(rank, recorded, layout)
    manager = CheckpointManager(folder, 2, Phases(policy).checkpointing, is_first=rank == 0, layout=str(layout))
    stats = train_on(rank, policy, recorded, layout, RATES[:SAVED_AFTER])
    policy.offload("params", "grads", "optimizer")
    manager.stage_if_due(policy, LoopState(step=1, policy_version=SAVED_AFTER), is_due=True)
    manager.publish(wait=True)
    policy.reload("params", "grads", "optimizer")
    stats += train_on(rank, policy, recorded, layout, RATES[SAVED_AFTER:])
    return stats, state_bytes(policy)


def resume_training(
    rank: int, recorded: Recorded, layout: Layout, checkpoint: Path
) -> tuple[LoopState, list[UpdateStats], list[bytes]]:
    """Run the last two of the four updates with a policy that was built from the base model and then restored."""
    policy = open_policy(rank, recorded, layout)
    on_device = Phases(policy).checkpointing
    manager = CheckpointManager(checkpoint.parent, 2, on_device, is_first=rank == 0, layout=str(layout))
    state = manager.load(policy, checkpoint)
    policy.reload("params", "grads", "optimizer")
    stats = train_on(rank, policy, recorded, layout, RATES[SAVED_AFTER:])
    return state, stats, state_bytes(policy)


def weights_of(policy: Any) -> dict[str, bytes]:
    """Return the gathered tensors."""
    return {name: as_array(tensor).tobytes() for name, tensor in policy.full_tensors(1 << 28)}
