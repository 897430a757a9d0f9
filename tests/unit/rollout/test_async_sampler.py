"""Steps whose groups are sampled in the background, with a scripted engine: waits, pauses, failures, use of prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from grpo_mega.parallel.topology import Topology
from grpo_mega.rewards.inputs import ScoringRow
from grpo_mega.rollout.engine_calls import EngineCallError, MarkedEngine
from grpo_mega.rollout.partial_sampler import numbered_prompts
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Prompt, Reward, SamplingRequest, UserError
from tests.helpers.async_runs import PER_STEP, SIZE, STALENESS, UPDATES, AsyncRun
from tests.helpers.scripted_slices import RandomEngine, random_lengths
from tests.helpers.thread_ranks import on_ranks, one_rank


def check_use_of_prompts(run: AsyncRun, steps: Sequence[SampledGroups]) -> None:
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
    found = AsyncRun(one_rank())
    yield found
    found.engine.hook = lambda: None
    found.sampler.close()


def test_the_server_samples_during_training_and_every_token_has_its_version(run: AsyncRun) -> None:
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


def test_training_does_not_wait_for_groups_that_are_ready(run: AsyncRun) -> None:
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


def test_sampling_is_paused_between_two_slices_and_continues_without_the_cache(run: AsyncRun) -> None:
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


def test_a_rank_that_waits_for_the_end_of_a_slice_exchanges_messages_with_the_others_meanwhile(run: AsyncRun) -> None:
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


def test_a_failure_during_a_pause_ends_the_threads_before_the_engine_is_used_again(run: AsyncRun) -> None:
    steps = [run.sample(1)]
    run.push()
    with pytest.raises(SamplingFailedError, match="of an evaluation"), run.sampler.evaluating():
        raise SamplingFailedError("of an evaluation")
    assert run.sampler.background is not None
    assert run.sampler.background.threads == []
    check_use_of_prompts(run, [*steps, run.sample(2)])


def sample_until_failure(run: AsyncRun, steps: list[SampledGroups]) -> None:
    while True:
        run.push()
        steps.append(run.sample(2))


def test_after_a_failure_of_the_engine_its_rollouts_are_sampled_again(run: AsyncRun) -> None:
    steps = [run.sample(1)]

    def fail() -> None:
        raise RuntimeError("the process is gone")

    run.engine.hook = fail
    with pytest.raises(SamplingFailedError, match="sampling failed on rank 0: RuntimeError: the process is gone"):
        sample_until_failure(run, steps)
    run.engine.hook = lambda: None
    run.push()  # to the engine that was built again
    check_use_of_prompts(run, [*steps, run.sample(2)])


@pytest.mark.parametrize("part", ["submit", "collect"])
@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (UserError("reward.terms[0] is wrong", "correct it"), UserError, "^reward.terms.0. is wrong; correct it$"),
        (KeyError("answer"), KeyError, "answer"),
        (SystemExit("bye"), RuntimeError, "sampling during training failed on rank 0: SystemExit: bye"),
    ],
    ids=str,
)
def test_an_error_that_is_not_the_engines_is_raised_as_it_is_and_leaves_no_submitted_rollout(
    run: AsyncRun, part: str, error: BaseException, expected: type[Exception], text: str
) -> None:
    """SamplingFailedError would build the engines again, although the next ones would meet the same error."""
    steps, submit, collect, failed = [run.sample(1)], run.scorer.submit_row, run.scorer.collect, threading.Event()

    def submit_one(key: int, row: ScoringRow) -> None:
        if key:
            raise error
        submit(key, row)

    def fail_once() -> dict[int, Reward]:
        if failed.is_set():
            return collect()
        failed.set()
        raise error

    if part == "submit":
        run.scorer.submit_row = submit_one  # type: ignore[method-assign]
    else:
        run.scorer.collect = fail_once  # type: ignore[method-assign]
    with pytest.raises(expected, match=text):
        sample_until_failure(run, steps)
    assert collect() == {}


def test_an_error_of_a_callback_of_the_engine_is_not_one_of_the_engine() -> None:
    """Environments are called for each completion of a slice."""
    request = SamplingRequest(1, 1.0, 4, 0)
    prompts = [Prompt(0, "", (1,), "")]

    def on_completion(*arguments: Any) -> None:
        raise RuntimeError("the environment workers are gone")

    with pytest.raises(RuntimeError, match=r"^the environment workers are gone$") as caught:
        MarkedEngine(RandomEngine()).generate(prompts, request, on_completion)
    assert not isinstance(caught.value, EngineCallError)


@pytest.mark.parametrize("is_engine", [True, False])
def test_a_failure_of_one_rank_is_raised_on_all(is_engine: bool) -> None:
    def of_rank(transfer: RolloutTransfer) -> str:
        run = AsyncRun(transfer)

        def fail(*arguments: Any) -> None:
            raise RuntimeError("the server is gone") if is_engine else UserError("reward.terms is wrong")

        if transfer.ranks.rank == 1:
            if is_engine:
                run.engine.hook = fail
            else:
                run.scorer.submit_row = fail  # type: ignore[method-assign]
        with pytest.raises(SamplingFailedError if is_engine else UserError) as caught:
            run.sample(1)
        assert run.sampler.background is not None
        assert not any(thread.name in ("sampling", "scoring") for thread in run.sampler.background.threads)
        return str(caught.value)

    messages = on_ranks(Topology(2), of_rank)
    if is_engine:
        assert messages[0] == "sampling failed on rank 1: the log of that rank has the reason"
        assert messages[1] == "sampling failed on rank 1: RuntimeError: the server is gone"
    else:
        assert messages == ["reward.terms is wrong"] * 2


def test_several_ranks_that_share_a_server_get_the_same_step() -> None:
    def of_rank(transfer: RolloutTransfer) -> list[list[int]]:
        run = AsyncRun(transfer)
        try:
            return [groups.table.prompt_index.tolist() for groups in run.train(4)]
        finally:
            run.sampler.close()

    for topology in (Topology(2, engine_tp=2), Topology(2), Topology(3)):
        results = on_ranks(topology, of_rank)
        assert all(result == results[0] for result in results)
        flat = [index for step in results[0] for index in step[::SIZE]]
        assert len(set(flat)) == len(flat) == 4 * PER_STEP
