"""Sampling over replicas with a scripted engine: waves, distribution of prompts, order, seeds and scoring."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from grpo_mega.data.chat import token_ends
from grpo_mega.data.tokenizers import byte_tokenizer
from grpo_mega.interfaces import Engine
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.topology import Topology
from grpo_mega.rewards.inputs import ScoringRow
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.rollout.sampler import Sampler, SamplingFailedError, derived_seed
from grpo_mega.rollout.scoring import locate_step_tokens
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Completion, Prompt, Reward, SamplingRequest
from tests.helpers.thread_ranks import on_ranks, one_rank

REQUEST = SamplingRequest(group_size=3, temperature=0.5, max_tokens=9, seed=12345)
SEED_OF = ("train", 0, 4)
GOLDEN = 227108348  # derived_seed("train", 0, 1, 0, 0)


class ScriptedEngine:
    """Engine that returns the tokens (p, m, seed), repeated m + 1 times, and completes the last rollout first."""

    def __init__(self, lost: int = 0) -> None:
        self.calls: list[tuple[list[int], SamplingRequest]] = []
        self._lost = lost

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None],
    ) -> None:
        self.calls.append(([p.index for p in prompts], sampling))
        done = [(local, member) for local in range(len(prompts)) for member in range(sampling.group_size)]
        for local, member in reversed(done[self._lost :]):
            tokens = (prompts[local].index, member, sampling.seed) * (member + 1)
            text = f"answer {member} to {prompts[local].index}"
            on_completion(local, member, Completion(tokens, (-1.0,) * len(tokens), "eos", 2, text))


class ScriptedScorer:
    """Scorer whose reward is the number in the reference plus the member in the completion."""

    def __init__(self) -> None:
        self.submitted: list[tuple[int, str, str, str]] = []
        self.rows: dict[int, ScoringRow] = {}

    def submit_row(self, key: int, row: ScoringRow) -> None:
        self.submitted.append((key, row.prompt, row.completion, row.reference))
        self.rows[key] = row

    def collect(self) -> dict[int, Reward]:
        return {key: Reward(float(ref) + int(text.split()[1]) / 10) for key, _, text, ref in self.submitted}


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(10 + i, f"question {10 + i}", (i,), str(i)) for i in range(count)]


def sample_on_ranks(
    topology: Topology, count: int, per_wave: int | None, lost: int = 0
) -> tuple[list[SampledGroups], list[ScriptedEngine], list[ScriptedScorer | None]]:
    """Return the result of each rank."""
    world = topology.world_size
    engines = [ScriptedEngine(lost) for _ in range(world)]
    scorers = [ScriptedScorer() if not topology.coordinates(r).engine_tp_rank else None for r in range(world)]

    def run(transfer: RolloutTransfer) -> SampledGroups:
        rank = transfer.ranks.rank
        engine = cast("Engine", engines[rank])
        sampler = Sampler(engine, scorers[rank], transfer.collectives, PhaseTimer(), per_wave)
        return sampler.sample(prompts_of(count), REQUEST, SEED_OF)

    return on_ranks(topology, run), engines, scorers


@pytest.mark.parametrize("per_wave", [None, 1, 3, 4, 100])
@pytest.mark.parametrize(("world", "engine_tp", "engine_dp"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (6, 2, 1), (8, 2, 2)])
def test_all_ranks_get_all_groups_in_the_order_of_the_prompts(
    world: int, engine_tp: int, engine_dp: int, per_wave: int | None
) -> None:
    topology = Topology(world, engine_tp=engine_tp, engine_dp=engine_dp)
    results, engines, scorers = sample_on_ranks(topology, 7, per_wave)
    rows = [(i, m) for i in range(7) for m in range(3)]
    for result in results:
        assert result.prompts == prompts_of(7)
        assert result.table.prompt_index.tolist() == [10 + i for i, _ in rows]
        assert result.table.reward.tolist() == [i + m / 10 for i, m in rows]
        assert result.table.completion_tokens.tolist() == [3 * (m + 1) for _, m in rows]
    for rank, result in enumerate(
        results
    ):  # a rollout is on the first rank of the shard that sampled it, and only there
        first_ranks = result.table.prompt_shard * topology.prompt_shard_size
        assert result.tokens.ids.tolist() == np.flatnonzero(first_ranks == rank).tolist()
        own = [rows[row] for row in result.tokens.ids]
        assert result.texts == [f"answer {m} to {10 + i}" for i, m in own]
        starts = result.tokens.offsets[:-1]
        columns = [result.tokens.token_ids[starts + k].tolist() for k in range(3)]
        assert list(zip(*columns, strict=True)) == [(i, 10 + i, m) for i, m in own]
    submitted = sorted(entry for scorer in scorers if scorer is not None for entry in scorer.submitted)
    assert submitted == [
        (3 * i + m, f"question {10 + i}", f"answer {m} to {10 + i}", str(i)) for i in range(7) for m in range(3)
    ]
    for first in range(0, world, engine_tp):  # the ranks of a prompt shard make the same calls
        assert all(engine.calls == engines[first].calls for engine in engines[first : first + engine_tp])


def test_a_reward_gets_everything_that_is_known_of_a_completion() -> None:
    scorer = ScriptedScorer()
    prompt = Prompt(7, "<|user|>2+2", (3,), "4", "sums", ({"role": "user", "content": "2+2"},), {"level": 3})

    def special(token_ids: Sequence[int]) -> str:
        return f"{len(token_ids)} tokens<|end|>"

    sampler = Sampler(
        cast("Engine", ScriptedEngine()), scorer, one_rank().collectives, PhaseTimer(), None, special_text_of=special
    )
    sampler.sample([prompt], replace(REQUEST, group_size=2), SEED_OF)
    assert scorer.rows[1] == ScoringRow(
        "<|user|>2+2",
        "answer 1 to 7",
        "4",
        messages=({"role": "user", "content": "2+2"},),
        completion_with_special_tokens="6 tokens<|end|>",
        fields={"level": 3},
        dataset="sums",
        index=7,
    )


def test_the_prompts_of_a_wave_are_distributed_round_robin() -> None:
    results, engines, _ = sample_on_ranks(Topology(2), 7, per_wave=3)
    dealt = [[indices for indices, _ in engine.calls] for engine in engines]
    assert dealt == [[[10, 12], [13, 15], [16]], [[11], [14], []]]
    assert results[0].table.replica[::3].tolist() == [0, 1, 0, 0, 1, 0, 0]
    # member m has 3 (m + 1) tokens, so a group has 18


def test_data_parallel_ranks_of_a_replica_have_their_own_prompts_and_seeds() -> None:
    """All of them call the engine in every wave, also without prompts."""
    results, engines, _ = sample_on_ranks(Topology(4, engine_dp=2), 7, per_wave=3)
    dealt = [[indices for indices, _ in engine.calls] for engine in engines]
    assert dealt == [[[10], [13], [16]], [[11], [14], []], [[12], [15], []], [[], [], []]]
    assert results[0].table.replica[::3].tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert results[0].table.prompt_shard[::3].tolist() == [0, 1, 2, 0, 1, 2, 0]
    seeds = [[request.seed for _, request in engine.calls] for engine in engines]
    assert len({seed for of_rank in seeds for seed in of_rank}) == 12
    assert seeds[3][2] == derived_seed(*SEED_OF, 2, 3)


def test_without_a_wave_size_all_prompts_enter_together() -> None:
    _, engines, _ = sample_on_ranks(Topology(1), 7, per_wave=None)
    assert [indices for indices, _ in engines[0].calls] == [list(range(10, 17))]


def test_each_wave_and_replica_has_its_own_seed() -> None:
    _, engines, _ = sample_on_ranks(Topology(2), 7, per_wave=3)
    requests = [request for engine in engines for _, request in engine.calls]
    assert len({request.seed for request in requests}) == 6
    assert {(r.group_size, r.temperature, r.max_tokens) for r in requests} == {(3, 0.5, 9)}
    seeds = [[request.seed for _, request in engine.calls] for engine in engines]
    assert seeds == [[derived_seed("train", 0, 4, wave, replica) for wave in range(3)] for replica in range(2)]


def test_missing_rollouts_of_an_engine_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="19 of 21 rollouts"):
        sample_on_ranks(Topology(1), 7, per_wave=None, lost=2)


def test_a_failure_of_one_engine_is_raised_on_every_rank_and_its_scores_are_dropped() -> None:
    class FailingEngine(ScriptedEngine):
        def generate(self, *arguments: Any) -> None:
            super().generate(*arguments)
            raise KeyError("a request is lost")

    class CountingScorer(ScriptedScorer):
        collected = 0

        def collect(self) -> dict[int, Reward]:
            self.collected += 1
            return super().collect()

    def sample(transfer: RolloutTransfer) -> tuple[str, int]:
        engine = FailingEngine() if transfer.ranks.rank == 1 else ScriptedEngine()
        scorer = CountingScorer()
        sampler = Sampler(cast("Engine", engine), scorer, transfer.collectives, PhaseTimer(), None)
        with pytest.raises(SamplingFailedError) as raised:
            sampler.sample(prompts_of(4), REQUEST, SEED_OF)
        return str(raised.value), scorer.collected

    for rank, (message, collected) in enumerate(on_ranks(Topology(2), sample)):
        assert message.startswith("sampling failed on rank 1: ")
        assert ("KeyError" in message) == (rank == 1)
        assert collected == 1


def test_no_prompts_give_no_rollouts() -> None:
    results, _, _ = sample_on_ranks(Topology(1), 0, per_wave=None)
    assert len(results[0].table) == len(results[0].tokens) == 0


def test_derived_seed_is_the_same_in_every_process_and_fits_31_bits() -> None:
    text = b"('train', 0, 1, 0, 0)"  # Python's hash() would differ between processes
    assert derived_seed("train", 0, 1, 0, 0) == int(hashlib.sha256(text).hexdigest()[:8], 16) // 2 == GOLDEN
    seeds = {derived_seed("train", 0, step, 0, 0) for step in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed("train", 1, 11) != derived_seed("train", 11, 1)


def test_a_rollout_whose_environment_failed_is_not_scored_and_gets_the_floor() -> None:
    floor = Reward(-1.0, {"exact": -1.0}, ("environment",))

    class Failing(ScriptedEngine):
        def generate(
            self,
            prompts: Sequence[Prompt],
            sampling: SamplingRequest,
            on_completion: Callable[[int, int, Completion], None],
        ) -> None:
            def add_failure(local: int, member: int, completion: Completion) -> None:
                failure = "timed out" if member == 1 else None
                on_completion(local, member, replace(completion, failure=failure))

            super().generate(prompts, sampling, add_failure)

    scorer = ScriptedScorer()
    sampler = Sampler(
        cast("Engine", Failing()), scorer, one_rank().collectives, PhaseTimer(), None, ["exact"], lambda dataset: floor
    )
    groups = sampler.sample(prompts_of(2), REQUEST, SEED_OF)
    assert groups.table.reward.tolist() == [0.0, -1.0, 0.2, 1.0, -1.0, 1.2]
    assert groups.table.components[:, 0].tolist() == pytest.approx(
        [np.nan, -1, np.nan, np.nan, -1, np.nan], nan_ok=True
    )
    assert groups.table.has_failed.tolist() == [False, True, False] * 2
    assert groups.failures == [(), ("environment",), ()] * 2
    assert sorted(key for key, *_ in scorer.submitted) == [0, 2, 3, 5]


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("ab cd", ((1, 0.5), (4, 1.0)), ((1, 0.5), (5, 1.0))),  # the last step ends with EOS
        ("ab cd", ((0, 0.5), (99, 1.0)), ((0, 0.5), (5, 1.0))),
        ("a\u00e9b", ((1, 0.5),), ((2, 0.5),)),  # two tokens spell one character
        ("", ((0, 0.5),), ((0, 0.5),)),
    ],
)
def test_the_end_token_of_a_step_contains_its_last_character(
    text: str, steps: tuple[tuple[int, float], ...], expected: tuple[tuple[int, float], ...]
) -> None:
    tokenizer = byte_tokenizer()
    ids = (*tokenizer.encode(text), tokenizer.eos_token_id)
    completion = Completion(ids, (0.0,) * len(ids), "eos", 0, text)
    assert locate_step_tokens(Reward(0.0, steps=steps), completion, partial(token_ends, tokenizer)) == expected
    assert locate_step_tokens(Reward(0.0), completion, partial(token_ends, tokenizer)) is None
