"""Steps whose groups are sampled in the background, with a scripted engine: waits, pauses, failures, use of prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from grpo_mega.config.schema import Config
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.async_sampler import AsyncSampler
from grpo_mega.rollout.background_sampler import BackgroundSampler
from grpo_mega.rollout.carried_rollouts import CarriedRollouts
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.partial_sampler import numbered_prompts
from grpo_mega.rollout.rollout_buffer import BufferLimits, RolloutBuffer
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.rollout.scoring import RolloutScoring
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from tests.helpers.planner_cases import config_of
from tests.helpers.scripted_slices import RandomEngine, RecordingScorer, random_lengths
from tests.helpers.thread_ranks import on_ranks, one_rank

PER_STEP, SIZE, UPDATES = 4, 2, 2
STALENESS = 2 * UPDATES


def config() -> Config:
    return config_of(
        sampling={"group_size": SIZE, "max_tokens": 60},
        data={"prompts_per_step": PER_STEP},
        train={"minibatches_per_epoch": UPDATES, "max_staleness": STALENESS},
        engine={"placement": "server", "urls": ["h:1"]},
        algorithm={"correction": "token_truncated"},
    )


class Server(RandomEngine):
    """Engine that counts its calls, and fails if a call overlaps a change of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = threading.Event()
        self.hook: Callable[[], None] = lambda: None

    def generate(self, *arguments: Any) -> Any:
        version = self.policy_version
        self.hook()
        found = super().generate(*arguments)
        time.sleep(0.001)
        assert self.policy_version == version, "the weights have changed during a call"
        return found


class Run:
    """A run on one thread per rank, whose server samples in another thread."""

    def __init__(self, transfer: RolloutTransfer) -> None:
        self.engine, settings, data, at = Server(), config(), random_lengths(), transfer.ranks.at
        self.scorer = RecordingScorer(SIZE)
        scoring = RolloutScoring(self.scorer, at.replica)
        prompt_of = numbered_prompts(data, PER_STEP, settings.run.seed)

        def make_background(carried: CarriedRollouts) -> BackgroundSampler:
            limits = BufferLimits(carried.shard.quota, SIZE, STALENESS, UPDATES)
            buffer = RolloutBuffer(carried, limits, prompt_of, lambda _: False)
            slices = SliceSampler(self.engine, 4, 64, lambda ids: f"{len(ids)}")
            return BackgroundSampler(buffer, slices, scoring, EngineGauges, self.engine.cancelled)

        self.sampler = AsyncSampler(
            make_background if at.engine_tp_rank == 0 else None,
            transfer.collectives,
            PhaseTimer(),
            settings,
            prompt_of,
            lambda: self.engine.policy_version,
            lambda _: None,
            ["exact"],
            beat_seconds=0.2,
        )
        self.source = GroupSource(None, data, settings, self.sampler)  # type: ignore[arg-type]
        self.carried: CarriedRollouts | None = None

    def sample(self, step: int) -> SampledGroups:
        groups = self.source.sample(step, carried=self.carried)
        assert groups.carry is not None
        self.carried = groups.carry.rollouts
        return groups

    def push(self) -> None:
        with self.sampler.syncing():
            self.engine.policy_version += UPDATES

    def train(self, num_steps: int) -> list[SampledGroups]:
        groups = []
        for step in range(1, num_steps + 1):
            groups.append(self.sample(step))
            time.sleep(0.01)  # training
            self.push()
        return groups


def check_use_of_prompts(run: Run, steps: Sequence[SampledGroups]) -> None:
    """Every prompt that was begun was trained once, or is carried."""
    trained = [index for groups in steps for index in groups.table.prompt_index[::SIZE].tolist()]
    assert len(set(trained)) == len(trained) == len(steps) * PER_STEP
    assert run.carried is not None
    prompt_of = numbered_prompts(random_lengths(), PER_STEP, 0)
    left = [group.number for group in run.carried.groups] + [number for number, _ in run.carried.waiting]
    used = {prompt_of(number).index for number in range(run.carried.taken)}
    assert {*trained, *(prompt_of(number).index for number in left)} == used


@pytest.fixture
def run() -> Any:
    found = Run(one_rank())
    yield found
    found.engine.hook = lambda: None
    found.sampler.close()


def test_the_server_samples_during_training_and_every_token_has_its_version(run: Run) -> None:
    steps = run.train(20)
    ages = [
        groups.carry.policy_version - int(groups.tokens.policy_versions[groups.tokens.loss_mask].min())
        for groups in steps
        if groups.carry is not None
    ]
    assert 0 < max(ages) <= STALENESS
    check_use_of_prompts(run, steps)
    assert not run.engine.calls[0][1].continues
    assert len({request.seed for _, request in run.engine.calls}) == len(run.engine.calls)


