"""The largest difference between policy and engine, by hand, and the bound that stops a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from grpo_mega.config.schema import Config
from grpo_mega.parallel.topology import Topology
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.mismatch import ComparedTokens, Differences
from grpo_mega.trainer.mismatch_guard import EngineMismatchError, MismatchGuard
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.types import Completion, Prompt, Reward, Rollout
from tests.helpers.thread_ranks import on_ranks
from tests.helpers.token_values import token_values


def rollout(log_probs: list[float], mask: tuple[bool, ...] | None = None, version: int = 4) -> Rollout:
    completion = Completion(tuple(range(len(log_probs))), tuple(log_probs), "eos", version, "", loss_mask=mask)
    return Rollout(Prompt(7, "", (0,), ""), completion, Reward(0.0), 0)


def check(guard: MismatchGuard, step: int, rollouts: list[Rollout], old: Sequence[list[float]], passed: str) -> None:
    """Check rollouts of one prompt on one rank."""
    groups = SampledGroups.of(rollouts, len(rollouts))
    compared = ComparedTokens(Differences.of(groups.tokens, token_values(old)), groups.table)
    guard.check(step, compared, lambda array: array[None], passed)


def test_a_log_prob_that_is_not_a_number_stops_a_run_with_any_bound() -> None:
    with pytest.raises(EngineMismatchError, match="differ by inf nats"):
        check(MismatchGuard(1e9, ""), 1, [rollout([-1.0])], [[math.nan]], "")


def test_ranks_add_their_tokens_and_name_the_worst_of_all() -> None:
    """Two tokens beyond the bound on each of two ranks are too many; each rank alone would not stop."""
    guard = MismatchGuard(0.5, "")
    messages: list[str] = []

    def of_rank(transfer: RolloutTransfer) -> None:
        rank = transfer.ranks.rank
        own = {rank * 2: rollout([-1.0, -1.0, -1.0]), rank * 2 + 1: rollout([-2.0])}
        prompts = [Prompt(20 + i, "", (0,), "") for i in range(2)]
        collectives = transfer.collectives
        groups = SampledGroups.gather(prompts, 2, own, prompt_shard=rank, sum_over_ranks=collectives.sum)
        off = -2.0 - rank / 4
        old = replace(token_values([[off, off, -1.0], [-2.0]]), ids=np.array(sorted(own)))
        with pytest.raises(EngineMismatchError, match="4 of 6 tokens exceed") as raised:
            guard.check(1, ComparedTokens(Differences.of(groups.tokens, old), groups.table), collectives.gather, "")
        messages.append(str(raised.value))

    on_ranks(Topology(2), of_rank)
    assert messages[0] == messages[1]
    assert "token 0 of a rollout of prompt 21 has log-prob -2.2500 in the policy and -1.0000" in messages[0]


def config(**sections: Any) -> Config:
    required: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"train": "arithmetic:train"},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1},
    }
    return Config.model_validate(required | sections)


@pytest.mark.parametrize(
    ("sections", "has_experts", "bound"),
    [
        ({"precision": {"dtype": "fp32"}}, False, 1e-2),
        ({"precision": {"dtype": "bf16"}}, False, 0.5),
        ({"precision": {"dtype": "bf16", "fp8": {"recipe": "blockwise"}}}, False, 2.0),
        ({"precision": {"dtype": "bf16"}, "engine": {"fp8": "scales_fp32"}}, False, 2.0),
        ({"precision": {"dtype": "bf16"}}, True, 2.0),
        ({"precision": {"dtype": "fp32"}}, True, 2.0),
        ({"precision": {"dtype": "bf16"}, "algorithm": {"routing_replay": True}}, True, 0.5),
        ({"guard": {"max_mismatch": 0.25}}, True, 0.25),
        ({"guard": {"max_mismatch": None}}, False, None),
    ],
)
def test_the_bound_depends_on_what_may_differ(sections: dict[str, Any], has_experts: bool, bound: float | None) -> None:
    guard = MismatchGuard.of(config(**sections), has_experts=has_experts)
    assert guard.bound == bound
    assert guard.is_exact == (bound == 1e-2)


@pytest.mark.parametrize("value", [0, -1.0, "off"])
def test_a_bound_must_be_positive(value: Any) -> None:
    with pytest.raises(ValueError, match="max_mismatch"):
        config(guard={"max_mismatch": value})


@pytest.mark.parametrize(
    ("tokens", "beyond", "stops"), [(10, 2, False), (10, 3, True), (4000, 4, False), (4000, 5, True)]
)
def test_a_few_tokens_may_exceed_the_bound(tokens: int, beyond: int, stops: bool) -> None:
    """Two of a small step, one in a thousand of a large one; a difference equal to the bound does not count."""
    guard, old = MismatchGuard(0.5, ""), [-1.75] * beyond + [-1.5] * (tokens - beyond)
    if not stops:
        check(guard, 1, [rollout([-1.0] * tokens)], [old], "")
        return
    with pytest.raises(EngineMismatchError, match=f"{beyond} of {tokens} tokens"):
        check(guard, 1, [rollout([-1.0] * tokens)], [old], "")


def test_a_token_far_beyond_the_bound_stops_with_what_the_user_needs() -> None:
    guard = MismatchGuard(0.5, "guard.max_mismatch=auto with precision.dtype=bf16")
    rollouts = [rollout([-1.0]), rollout([-1.0, -2.0], mask=(False, True))]
    check(guard, 3, rollouts, [[-3.0], [-2.0]], "everything")  # one token, four times the bound
    with pytest.raises(EngineMismatchError) as raised:
        check(guard, 3, rollouts, [[-3.25], [-2.0]], "the digests were equal")
    for part in (
        "step 3",
        "2.25 nats",
        "1 of 2 tokens",
        "more than 0.5",
        "precision.dtype=bf16",
        "prompt 7",
        "version 4",
    ):
        assert part in str(raised.value)
    for part in ("-3.2500", "-1.0000", "the digests were equal", "tools/compare_logits.py", "guard.max_mismatch"):
        assert part in str(raised.value)


def test_in_fp32_one_token_beyond_the_bound_stops() -> None:
    guard = MismatchGuard(0.01, "", is_exact=True)
    check(guard, 1, [rollout([-1.0, -1.0])], [[-1.0078125, -1.0]], "")
    with pytest.raises(EngineMismatchError, match="1 of 2 tokens exceed"):
        check(guard, 2, [rollout([-1.0, -1.0])], [[-1.015625, -1.0]], "")


def test_without_a_bound_nothing_is_checked() -> None:
    check(MismatchGuard(None, ""), 1, [rollout([-1.0])], [[math.nan]], "")


def test_equal_rollouts_of_a_prompt_count_once() -> None:
    """16 equal rollouts have the same rounding; rollouts that differ before the token count each."""
    guard = MismatchGuard(0.5, "")
    check(guard, 1, [rollout([-1.0])] * 16, [[-1.75]] * 16, "")
    different = [rollout([-1.0, -1.0], mask=(False, True)) for _ in range(3)]
    different = [replace(r, completion=replace(r.completion, token_ids=[k, 9])) for k, r in enumerate(different)]
    with pytest.raises(EngineMismatchError, match="3 of 3 tokens"):
        check(guard, 1, different, [[-1.75]] * 3, "")
    right = [rollout([-1.0] * 400)] * 10  # 4,000 tokens, of which 400 are distinct
    with pytest.raises(EngineMismatchError, match="3 of 403 tokens"):
        check(guard, 1, [*right, *different], [*[[-1.0] * 400] * 10, *[[-1.75]] * 3], "")


def stop_of(outliers: Sequence[int], tokens: int = 100) -> tuple[int | None, str]:
    """Return the step that stops and its message; `outliers[k]` tokens of step k + 1 exceed the bound."""
    guard = MismatchGuard(0.5, "")
    for step, beyond in enumerate(outliers, start=1):
        old = [-1.75] * beyond + [-1.0] * (tokens - beyond)
        try:
            check(guard, step, [rollout([-1.0] * tokens)], [old], "")
        except EngineMismatchError as error:
            return step, str(error)
    return None, ""


@pytest.mark.parametrize(
    ("outliers", "stops_at"),
    [
        ([1, 1, 1], 3),
        ([0, 1, 0, 1, 0, 1], 6),  # steps 2, 4 and 6 are among the last five
        ([1, 0, 0, 1, 0, 1], None),
        ([1, 0, 0, 0, 0] * 4, None),
    ],
)
def test_an_outlier_of_rounding_passes_and_one_that_returns_does_not(outliers: list[int], stops_at: int | None) -> None:
    step, message = stop_of(outliers)
    assert step == stops_at
    assert ("3 of the last" in message) == (step is not None)


@pytest.mark.parametrize(("beyond", "stops_at"), [(2, None), (3, 3)])
def test_in_a_large_step_one_token_in_ten_thousand_may_return(beyond: int, stops_at: int | None) -> None:
    assert stop_of([beyond] * 6, tokens=20_000)[0] == stops_at
