"""grpo_mega.rollout.answer_times: with a clock that is set by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from grpo_mega.environments.pool import ReplyErrors
from grpo_mega.observe.engine_gauges import EngineGauges
from grpo_mega.rollout.answer_times import AnswerSeconds, AnswerTimes, MeasuredGenerator
from grpo_mega.types import Completion, Prompt, SamplingRequest

REQUEST = SamplingRequest(group_size=10, temperature=1.0, max_tokens=8, seed=0)
PROMPT = Prompt(0, "p", (1,), "a")


class TimedGenerator:
    """Finishes its rollouts at the given times, then returns."""

    def __init__(self, ends: Sequence[float], last: float) -> None:
        self.now, self._ends, self._last = 0.0, ends, last

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        start, answer = self.now, Completion((1,), (-1.0,), "eos", 0, "x")
        assert on_completion is not None
        for member, end in enumerate(self._ends):
            self.now = start + end
            on_completion(0, member, answer)
        self.now = start + self._last
        return [[answer] * len(self._ends)]


@pytest.mark.parametrize(
    ("ends", "last", "expected"),
    [
        ([1, 2, 2, 3, 3, 4, 4, 4, 5, 10], 10.0, 5.0),  # one of ten is left from 5 to 10
        ([*[1.0] * 18, 6, 9], 9.0, 8.0),  # two of twenty
        ([2.0], 2.0, 2.0),  # a single rollout is the longest one all the time
        ([], 7.0, 7.0),  # no prompts: the rank waits for the others
    ],
)
def test_the_last_tenth_is_waited_for(ends: list[float], last: float, expected: float) -> None:
    generator = TimedGenerator(ends, last)
    times = AnswerTimes(lambda: True, clock=lambda: generator.now)
    seen: list[int] = []
    measured = MeasuredGenerator(generator, times)
    for _ in range(2):
        groups = measured.generate([PROMPT], REQUEST, lambda prompt, member, completion: seen.append(member))
    assert len(groups[0]) == len(ends)
    assert seen == [*range(len(ends))] * 2
    assert times.take() == AnswerSeconds(2 * last, 2 * expected)
    assert times.take() == AnswerSeconds()


class FailingEnvironments:
    """Environment workers with one error per call."""

    def take_errors(self) -> ReplyErrors:
        return ReplyErrors(failures=1, tool_errors=2)


@pytest.mark.parametrize("is_counted", [True, False])
def test_gauges_and_errors_are_summed_and_an_evaluation_does_not_count(is_counted: bool) -> None:
    generator = TimedGenerator([1.0], 1.0)
    times = AnswerTimes(lambda: is_counted, clock=lambda: generator.now)
    measured = MeasuredGenerator(generator, times, lambda: EngineGauges(readings=5), FailingEnvironments())
    for _ in range(2):
        measured.generate([PROMPT], REQUEST)
    calls = 2 if is_counted else 0
    assert times.take_gauges() == (EngineGauges(readings=5 * calls), ReplyErrors(calls, 2 * calls))
    assert times.take_gauges() == (EngineGauges(), ReplyErrors())
    assert times.take() == (AnswerSeconds(2.0, 2.0) if is_counted else AnswerSeconds())