def test_training_does_not_wait_for_groups_that_are_ready(run: Run) -> None:
    run.sample(1)
    background = run.sampler.background
    assert background is not None
    assert background.wait_until_ready(10), "the groups of the next step are sampled during training"
    release = threading.Event()
    run.engine.hook = lambda: release.wait(10)  # type: ignore[assignment]
    groups = run.sample(2)
    assert groups.carry is not None
    assert groups.carry.waits is not None
    assert groups.carry.waits.num_ready >= PER_STEP
    assert groups.carry.waits.policy_seconds < 5
    release.set()


def test_sampling_is_paused_between_two_slices_and_continues_without_the_cache(run: Run) -> None:
    run.sample(1)
    with run.sampler.syncing():
        begun = len(run.engine.calls)
        assert run.sampler.background is not None
        run.sampler.background.buffer.weights_changed()  # there is work
        time.sleep(0.05)
        assert len(run.engine.calls) == begun
        run.engine.policy_version += UPDATES
    for step in range(2, 12):  # a slice cannot complete the groups of a step, so some step needs several
        run.sample(step)
        run.push()
    after = [request.continues for _, request in run.engine.calls[begun:]]
    assert not after[0], "no prefix cache survives a sync"
    assert any(after)
    with run.sampler.evaluating():
        begun, scored = len(run.engine.calls), run.scorer.scored.copy()
        time.sleep(0.05)
        assert (len(run.engine.calls), run.scorer.scored) == (begun, scored)


def test_a_rank_that_waits_for_the_end_of_a_slice_exchanges_messages_with_the_others_meanwhile(run: Run) -> None:
    run.sample(1)
    run.push()
    begun, release, exchanges, add = threading.Event(), threading.Event(), [0], run.sampler.collectives.sum

    def wait() -> None:
        begun.set()
        release.wait(10)

    def counted_sum(array: NDArray[np.float64]) -> NDArray[np.float64]:
        exchanges[0] += 1
        if exchanges[0] == 3:
            release.set()
        return add(array)

    run.engine.hook = wait
    assert begun.wait(10)
    run.sampler.collectives.sum = counted_sum  # type: ignore[method-assign]
    with run.sampler.syncing():
        assert release.is_set()


def test_a_failure_during_a_pause_ends_the_threads_before_the_engine_is_used_again(run: Run) -> None:
    steps = [run.sample(1)]
    run.push()
    with pytest.raises(SamplingFailedError, match="of an evaluation"), run.sampler.evaluating():
        raise SamplingFailedError("of an evaluation")
    assert run.sampler.background is not None
    assert run.sampler.background.threads == []
    check_use_of_prompts(run, [*steps, run.sample(2)])


@pytest.mark.parametrize(("part", "kind"), [("server", RuntimeError), ("scorer", RuntimeError), ("scorer", SystemExit)])
def test_a_failure_is_reported_and_its_rollouts_are_sampled_again(
    run: Run, part: str, kind: type[BaseException]
) -> None:
    steps, collect = [run.sample(1)], run.scorer.collect

    def fail() -> Any:
        collect()
        raise kind("the process is gone")

    def steps_until_failure() -> None:
        while True:
            run.push()
            steps.append(run.sample(2))

    if part == "server":
        run.engine.hook = fail
    else:
        run.scorer.collect = fail  # type: ignore[method-assign]
    with pytest.raises(SamplingFailedError, match=f"sampling failed on rank 0: {kind.__name__}: the process is gone"):
        steps_until_failure()
    run.engine.hook, run.scorer.collect = lambda: None, collect  # type: ignore[method-assign]
    run.push()  # to the engine that was built again
    check_use_of_prompts(run, [*steps, run.sample(2)])


def test_a_failure_of_one_rank_is_raised_on_all() -> None:
    def of_rank(transfer: RolloutTransfer) -> str:
        run = Run(transfer)
        if transfer.ranks.rank == 1:

            def fail() -> None:
                raise RuntimeError("the server is gone")

            run.engine.hook = fail
        with pytest.raises(SamplingFailedError) as caught:
            run.sample(1)
        assert run.sampler.background is not None
        assert not any(thread.name in ("sampling", "scoring") for thread in run.sampler.background.threads)
        return str(caught.value)

    messages = on_ranks(Topology(2), of_rank)
    assert messages[0] == "sampling failed on rank 1: the log of that rank has the reason"
    assert messages[1] == "sampling failed on rank 1: RuntimeError: the server is gone"


def test_several_ranks_that_share_a_server_get_the_same_step() -> None:
    def of_rank(transfer: RolloutTransfer) -> list[list[int]]:
        run = Run(transfer)
        try:
            return [groups.table.prompt_index.tolist() for groups in run.train(4)]
        finally:
            run.sampler.close()

    for topology in (Topology(2, engine_tp=2), Topology(2), Topology(3)):
        results = on_ranks(topology, of_rank)
        assert all(result == results[0] for result in results)
        flat = [index for step in results[0] for index in step[::SIZE]]
        assert len(set(flat)) == len(flat) == 4 * PER_STEP
