"""Find the statements of a text that are its final answer, from the first of several sources that the text contains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from grpo_mega.rewards.final_answers.alternatives import offers_other_value_behind
from grpo_mega.rewards.final_answers.answer_boxes import BOXED_START
from grpo_mega.rewards.final_answers.box_context import BoxedAnswer, boxed_answers
from grpo_mega.rewards.final_answers.hedges import (
    are_adjacent,
    has_hedge_around,
    is_denied_before,
    is_denied_behind,
    is_retraction,
)
from grpo_mega.rewards.final_answers.markers import DECORATION, MARKER, MarkedLine, marked_lines
from grpo_mega.rewards.final_answers.statements import (
    Readings,
    begins_with_value,
    last_statements,
    phrase_statements,
    result_statements,
    statements_behind,
    tagged_statement,
    tagged_values,
    value_stated_before,
)

Source = Literal["boxes", "markers", "tags", "phrases", "results", "sentences"]
"""Where an answer may stand: `\\boxed{x}`, `#### x`, `<answer>x</answer>`, "the answer is x", "the result is x", the
end of the text."""


_READERS: dict[str, Callable[[str], list[Readings] | None]] = {
    "tags": tagged_statement,
    "phrases": phrase_statements,
    "results": result_statements,
    "sentences": last_statements,
}


@dataclass(frozen=True)
class FinalAnswer:
    """The statements of a final answer: all must be right, or together name the values of the reference.

    boxes and lines are those of the sources `boxes` and `markers`; readings are the other statements, also those that
    contradict a box or a line behind it. `is_vague`: words around the statements offer an alternative or deny them.
    """

    source: Source
    boxes: tuple[BoxedAnswer, ...] = ()
    lines: tuple[MarkedLine, ...] = ()
    readings: tuple[Readings, ...] = ()
    is_vague: bool = False


def find_final_answer(
    text: str, sources: Sequence[Source], *, boxes_may_be_retracted: bool, prompt: str = ""
) -> FinalAnswer | None:
    """Return the final answer from the first of `sources` that the text contains; None if it contains none.

    Args:
        text: a completion without its thoughts and without what it strikes out (`visible_answer`).
        sources: in the order of their priority.
        boxes_may_be_retracted: a box before words like "no, wait" is no statement if another box follows.
        prompt: numbers of the prompt may be repeated behind the answer.
    """
    for source in sources:
        found = _find(text, source, boxes_may_be_retracted, prompt)
        if found is not None:
            return found
    return None


def _find(text: str, source: Source, boxes_may_be_retracted: bool, prompt: str) -> FinalAnswer | None:
    if source == "boxes":
        return _boxes(text, boxes_may_be_retracted, prompt)
    if source == "markers":
        return _lines(text, prompt)
    readings = _READERS[source](text)
    if readings is None:
        return None
    return FinalAnswer(source, readings=tuple(readings), is_vague=not readings)


def _boxes(text: str, may_be_retracted: bool, prompt: str) -> FinalAnswer | None:
    boxes = boxed_answers(text, may_be_retracted=may_be_retracted)
    if not boxes:
        return None
    start, end = boxes[0].start, boxes[-1].end
    behind = [*_marked_values(text), *statements_behind(text, end)]
    stated = value_stated_before(text, start)
    behind += [(value,) for value in (*tagged_values(text), *(() if stated is None else (stated,)))]
    is_vague = has_hedge_around(text, start, end) or is_denied_behind(text, end)
    is_vague = is_vague or offers_other_value_behind(text, end, [box.text for box in boxes], prompt)
    return FinalAnswer("boxes", boxes=tuple(boxes), readings=tuple(behind), is_vague=is_vague)


def _lines(text: str, prompt: str) -> FinalAnswer | None:
    lines = marked_lines(text)
    if not lines:
        return None
    first = len(lines) - 1
    while first and not is_retraction(text[lines[first - 1].end : lines[first].start]):
        first -= 1
    lines = lines[first:]
    boxes = _boxes_next_to(text, lines)
    start, end = min(lines[0].start, *(b.start for b in boxes), len(text)), lines[-1].end
    end = max(end, *(box.end for box in boxes), 0)
    behind = statements_behind(text, end)
    is_vague = has_hedge_around(text, start, end) or is_denied_behind(text, end)
    is_vague = is_vague or any(is_denied_before(text, line.start) for line in lines)
    is_vague = is_vague or offers_other_value_behind(text, end, [line.text for line in lines], prompt)
    return FinalAnswer("markers", tuple(boxes), tuple(lines), tuple(behind), is_vague)


def _marked_values(text: str) -> list[Readings]:
    """Return the marked lines without a box, if they begin with a value."""
    if MARKER not in text:
        return []
    lines = [line for line in marked_lines(text) if BOXED_START not in text[line.start : line.end]]
    return [(line.text.strip(DECORATION),) for line in lines if begins_with_value(line.text.strip(DECORATION))]


def _boxes_next_to(text: str, lines: Sequence[MarkedLine]) -> list[BoxedAnswer]:
    """Return the boxes that only the words of a list separate from the marked lines."""
    outside = [
        box
        for box in boxed_answers(text, may_be_retracted=False)
        if not any(line.start <= box.start < line.end for line in lines)
    ]
    before = [box for box in outside if box.start < lines[0].start]
    behind = [box for box in outside if box.start >= lines[-1].end]
    found: list[BoxedAnswer] = []
    start, end = lines[0].start, lines[-1].end
    while before and are_adjacent(text, before[-1].end, start):
        start = before[-1].start
        found.insert(0, before.pop())
    while behind and are_adjacent(text, end, behind[0].start):
        end = behind[0].end
        found.append(behind.pop(0))
    return found
