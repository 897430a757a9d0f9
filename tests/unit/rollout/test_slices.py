"""Slices of rollouts with and without an environment, with scripted engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from grpo_mega.environments.base import Turn
from grpo_mega.environments.pool import Reply
from grpo_mega.interfaces import Engine
from grpo_mega.rollout.multi_turn import MultiTurnGenerator
from grpo_mega.rollout.open_rollout import OpenRollout
from grpo_mega.rollout.slices import SliceSampler
from grpo_mega.types import Prompt, SamplingRequest
from tests.helpers.scripted_slices import Characters, ScriptedAnswers

REQUEST = SamplingRequest(group_size=2, temperature=1.0, max_tokens=20, seed=1)


class Echo:
    """Environment that replies `[n]` to the n-th answer, and ends the rollout after the second."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[Turn, ...]]] = []
        self.asked_before = self.asked

    def submit(self, key: int, prompt: str, turns: Sequence[Turn], reference: str) -> None:
        self.asked.append((key, tuple(turns)))

    def collect(self) -> dict[int, Reply]:
        found = {key: Reply(f"[{len(turns)}]" if len(turns) < 2 else None) for key, turns in self.asked}
        self.asked_before, self.asked = self.asked, []
        return found


def sampler(
    engine: ScriptedAnswers, slice_tokens: int, environment: Echo | None = None, max_running: int = 8
) -> SliceSampler:
    dialogue = None
    if environment is not None:
        dialogue = MultiTurnGenerator(
            cast("Engine", engine), environment, Characters(), stop=("!?",), max_turns=3, broadcast=lambda value: value
        )
    return SliceSampler(cast("Engine", engine), slice_tokens, max_running, Characters().decode, dialogue)


def rollouts_of(*indices: int) -> list[OpenRollout]:
    return [OpenRollout(Prompt(i, f"q{i}", (5,), "")) for i in indices]


def test_a_rollout_is_complete_at_eos_or_at_the_limit_of_all_tokens() -> None:
    engine, rollouts = ScriptedAnswers("abcdefg", "x" * 30), rollouts_of(0, 1)
    slices = sampler(engine, 6)
    states = []
    for _ in range(4):
        slices.sample([rollout for rollout in rollouts if not rollout.is_done], REQUEST)
        states.append([(rollout.num_tokens, rollout.is_done) for rollout in rollouts])
    assert states == [
        [(6, False), (6, False)],
        [(7, True), (12, False)],
        [(7, True), (18, False)],
        [(7, True), (20, True)],
    ]
    assert [rollout.stop_reason for rollout in rollouts] == ["eos", "length"]
    assert [request.max_tokens_each for request in engine.requests] == [(6, 6), (6, 6), (6,), (2,)]
    assert {request.group_size for request in engine.requests} == {1}


def test_only_as_many_rollouts_run_as_the_engine_holds() -> None:
    rollouts = rollouts_of(0, 0, 0)
    sampler(ScriptedAnswers("abcd"), 2, max_running=2).sample(rollouts, REQUEST)
    assert [rollout.num_tokens for rollout in rollouts] == [2, 2, 0]


@pytest.mark.parametrize("slice_tokens", [1, 2, 3, 4, 5, 19])
def test_turns_do_not_depend_on_the_slices(slice_tokens: int) -> None:
    """The stop text has two tokens; with slices of one token it always lies across a seam."""
    whole = "ab!?[1]cd"
    environment, rollouts = Echo(), rollouts_of(0)
    slices = sampler(ScriptedAnswers(whole), slice_tokens, environment)
    for _ in range(20):
        if not rollouts[0].is_done:
            slices.sample(rollouts, REQUEST)
    (rollout,) = rollouts
    assert rollout.is_done
    found = rollout.completion(Characters().decode)
    assert (found.text, found.num_turns, found.stop_reason) == (whole, 2, "eos")
    assert rollout.turns == [Turn("ab!?", "[1]", "!?"), Turn("cd")]
    assert found.loss_mask is not None
    assert found.loss_mask.tolist() == [c not in "[1]" for c in whole]


def test_a_reply_without_room_for_an_answer_truncates_the_rollout() -> None:
    rollouts = rollouts_of(0)
    slices = sampler(ScriptedAnswers("ab!?[1]cd"), 3, Echo())
    request = SamplingRequest(2, 1.0, max_tokens=7, seed=1)
    for _ in range(2):
        slices.sample(rollouts, request)
    assert (rollouts[0].is_done, rollouts[0].stop_reason, rollouts[0].num_tokens) == (True, "length", 4)


@pytest.mark.parametrize("by_slices", [True, False])
def test_a_call_that_fails_leaves_no_reply_for_the_next_one(by_slices: bool) -> None:
    class Failing(ScriptedAnswers):
        def generate(self, *arguments: Any) -> None:
            super().generate(*arguments)
            raise RuntimeError("the engine is gone")

    environment, rollouts = Echo(), rollouts_of(0)
    slices = sampler(Failing("ab!?[1]cd"), 9, environment)
    dialogue = slices.dialogue
    assert dialogue is not None

    def sample() -> None:
        if by_slices:
            slices.sample(rollouts, REQUEST)
        else:
            dialogue.generate([rollouts[0].prompt], REQUEST)

    with pytest.raises(RuntimeError, match="the engine is gone"):
        sample()
    assert environment.asked == []
    assert environment.asked_before == [(0, (Turn("ab!?", stop_text="!?"),))]
