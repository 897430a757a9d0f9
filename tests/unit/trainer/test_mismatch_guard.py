"""The largest difference between policy and engine, by hand, and the bound that stops a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from grpo_mega.config.schema import Config
from grpo_mega.trainer.mismatch_guard import (
    EngineMismatchError,
    MismatchGuard,
    TokenMismatch,
    largest_mismatch,
    with_known,
)
from grpo_mega.types import Completion, Prompt, Reward, Rollout


def rollout(log_probs: list[float], mask: tuple[bool, ...] | None = None, version: int = 4) -> Rollout:
    completion = Completion(tuple(range(len(log_probs))), tuple(log_probs), "eos", version, "", loss_mask=mask)
    return Rollout(Prompt(7, "", (0,), ""), completion, Reward(0.0), 0)


UNLIKELY = math.log(1e-3)


def test_the_largest_difference_of_likely_tokens_by_hand() -> None:
    rollouts = [rollout([-1.0, UNLIKELY - 1]), rollout([-0.5, -2.0, -9.0])]
    old = [[-1.25, UNLIKELY - 3], [-0.5, -2.75, -20.0]]  # the differences of unlikely tokens are 2 and 11
    assert largest_mismatch(rollouts, old) == TokenMismatch(0.75, 1, 1, -2.75, -2.0)


@pytest.mark.parametrize(("old", "sampled"), [(-1.0, -30.0), (-30.0, -1.0)])
def test_a_token_that_only_one_side_finds_likely_counts(old: float, sampled: float) -> None:
    found = largest_mismatch([rollout([sampled])], [[old]])
    assert found is not None
    assert found.size == 29.0


def test_unlikely_tokens_alone_give_no_result() -> None:
    assert largest_mismatch([rollout([UNLIKELY, -8.0])], [[UNLIKELY, -30.0]]) is None


def test_tokens_without_loss_do_not_count() -> None:
    found = largest_mismatch([rollout([-1.0, -9.0, -2.0], (True, False, True))], [[-1.0, -2.5]])
    assert found == TokenMismatch(0.5, 0, 1, -2.5, -2.0)


def test_a_log_prob_that_is_not_a_number_is_an_infinite_difference() -> None:
    found = largest_mismatch([rollout([-1.0, -1.0])], [[math.nan, -3.0]])
    assert found is not None
    assert found.size == math.inf
    with pytest.raises(EngineMismatchError):
        MismatchGuard(1e9, "").check(1, [rollout([-1.0])], [[math.nan]], "")


def test_rollouts_whose_log_probs_before_the_update_are_not_known_do_not_count() -> None:
    first, second = rollout([-1.0]), rollout([-2.0])
    assert with_known([first, second], [None, [-2.5]]) == ([second], [[-2.5]])
    with pytest.raises(EngineMismatchError, match="differ by 0"):
        MismatchGuard(0.1, "").check(1, *with_known([first, second], [None, [-2.5]]), "")


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
    assert MismatchGuard.of(config(**sections), has_experts=has_experts).bound == bound


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
        guard.check(1, [rollout([-1.0] * tokens)], [old], "")
        return
    with pytest.raises(EngineMismatchError, match=f"{beyond} of {tokens} tokens"):
        guard.check(1, [rollout([-1.0] * tokens)], [old], "")


def test_a_token_far_beyond_the_bound_stops_with_what_the_user_needs() -> None:
    guard = MismatchGuard(0.5, "guard.max_mismatch=auto with precision.dtype=bf16")
    rollouts = [rollout([-1.0]), rollout([-1.0, -2.0], mask=(False, True))]
    guard.check(3, rollouts, [[-3.0], [-2.0]], "everything")  # one token, four times the bound
    with pytest.raises(EngineMismatchError) as raised:
        guard.check(3, rollouts, [[-3.25], [-2.0]], "the digests were equal")
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


def test_without_a_bound_nothing_is_checked() -> None:
    MismatchGuard(None, "").check(1, [rollout([-1.0])], [[math.nan]], "")


def test_equal_rollouts_of_a_prompt_count_once() -> None:
    """16 equal rollouts have the same rounding; rollouts that differ before the token count each."""
    guard = MismatchGuard(0.5, "")
    guard.check(1, [rollout([-1.0])] * 16, [[-1.75]] * 16, "")
    different = [rollout([-1.0, -1.0], mask=(False, True)) for _ in range(3)]
    for k, each in enumerate(different):
        object.__setattr__(each.completion, "token_ids", (k, 9))
    with pytest.raises(EngineMismatchError, match="3 of 3 tokens"):
        guard.check(1, different, [[-1.75]] * 3, "")
    right = [rollout([-1.0] * 400)] * 10  # 4,000 tokens, of which 400 are distinct
    with pytest.raises(EngineMismatchError, match="3 of 403 tokens"):
        guard.check(1, [*right, *different], [*[[-1.0] * 400] * 10, *[[-1.75]] * 3], "")
