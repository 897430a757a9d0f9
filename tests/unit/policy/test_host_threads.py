"""Threads of Adam on the host: a rank's share of its node's cores, during the optimizer step only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from grpo_mega.policy.host_threads import host_threads, intra_op_threads, share_of_cores
from grpo_mega.policy.learner import MegatronLearner
from grpo_mega.types import UpdateStats

STATS = UpdateStats(grad_norm=1.0, learning_rate=0.0, sums={}, maxima={})


def ranks_of(rank: int, world_size: int) -> Any:
    return SimpleNamespace(rank=rank, topology=SimpleNamespace(world_size=world_size))


@pytest.mark.parametrize(
    ("usable", "shares"),
    [
        ([range(16)] * 8, [2] * 8),
        ([range(7)] * 3, [2] * 3),
        ([range(4)] * 8, [1] * 8),
        ([range(8), range(8, 16)], [8, 8]),
        ([range(12), range(4)], [10, 2]),
    ],
    ids=["shared", "rounded down", "fewer cores than ranks", "bound to cores of their own", "bound in part"],
)
def test_ranks_share_the_cores_that_they_may_use(usable: Sequence[range], shares: list[int]) -> None:
    assert [share_of_cores(usable, at) for at in range(len(usable))] == shares


def test_a_rank_shares_with_the_ranks_of_its_own_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[set[int]], mine: set[int]) -> None:
        found[:] = [set(range(32))] * 2 + [mine] * 2

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [host_threads(ranks_of(rank, 4)) for rank in (1, 3)] == [16, 6]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert host_threads(ranks_of(0, 1)) == 12


class RecordingAdam:
    """Stands for Megatron's optimizer, and records the number of threads of the step."""

    def __init__(self, error: Exception | None = None) -> None:
        self.param_groups: list[dict[str, Any]] = [{}]
        self.threads = 0
        self._error = error

    def step(self) -> None:
        self.threads = torch.get_num_threads()
        if self._error is not None:
            raise self._error


def learner_with(adam: RecordingAdam, threads: int | None) -> MegatronLearner:
    learner = object.__new__(MegatronLearner)
    learner._memory = SimpleNamespace(require=lambda *_, **__: None, changed=lambda: None)  # type: ignore[assignment]
    learner.parts = SimpleNamespace(optimizer=adam)  # type: ignore[assignment]
    learner._overlaps_gather, learner._host_threads = False, threads
    return learner


@pytest.fixture
def threads_before() -> Any:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_the_optimizer_step_has_the_threads_and_the_rest_has_not(threads_before: int) -> None:
    adam = RecordingAdam()
    learner_with(adam, threads_before + 2)._step_if_allowed(STATS, 0.5, lambda _: True)
    assert (adam.threads, torch.get_num_threads()) == (threads_before + 2, threads_before)
    assert adam.param_groups[0]["lr"] == 0.5
    learner_with(adam, None)._step_if_allowed(STATS, 0.5, lambda _: True)
    assert adam.threads == threads_before


def test_the_threads_are_restored_after_an_error(threads_before: int) -> None:
    adam = RecordingAdam(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        learner_with(adam, threads_before + 2)._step_if_allowed(STATS, 0.5, lambda _: True)
    assert (adam.threads, torch.get_num_threads()) == (threads_before + 2, threads_before)


def updated_by(threads: int, numel: int) -> list[torch.Tensor]:
    """Return weight and moments after two steps of the fused Adam that Megatron uses on the host."""
    generator = torch.Generator().manual_seed(numel)
    weight = torch.randn(numel, generator=generator)
    adam = torch.optim.AdamW([{"params": [weight], "fused": True, "lr": 1e-3, "weight_decay": 0.1}])
    with intra_op_threads(threads):
        for _ in range(2):
            weight.grad = torch.randn(numel, generator=generator)
            adam.step()
    state = adam.state[weight]
    return [weight, state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_adam_gives_the_same_bits_with_any_number_of_threads(threads: int, threads_before: int) -> None:
    del threads_before
    for numel in (*range(1, 150, 6), 1001, 100_003):
        pairs = zip(updated_by(1, numel), updated_by(threads, numel), strict=True)
        assert all(torch.equal(one, several) for one, several in pairs)
