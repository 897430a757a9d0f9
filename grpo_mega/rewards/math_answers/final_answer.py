r"""Find the final answer in a completion or a reference.

A text's final answer is its last box. Boxes that only a comma, `or` or `and` separates are one list. All patterns take
linear time in the length of the text.
"""

from __future__ import annotations

import re

_MARKER = "####"
_TAIL_CHARACTERS = 1000
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{?)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX_WITHOUT_BRACES = re.compile(r"[^\n$]*")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&/]|\\[(),;:!\[\] ]|\\q?quad|\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\}"
    r"|\b(?:or|and|maybe|possibly|perhaps)\b)*",
    re.IGNORECASE,
)
_FORMULA = r"\$\$.*?\$\$|\$[^$]+\$|\\\[.*?\\\]|\\\(.*?\\\)"
_SENTENCE = re.compile(rf"(?:{_FORMULA}|[^\n.!?]|[.!?](?=\S)|(?<=\d)[!?])+", re.DOTALL)
_ANSWER_PHRASE = re.compile(r"\b(?:answer|solution|result)s?\s{0,3}(?:(?:is|are)\b|[:=])(?:\s*:)?", re.IGNORECASE)
_NUMBER = (
    r"(?<![\w^.\\])(?:[-+\u2212]\s?)?\\?[$\u20ac\u00a3]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?\s?(?:\\?%)?(?![\w^!?/])"
)
_VALUE = re.compile(rf"{_FORMULA}|{_NUMBER}", re.DOTALL)
_HEDGE = re.compile(
    r"[\s,;/&]*(?:\b(?:or|and|to|maybe|possibly|perhaps|either)\b[\s,;]*)*[-\u2013/]?\s*", re.IGNORECASE
)
_NEGATION = re.compile(
    r"\b(?:not|never|neither|wrong|incorrect|cannot|unless|except|about|approximately|around|roughly|almost|nearly"
    r"|between|(?:more|less|fewer|greater) than|at (?:least|most))\b|n't\b",
    re.IGNORECASE,
)
_MAX_SENTENCES = 4  # at the end of a text, in which a value is searched
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n])\s*", re.DOTALL)
_DECORATION = " \t\r\n*_`:"


def boxed_answer(text: str) -> str | None:
    """Return the content of the last box, or of the last boxes if they form one list; None without a box.

    A last box that is not closed is an empty answer. So is one with a superfluous `}` behind it in its line: its braces
    are not those that were meant.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    answers: list[str] = []
    start = len(text)
    for box_start, box_end, content in reversed(boxes):
        if answers and _BETWEEN_BOXES.fullmatch(text, box_end, start) is None:
            break
        if content is None or (start == len(text) and _closes_too_much(text, box_start, box_end)):
            return ""
        start = box_start
        if content not in answers:
            answers.insert(0, content)
    return answers[0] if len(answers) == 1 else " ; ".join(answers)


def _boxes(text: str) -> list[tuple[int, int, str | None]]:
    """Return start, end and content of each outermost box; the content of an unclosed one is None."""
    boxes: list[tuple[int, int, str | None]] = []
    position = 0
    while (match := _BOX.search(text, position)) is not None:
        if match[1]:
            end = _closing_brace(text, match.end())
            content = None if end is None else text[match.end() : end]
            position = len(text) if end is None else end + 1
        else:
            line = _BOX_WITHOUT_BRACES.match(text, match.end())
            assert line is not None
            content, position = line.group().strip().rstrip("."), line.end()
        boxes.append((match.start(), position, None if content is None else _without_inner_boxes(content).strip()))
    return boxes


def _closes_too_much(text: str, start: int, end: int) -> bool:
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    depth = 0
    for match in _BRACE.finditer(text, line_start, len(text) if line_end < 0 else line_end):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth < 0 and match.start() < end:
            depth = 0  # before the box
    return depth < 0


def _closing_brace(text: str, position: int) -> int | None:
    depth = 1
    for match in _BRACE.finditer(text, position):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _without_inner_boxes(content: str) -> str:
    return _BOX.sub(lambda match: match[1], content)


def marked_answer(text: str) -> str | None:
    """Return the line behind the last `####`; None when there is no marker or nothing behind it."""
    _, marker, rest = text.rpartition(_MARKER)
    line = rest.lstrip().partition("\n")[0].strip(_DECORATION) if marker else ""
    return line or None


def answer_in_prose(text: str) -> str | None:
    """Return the answer of a text without a box: `#### x`, "the answer is x", or the last value of the text.

    The last value is a formula or a number. Values that `or`, `and` or a comma joins are returned together.
    """
    marked = marked_answer(text)
    if marked is not None:
        return marked
    tail = text[-_TAIL_CHARACTERS:]
    phrases = list(_ANSWER_PHRASE.finditer(tail))
    if phrases:
        rest = tail[phrases[-1].end() :].lstrip(_DECORATION)
        sentence = _SENTENCE.match(rest)
        if sentence is None:
            return None
        has_value_first = _VALUE.match(sentence.group()) is not None
        last = None if has_value_first else _last_values(sentence.group())
        return last or sentence.group().strip(_DECORATION)
    sentences = [match.group() for match in _SENTENCE.finditer(tail) if match.group().strip()]
    for sentence_text in reversed(sentences[-_MAX_SENTENCES:]):
        if _VALUE.search(sentence_text) is not None:
            return _last_values(sentence_text)
    return None


def _last_values(sentence: str) -> str | None:
    """Return the last value of a sentence, with the values joined to it; None for a negated or vague sentence."""
    values = list(_VALUE.finditer(sentence))
    if not values or _NEGATION.search(sentence) is not None:
        return None
    first = len(values) - 1
    while first and _HEDGE.fullmatch(sentence, values[first - 1].end(), values[first].start()):
        first -= 1
    return sentence[values[first].start() : values[-1].end()]


def sentence_tails(text: str, length: int) -> list[str]:
    """Return the ends of a text that begin with a sentence and are about `length` characters long, shortest first."""
    longest = 2 * length + 80
    tail = text[-longest:].rstrip()
    starts = [match.end() for match in _SENTENCE_START.finditer(tail) if match.start() or len(text) <= longest]
    return [tail[start:] for start in reversed(starts) if 2 * len(tail[start:]) >= length][:20]
