"""Quota, staleness, prompt accounting and determinism of partial rollouts, with a scripted engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from grpo_mega.config.schema import Config
from grpo_mega.data.dataset import PromptDataset
from grpo_mega.interfaces import Engine
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.answer_times import AnswerTimes, SamplingMeasurement
from grpo_mega.rollout.carried_rollouts import CarriedRollouts
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.partial_sampler import PartialSampler, numbered_prompts
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import SamplingFailedError
from grpo_mega.rollout.scoring import RolloutScoring
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.rollout.step_quota import positions_of_shards
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from tests.helpers.planner_cases import config_of
from tests.helpers.scripted_slices import RandomEngine, RecordingScorer, random_lengths
from tests.helpers.thread_ranks import on_ranks, one_rank

PER_STEP, SIZE, UPDATES = 4, 2, 2


def config(**changed: Any) -> Config:
    settings = {"oversubmit": 1.5, "slice_tokens": 4, "max_staleness": 100, **changed.pop("settings", {})}
    return config_of(
        sampling={"group_size": SIZE, "max_tokens": 60, "partial": settings},
        data={"prompts_per_step": PER_STEP},
        train={"minibatches_per_epoch": UPDATES},
        **changed,
    )


class Run:
    """A run of partial rollouts on one thread per rank; each step makes UPDATES updates."""

    def __init__(
        self,
        settings: Config,
        transfer: RolloutTransfer,
        data: PromptDataset | None = None,
        scorer: RecordingScorer | None = None,
        any_unfinished: Callable[[bool], bool] = bool,
    ) -> None:
        data, at = data or random_lengths(), transfer.ranks.at
        self.engine, self.scorer = RandomEngine(), scorer or RecordingScorer(SIZE)
        sampler = PartialSampler(
            SliceSampler(cast("Engine", self.engine), settings.sampling.slice_tokens, 64, lambda ids: f"{len(ids)}"),
            RolloutScoring(self.scorer if at.engine_tp_rank == 0 else None, at.replica),
            transfer.collectives,
            PhaseTimer(),
            settings,
            numbered_prompts(data, PER_STEP, settings.run.seed),
            lambda: self.engine.policy_version,
            SamplingMeasurement(AnswerTimes(lambda: True)),
            ["exact"],
            any_unfinished,
        )
        self.source = GroupSource(cast("Any", None), data, settings, sampler)
        self.carried: CarriedRollouts | None = None

    def step(self, step: int) -> SampledGroups:
        groups = self.source.sample(step, carried=self.carried)
        assert groups.carry is not None
        self.carried = groups.carry.rollouts
        self.engine.policy_version += UPDATES
        return groups


def order(num: int, seed: int) -> list[int]:
    """Return the prompts of the numbers 0 to num - 1."""
    prompt_of = numbered_prompts(random_lengths(), PER_STEP, seed)
    return [prompt_of(number).index for number in range(num)]


def test_a_step_ends_after_the_slice_that_completes_the_quota() -> None:
    run = Run(config(), one_rank())
    groups = run.step(1)
    assert len(groups.table) == PER_STEP * SIZE
    assert run.carried is not None
    assert len(run.carried.groups) == 2  # 1.5 x 4 were begun
    first, last = run.engine.calls[0], run.engine.calls[-1]
    assert (len(first[0]), first[1].continues, first[1].group_size) == (6 * SIZE, False, 1)
    assert all(request.continues for _, request in run.engine.calls[1:])
    assert len({request.seed for _, request in run.engine.calls}) == len(run.engine.calls)
    assert first[1].max_tokens_each == (4,) * 12
    # before the last slice the quota was not complete: a group of the step had an open rollout in it
    in_last = {tokens[0] for tokens in last[0]}
    assert in_last & {run.source.prompts.prompts[i].token_ids[0] for i in groups.table.prompt_index}
    lengths = groups.table.completion_tokens
    assert len(run.engine.calls) == -(-lengths.max() // 4)


def test_carried_rollouts_are_continued_from_their_tokens_and_their_versions_are_kept() -> None:
    run = Run(config(), one_rank())
    run.step(1)
    assert run.carried is not None
    carried = {r.next_prompt().token_ids for g in run.carried.groups for r in g.rollouts if not r.is_done}
    begun = len(run.engine.calls)
    groups = run.step(2)
    assert carried <= set(run.engine.calls[begun][0])
    assert not run.engine.calls[begun][1].continues, "no prefix cache survives a sync"
    versions = groups.tokens.policy_versions[groups.tokens.loss_mask]
    assert set(versions.tolist()) == {0, UPDATES}
    for start, end in zip(groups.tokens.offsets[:-1], groups.tokens.offsets[1:], strict=True):
        of_rollout = groups.tokens.policy_versions[start + 1 : end]
        assert (np.diff(of_rollout) >= 0).all(), "older tokens come first"


@pytest.mark.parametrize(("max_staleness", "oversubmit"), [(2, 2.0), (4, 2.0), (100, 2.0), (2, 5.0)])
def test_every_prompt_is_trained_once_whatever_is_dropped(
    max_staleness: int, oversubmit: float, caplog: pytest.LogCaptureFixture
) -> None:
    """With five times the quota of groups in progress, more second groups than the quota become too old together."""
    run = Run(config(settings={"max_staleness": max_staleness, "oversubmit": oversubmit}), one_rank())
    trained: list[int] = []
    dropped, oldest = 0, 0
    for step in range(1, 31):
        groups = run.step(step)
        trained += groups.table.prompt_index[::SIZE].tolist()
        tokens = groups.tokens
        oldest = max(oldest, run.engine.policy_version - UPDATES - int(tokens.policy_versions[tokens.loss_mask].min()))
        assert groups.carry is not None
        dropped += groups.carry.num_dropped
    assert run.carried is not None
    left = [group.number for group in run.carried.groups] + [number for number, _ in run.carried.waiting]
    known = order(run.carried.taken, 0)
    assert sorted(trained + [known[number] for number in left]) == sorted(known)
    assert (dropped > 0) == (max_staleness < 100)
    assert oldest <= max_staleness
    assert ("for the second time" in caplog.text) == (oversubmit == 5.0)
    assert len(trained) == 30 * PER_STEP
    # scored once, when the whole group is complete
    assert set(run.scorer.scored.values()) == {1}
    assert len(run.scorer.scored) == len(trained) * SIZE


def test_a_step_is_a_function_of_weights_seed_step_and_carried_rollouts() -> None:
    first, second = Run(config(), one_rank()), Run(config(), one_rank())
    for step in (1, 2, 3):
        first.step(step)
    assert first.carried is not None
    content = first.carried.to_bytes()
    begun = len(first.engine.calls)
    expected = first.step(4)
    assert first.carried.to_bytes() != content
    prompt_of = numbered_prompts(random_lengths(), PER_STEP, 0)
    second.carried = CarriedRollouts.from_bytes(content, prompt_of)
    second.engine.policy_version = 3 * UPDATES
    found = second.step(4)
    assert first.engine.calls[begun:] == second.engine.calls
    assert found.tokens.token_ids.tobytes() == expected.tokens.token_ids.tobytes()
    assert found.tokens.sampler_log_probs.tobytes() == expected.tokens.sampler_log_probs.tobytes()
    assert second.carried.to_bytes() == first.carried.to_bytes()


def test_the_state_before_a_step_is_not_changed_by_it() -> None:
    """A stop request after sampling saves the state of the step before."""
    run = Run(config(), one_rank())
    run.step(1)
    before = run.carried
    assert before is not None
    content = before.to_bytes()
    run.step(2)
    assert before.to_bytes() == content


def test_surplus_groups_are_used_first_and_count_in_the_order_in_which_they_were_begun() -> None:
    """All answers end in the first slice: a step uses the first groups, the next one the rest without sampling."""
    run = Run(config(settings={"oversubmit": 2.0}), one_rank(), random_lengths(mean_of=lambda _: 1))
    known = order(3 * PER_STEP, 0)
    assert run.step(1).table.prompt_index[::SIZE].tolist() == known[:PER_STEP]
    assert len(run.engine.calls) == 1
    groups = run.step(2)
    assert groups.table.prompt_index[::SIZE].tolist() == known[PER_STEP : 2 * PER_STEP]
    assert len(run.engine.calls) == 1, "nothing had to be sampled"
    assert set(groups.table.policy_version.tolist()) == {0}


@pytest.mark.parametrize(
    "topology", [Topology(2), Topology(2, engine_tp=2), Topology(3), Topology(2, engine_dp=2)], ids=str
)
def test_all_ranks_agree_on_the_step_and_no_shard_depends_on_another(topology: Topology) -> None:
    def of_rank(transfer: RolloutTransfer) -> tuple[list[SampledGroups], CarriedRollouts | None, Any]:
        def any_of_replica(here: bool) -> bool:  # the only replica
            return bool(transfer.collectives.gather(np.array([float(here)])).any())

        run = Run(config(), transfer, any_unfinished=any_of_replica if topology.engine_dp > 1 else bool)
        return [run.step(step) for step in range(1, 6)], run.carried, run.engine.calls

    results = on_ranks(topology, of_rank)
    for step in range(5):
        tables = [groups[step].table for groups, _, _ in results]
        assert all(np.array_equal(t.prompt_index, tables[0].prompt_index) for t in tables)
        assert len(tables[0]) == PER_STEP * SIZE
        quotas = np.bincount(tables[0].prompt_shard[::SIZE], minlength=topology.num_prompt_shards).tolist()
        assert quotas == [
            len(range(i, PER_STEP, topology.num_prompt_shards)) for i in range(topology.num_prompt_shards)
        ]
    for rank, (groups, carried, calls) in enumerate(results):
        first = rank // topology.prompt_shard_size * topology.prompt_shard_size
        assert calls == results[first][2], "ranks of a shard make the same calls"
        assert carried is not None
        assert results[first][1] is not None
        assert carried.to_bytes() == results[first][1].to_bytes()
        assert (len(groups[0].tokens) > 0) == (rank == first)
    if topology.engine_dp > 1:
        assert len({len(calls) for _, _, calls in results[:2]}) == 1, "the copies of a replica call it together"
    numbers = [g.number for _, carried, _ in results[:: topology.prompt_shard_size] if carried for g in carried.groups]
    assert len(numbers) == len(set(numbers))


def test_degenerate_groups_are_replaced_by_groups_in_progress() -> None:
    """Every second prompt has equal rewards. What is dropped was used: its prompt does not come again."""
    settings = config(algorithm={"degenerate": "refill", "refill_rounds": 4, "name": "grpo"})
    run = Run(settings, one_rank(), scorer=RecordingScorer(SIZE, lambda index, member: float(member * (index % 2))))
    seen: list[int] = []
    discarded = 0
    for step in range(1, 8):
        groups = run.step(step)
        assert len(groups.prompts) == PER_STEP
        discarded += groups.num_discarded
        seen += groups.table.prompt_index[::SIZE].tolist()
    assert len(seen) == len(set(seen))
    assert discarded > 5
    assert np.mean([index % 2 for index in seen]) > 0.8
    assert set(run.scorer.scored.values()) == {1}


def test_fewer_prompts_than_groups_in_progress_give_a_prompt_twice_in_other_epochs() -> None:
    run = Run(config(settings={"oversubmit": 3.0}), one_rank(), random_lengths(5))
    seen: Counter[int] = Counter()
    for step in range(1, 11):
        seen.update(run.step(step).table.prompt_index[::SIZE].tolist())
    assert run.carried is not None
    seen.update(group.rollouts[0].prompt.index for group in run.carried.groups)
    assert max(seen.values()) - min(seen.values()) <= 1


def test_another_group_size_drops_what_does_not_fit_and_samples_it_again(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(config(), one_rank())
    run.step(1)
    assert run.carried is not None
    numbers = [group.number for group in run.carried.groups]
    changed = config()
    changed = changed.model_copy(update={"sampling": changed.sampling.model_copy(update={"group_size": 3})})
    other = Run(changed, one_rank())
    other.carried, other.engine.policy_version = run.carried, UPDATES
    groups = other.step(2)
    assert "2 carried groups do not fit sampling.group_size=3" in caplog.text
    assert groups.group_size == 3
    assert other.carried is not None
    known = order(other.carried.taken, 0)
    left = [known[group.number] for group in other.carried.groups]
    assert {known[number] for number in numbers} <= {*groups.table.prompt_index.tolist(), *left}


def test_the_positions_of_a_step_alternate_between_the_shards() -> None:
    assert positions_of_shards(np.array([2, 0, 3])) == [[0, 2], [], [1, 3, 4]]


def test_a_step_whose_engine_failed_is_sampled_again_as_if_it_had_not() -> None:
    run, undisturbed = Run(config(), one_rank()), Run(config(), one_rank())
    for each in (run, undisturbed):
        each.step(1)
    generate, calls = run.engine.generate, len(run.engine.calls)

    def fail_in_the_second_slice(*arguments: Any) -> Any:
        if len(run.engine.calls) > calls:
            raise RuntimeError("the device is lost")
        return generate(*arguments)

    run.engine.generate = fail_in_the_second_slice  # type: ignore[method-assign]
    with pytest.raises(SamplingFailedError, match="sampling failed on rank 0: RuntimeError: the device is lost"):
        run.step(2)
    run.engine.generate = generate  # type: ignore[method-assign]
    found, expected = run.step(2), undisturbed.step(2)
    assert found.tokens.token_ids.tobytes() == expected.tokens.token_ids.tobytes()
    assert run.carried is not None
    assert undisturbed.carried is not None
    assert run.carried.to_bytes() == undisturbed.carried.to_bytes()
