"""grpo_mega.engines.output_checks: every fault of a completion is named, before anything reads the completion."""

from __future__ import annotations

import math
from collections.abc import Generator

import pytest

from grpo_mega.engines.output_checks import InvalidCompletionError, OutputLimits
from grpo_mega.engines.request_checks import in_groups
from grpo_mega.types import Completion, Prompt, SamplingRequest

LIMITS = OutputLimits("vLLM", vocab_size=100, policy_version=4)
PROMPTS = [Prompt(17, "", (1, 2), ""), Prompt(23, "", (1,), "")]
REQUEST = SamplingRequest(1, 1.0, 3, seed=0)


def completion(
    tokens: tuple[int, ...] = (5, 99), log_probs: tuple[float, ...] = (-0.5, 0.0), version: int = 4
) -> Completion:
    return Completion(tokens, log_probs, "eos", version, "")


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (completion((5, 100)), "token 1 is 100, which is not below the vocabulary size 100"),
        (completion((-1, 5)), "token 0 is -1"),
        (completion(log_probs=(-0.5, math.nan)), "the log-prob of token 1 is nan"),
        (completion(log_probs=(-math.inf, -0.5)), "the log-prob of token 0 is -inf"),
        (completion(log_probs=(-0.5, 0.5)), "the log-prob of token 1 is 0.5"),
        (completion((), ()), "it has 0 tokens, and 1 to 3 were asked for"),
        (completion((1, 2, 3, 4), (-1.0,) * 4), "it has 4 tokens, and 1 to 3 were asked for"),
        (completion(version=3), "weights of version 3 sampled it, and the last sync brought version 4"),
    ],
)
def test_a_completion_that_cannot_be_right_is_an_error_with_engine_prompt_and_fault(
    wrong: Completion, fault: str
) -> None:
    seen: list[int] = []
    closed: list[bool] = []

    def rollouts() -> Generator[tuple[int, int, Completion], None, None]:
        try:
            yield 0, 0, completion()
            yield 1, 0, wrong
        finally:
            closed.append(True)

    with pytest.raises(InvalidCompletionError) as raised:
        in_groups(rollouts(), PROMPTS, REQUEST, LIMITS, lambda position, member, _: seen.append(position))
    message = str(raised.value)
    assert message.startswith("vLLM returned an invalid completion (member 0 of the group of prompt 23): ")
    assert fault in message
    assert message.endswith("remove engine.args, or try the other engine.kind")
    assert seen == [0]  # no reward sees the wrong one
    assert closed == [True]


def test_completions_at_the_limits_are_accepted() -> None:
    good = [completion((0, 99, 99), (-1e30, 0.0, 5e-4)), completion((99,), (0.0,))]
    rollouts = ((position, 0, each) for position, each in enumerate(good))
    assert in_groups(rollouts, PROMPTS, REQUEST, LIMITS, None) == [[good[0]], [good[1]]]
