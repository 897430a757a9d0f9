r"""Read the boxes of a completion together with the formula around each of them.

`\boxed{5}` is the answer 5, and so is `x = \boxed{5}`. In `-\boxed{5}`, `\boxed{5}^2` and `\frac{1}{\boxed{5}}` the box
is a part of a formula, and the whole formula is the answer. Several boxes are several answers, unless the text between
two of them retracts the earlier ones.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from grpo_mega.rewards.final_answers.alternatives import value_joined_before, value_of_same_name_before
from grpo_mega.rewards.final_answers.answer_boxes import find_boxes
from grpo_mega.rewards.final_answers.hedges import is_retraction
from grpo_mega.rewards.final_answers.words_around import text_before_changes, text_behind_changes
from grpo_mega.rewards.math_answers.tokens import tokenize
from grpo_mega.rewards.math_answers.units import read_unit

_MOST_CHARACTERS = 400  # of a formula before or behind a box
_MOST_PARAGRAPH_CHARACTERS = 2000
_MOST_BOXES = 100
_WINDOW = 100
_DIGITS = re.compile(r"[0-9]{1,30}")
_DELIMITER = re.compile(r"(?<!\\)\$\$?|(?<!\\)\\[()\[\]]")
_ROW_START = re.compile(r"\\\\|\\begin\{[a-z]+\*?\}")
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_FORMULA_END = re.compile(r"(?<!\\)\$|\\[)\]]|\\\\|\n\s*\n|\\end\{|\\(?:boxed|fbox)(?![A-Za-z])")
_PLAIN_BEFORE = re.compile(r"(?:\\[A-Za-z]+|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|[^A-Za-z\\\n]){0,400}\Z")
_PLAIN_BEHIND = re.compile(r"(?:\\[A-Za-z]+|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|[^A-Za-z\\\n$])*")
_LIST_MARK = re.compile(r"\s*(?:[-*+>|]\s+|\(?\w{1,3}[.)]\s+)\Z")
_SPACE_BEFORE = re.compile(r"(?:\s|~|\\[,;:!> ])+\Z")
_COMPLETE_BEFORE = re.compile(
    r"(?:\A|(?<![<>!])(?<!\\not)(?<!\\not\s)=|(?<![\d\\])[:,;.]|(?<!\\)[:,;.](?=\s)|[&`\"]|\*\*|->|=>|\u2192|\u21d2"
    r"|\u2234|\u2248"
    r"|\\(?:approx|simeq|in|equiv|implies|Rightarrow|Longrightarrow|rightarrow|to|iff|therefore|quad|qquad|land"
    r"|displaystyle|large|Large|LARGE|huge|colon)|\\(?:text|mathrm|textbf)\s*\{[^{}]*\})\s*\\?\s*\Z"
)
_LAYOUT_COMMAND = re.compile(
    r"(?:\\(?:text|textbf|mathrm|hspace\*?|vspace\*?|color|textcolor|bbox|begin|phantom)\s*(?:\[[^\[\]]*\]|\{[^{}]*\})"
    r"|\\(?:center|centering|hfill|noindent|par|displaystyle|large|Large|LARGE|huge|Huge))\s*(\{?)\s*\Z"
)
_SPACE_BEHIND = re.compile(
    r"(?:\s|~|[\u200b\u2060\ufeff]|\\[,;:! ])*(?:\\q?quad(?![A-Za-z])(?!\s*[-+]?\d)(?!.*\b(?:otherwise|else)\b).*)?",
    re.DOTALL,
)
_CASES_BEFORE = re.compile(r"\\begin\{[dr]?cases\}(?!.*\\end\{)", re.DOTALL)
_EMPHASIS_BEFORE = re.compile(r"(?:\A|(?<=\s))(\*{1,3}|_{1,3})\Z")
_FORMULA_BEFORE = re.compile(r"(?:\A|\$|\n)\s*(-?\d{1,30})\s*=\s*\$\s*\Z")
_NUMBER_BEFORE = re.compile(r"(?:\A|=)\s*(-?\d{1,30})\s*=\s*\Z")
_COMPLETE_BEHIND = re.compile(
    r"\Z|\(\s*\\text|[,;:?&`\"\u2192](?!\d)|\.(?!\d)|\*\*|->|=>|=\s*\Z"
    r"|[\u2705\u2713\u2714\u2728\U0001f389\U0001f44d\U0001f4af\U0001f60a\U0001f642\U0001f680\u25a0\u220e\u25a1]"
    r"|\\(?:text|mathrm|textbf|textit)\b"
    r"|\\(?:implies|Rightarrow|rightarrow|to|iff)(?![A-Za-z])(?!\s*[-+]?\d)|\\(?:tag|label|qed|end|square|blacksquare"
    r"|Box|checkmark)(?![A-Za-z])"
)
_DASH_BEHIND = re.compile(r"\s+[-\u2013\u2014]\s*\Z|\s*[|)]|\s+\(")
_SCALE_BEHIND = re.compile(
    r"[\s$]*(?:\\text\s*\{)?\s*(hundred|thousand|million|billion|trillion|dozen)\b", re.IGNORECASE
)
_HEDGE_BEHIND = re.compile(
    r"(?:[\s$*)\](\[\\.,]|\\q?quad(?![A-Za-z])|\\[;:!]|\\text\s*\{)*"
    r"(?:\b(?:or|maybe|perhaps|possibly|alternatively|otherwise|else)\b|(?<=\\)(?:lor|vee"
    r"|cup)(?![A-Za-z])),?[^.\n$\d-]{0,20}?(\$[^$]+\$|-?\d[\d.,/]*\d|-?\d)",
    re.IGNORECASE,
)
_UNIT_BEHIND = re.compile(
    r"\s*(?:\\[,;: !]|~)*\s*(\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{[^{}]*\}(?:\s*\^\s*(?:\{-?\d\}|\d))?"
    r"|\\?%|\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?:\s*\\?(?:text|mathrm)\{[CF]\}|\s*[CF]\b)?|\u00b0|\\degree)\s*[.,]?\s*\Z"
)
_WORDS_BEHIND = re.compile(
    r"(?:\\[,;: ]|~|\s|\\q?quad(?![A-Za-z]))*\\(?:text|mathrm|textrm|mbox|textbf)\s*\{([^{}]*)\}"
)
_UNION_BEFORE = re.compile(r"(?:\\(?:cup|lor|vee)|\u222a|\u2228)\s*\Z")
_UNION_BEHIND = re.compile(r"(?:\s|\\[,;: ])*(?:\\(?:cup|lor|vee)(?![A-Za-z])|\u222a|\u2228)")
_LIST_BEHIND = re.compile(
    r"\s*[,;]\s*(?:\\[,;: ]|\s)*[-+]?(?:\d|\\[dt]?frac|\\sqrt|\\pi(?![A-Za-z]))(?:(?!\\[lg]e|\\in|\\ne|[<>=]).)*\Z",
    re.DOTALL,
)
_ANY_TAG = re.compile(r"</?[A-Za-z]\w*\s?/?>")
_TAG = re.compile(r"\s*</?[A-Za-z]\w*>")
_TAG_BEFORE = re.compile(r"<[A-Za-z]\w{0,20}>\s*\Z")
_MODULUS = re.compile(r"\s*(?:\\[,;: ]|\s)*\\pmod(?![A-Za-z])|\s*\(\s*(?:\\bmod|\\mod|mod)\b")
_CHOICE = re.compile(r"\b(?:or|and|nor|plus|minus|times)\b", re.IGNORECASE)
_LAYOUT = re.compile(r"\s*[\"'`*_(\\{\[]*")
_SEPARATED = re.compile(r"(?:\A|[A-Za-z)\]_#|(]|\*\*|\\)\s+\Z")
_COMMAND_BEFORE = re.compile(r"\\[A-Za-z]+\s+\Z")
_CURRENCY_BEFORE = re.compile(r"(?:\A|(?<=[\s=:]))(\\\$|[\u20ac\u00a3])\s*\Z")
_WRAPPER = re.compile(
    r"\\(?:textbf|mathbf|bm|boldsymbol|textit|emph|mathrm|mathit|underline|ensuremath|large|color\s*\{\w+\})\s*\{\s*\Z"
    r"|\\(?:text|mbox|textrm)\s*\{[^{}$]*\Z|(?:\A|[\s=:,])\{\s*\Z"
)
_LABEL = re.compile(r"(?:\A|[\s,&;{(])([A-Za-z](?:_\{?\w{1,4}\}?)?)\s*&?\s*=\s*\Z")
_OPERAND_BEFORE = re.compile(
    r"(?:\b(?:ln|log|lg|sin|cos|tan|cot|sec|csc|exp|sqrt|arc\w+)"
    r"|(?<!only )\b(?:if|suppose|assume|let)\s+\$?[A-Za-z]\s*=)"
    r"[\s$*:({\[]*\Z"
    r"|\b(?:not true that|false that[^.\n]*|between [^.\n]{1,40} and)[\s$*:({\[]*\Z"
    r"|\b(?:if|suppose|assume)\b[^.\n]{0,40}\Z"
    r"|(?:[-+\u2212\u221a^/<\u2260\u2264\u2265]|(?<=[\w)}]\s)>)\s*\$\s*\Z|(?<=[A-Za-z][A-Za-z] )>\s*\Z"
    r"|(?<![\d.\\])\d+\$\s*\Z",
    re.IGNORECASE,
)
_OPERAND_BEHIND = re.compile(
    r"\$+\s?[-+*/^]\s?\$?\d|\$?\s*\|\s*-?\$?\d"
    r"|[\s$*)\]\\.,]*(?:(?:is|are|was|would be|cannot be)\s+(?:not|wrong|false|incorrect)\b|no\s*[,.!]|no wait\b|\?"
    r"|or (?:more|less|greater|fewer|so)\b|(?:plus|minus|times|to|over|divided by)\s+\$?[-\d\\])",
    re.IGNORECASE,
)
_CONGRUENCE = re.compile(r"\\(?:equiv|cong)\b")
_REFUTED_EARLIER = re.compile(
    r"\b(?:that|it)(?:'s|\u2019s|\s+(?:is|was))\s+(?:wrong|incorrect|false|a mistake|an error)\s*:"
    r"|\A[\s$]*\((?:this is |that is )?(?:wrong|incorrect)\)",
    re.IGNORECASE,
)
_EXCLAMATION = re.compile(r"[A-Za-z]{2}[!?]+\s+\Z")  # behind a word; behind a formula it is a factorial
_DENIAL = re.compile(
    r"(?:\b(?:not|never|no|nope|wrong|incorrect|false|could|might|maybe|perhaps|possibly|twice|half)\b|n't\b)"
    r"[^.!?\n]{0,40}[!?]+\s+\Z",
    re.IGNORECASE,
)


class BoxedAnswer(NamedTuple):
    """The statement of a box. start and end: its place in the text.

    text: the content of the box with a unit behind it, or the formula around it; empty if the box is not closed or
        denied.
    label: the name that an equation before it gives (`x = `).
    is_part: the box is a part of a formula, or denied.
    """

    start: int
    end: int
    text: str
    label: str = ""
    is_part: bool = False


def boxed_answers(text: str, *, may_be_retracted: bool = True) -> list[BoxedAnswer]:
    r"""Return what the boxes of a text state.

    With `may_be_retracted`, only the boxes after the last retraction. A box that is not closed, or is denied
    (`not \boxed{5}`), is an empty answer. A formula that "or" joins to a box is another answer.
    """
    boxes = find_boxes(text)
    first = 0
    for k in range(len(boxes) - 1, 0, -1) if may_be_retracted else ():
        if is_retraction(text[boxes[k - 1].end : boxes[k].start]):
            first = k
            break
    if boxes and (boxes[-1].closes_too_much or boxes[-1].content is None or len(boxes) > _MOST_BOXES + first):
        return [BoxedAnswer(boxes[first].start, boxes[-1].end, "", is_part=True)]
    answers: list[BoxedAnswer] = []
    for k in range(first, len(boxes)):
        box = boxes[k]
        start = boxes[k - 1].end if k else 0
        answers.append(read_box(text, start, box.start, box.end, box.content or ""))
        other = value_of_same_name_before(text[start : box.start])
        if other is not None:
            answers.append(BoxedAnswer(box.start, box.start, other))
        hedge = _HEDGE_BEHIND.match(text, box.end, box.end + _MOST_CHARACTERS)
        if hedge is not None and not answers[-1].is_part and _BOX_COMMAND.search(hedge[1]) is None:
            answers.append(BoxedAnswer(hedge.start(1), hedge.end(1), hedge[1]))
    return answers


def read_box(text: str, previous_end: int, start: int, end: int, content: str) -> BoxedAnswer:
    """Return what a box states together with the text around it.

    Args:
        text: contains the box.
        previous_end: end of the box before it, or 0.
        start: first position of the box.
        end: first position behind the box.
        content: what the box contains.
    """
    answer = BoxedAnswer(start, end, content)
    nothing = answer._replace(text="", is_part=True)
    window, behind_window = text[max(previous_end, start - _WINDOW) : start], text[end : end + _WINDOW]
    if _OPERAND_BEFORE.search(window) is not None or _OPERAND_BEHIND.match(behind_window) is not None:
        return nothing
    scale = _SCALE_BEHIND.match(behind_window)
    if scale is not None:
        return answer._replace(text=f"{content} {scale[1]}")
    around = _surroundings(text, previous_end, start, end)
    if _words_change(text, previous_end, around, content):
        return nothing
    joined = value_joined_before(window)
    if joined is not None:
        return answer._replace(text=f"{joined} and {content}", is_part=True)
    before, behind = _without_wrapper(around.before, around.behind, may_have_emphasis=not around.is_formula)
    is_formula = around.is_formula
    if is_formula and "=" not in before and _CASES_BEFORE.search(text[around.start : start]) is not None:
        return nothing
    currency = _CURRENCY_BEFORE.search(before)
    if currency is not None:
        before, content = before[: currency.start(1)], currency[1] + content
        answer = answer._replace(text=content)
    label = _LABEL.search(before)
    answer = answer._replace(label=label[1] if label is not None else "")
    trimmed = _SPACE_BEFORE.sub("", before)
    is_complete = _COMPLETE_BEFORE.search(trimmed) is not None or _COMPLETE_BEFORE.search(before) is not None
    if not is_formula and not is_complete:
        follows_word = _EXCLAMATION.search(window) is not None
        is_denied = not previous_end and _DENIAL.search(window) is not None  # after a box, it is that box
        is_complete = (follows_word and not is_denied) or _is_separate(before)
    has_left = not is_complete
    is_other_root = label is not None and _UNION_BEFORE.search(before[: label.start() + 1]) is not None
    has_left = has_left or is_other_root  # x = 3 \lor x = \boxed{4}
    if _MODULUS.match(behind) is not None and not has_left:
        return answer if _CONGRUENCE.search(before) is not None else answer._replace(text=f"{content} {behind}")
    unit = _UNIT_BEHIND.match(behind)
    if unit is not None and not has_left:
        return _with_text_behind(answer, unit[1])
    equal = _NUMBER_BEFORE.search(before) if is_formula else _FORMULA_BEFORE.search(window)
    if equal is not None:
        return answer._replace(text=f"{equal[1]} = {content}")  # 5 = \boxed{4}
    if is_formula and _LIST_BEHIND.match(behind) is not None:
        return answer._replace(text=f"{content} {behind}", is_part=True)  # \boxed{4}, 5
    words = _WORDS_BEHIND.match(behind)
    if words is not None and (_CHOICE.search(words[1]) or words[1].endswith("of ")) and behind[words.end() :].strip():
        return answer._replace(text=f"{content} {behind}")  # \boxed{5} \text{ or } 6
    space = _SPACE_BEHIND.match(behind)
    has_right = _COMPLETE_BEHIND.match(behind, space.end() if space is not None else 0) is None
    if not is_formula and _DASH_BEHIND.match(behind) is not None:
        has_right = False
    if not (has_left or has_right):
        return answer
    if (before[-1:].isdigit() and has_left) or (has_right and re.match(r"\.?\d", behind)):
        return answer._replace(text="", is_part=True)  # 1\boxed{5}, \boxed{5}.5
    is_joined = (
        is_other_root or (has_left and _UNION_BEFORE.search(before)) or (has_right and _UNION_BEHIND.match(behind))
    )
    inner = content if is_joined else f"({content})"
    formula = f"{before if has_left else ''}{inner}{behind if has_right else ''}"
    return answer._replace(text=formula.strip(), label="", is_part=True)


def _with_text_behind(answer: BoxedAnswer, behind: str) -> BoxedAnswer:
    r"""Return an answer with a `\text{...}` behind it: a unit or another value belongs to it, a denial voids it."""
    if read_unit(tokenize(behind)) is not None or _CHOICE.search(behind) is not None:
        return answer._replace(text=f"{answer.text} {behind}")
    words = _WORDS_BEHIND.match(behind)
    if words is not None and text_behind_changes(f" {words[1].strip()}", None):
        return answer._replace(text="", label="", is_part=True)
    return answer


class _Surroundings(NamedTuple):
    """The parts of a formula before and behind a box, and the text outside of the formula.

    start and end: where the text outside ends and begins again. is_formula: delimiters enclose the formula.
    """

    before: str
    behind: str
    start: int
    end: int
    is_formula: bool


def _surroundings(text: str, previous_end: int, start: int, end: int) -> _Surroundings:
    behind_window = text[end : end + _MOST_CHARACTERS]
    opening = _formula_start(text, start)
    if opening is not None:
        ending = _FORMULA_END.search(behind_window)
        behind = behind_window if ending is None else behind_window[: ending.start()]
        before = text[max(opening, previous_end, start - _MOST_CHARACTERS) : start]
        return _Surroundings(_ROW_START.split(before)[-1], behind, opening, end + len(behind), True)
    tag = _TAG.match(behind_window)
    behind_window = behind_window if tag is None else ""
    window = _LAYOUT_COMMAND.sub(r"\1", text[max(previous_end, start - _MOST_CHARACTERS) : start])
    before_match = _PLAIN_BEFORE.search(window)
    follows_tag = _TAG_BEFORE.search(text, max(0, start - 40), start) is not None
    before = "" if before_match is None or follows_tag else before_match.group().rpartition("$")[2]
    behind_match = _PLAIN_BEHIND.match(_BOX_COMMAND.split(behind_window)[0])
    behind = "" if behind_match is None else behind_match.group()
    return _Surroundings("" if _LIST_MARK.fullmatch(before) is not None else before, behind, start, end, False)


def _words_change(text: str, previous_end: int, around: _Surroundings, content: str) -> bool:
    """Return True if the words around a box, or around the formula that consists of a box, change what it names."""
    value = Fraction(content) if _DIGITS.fullmatch(content) else None
    is_whole_before = not around.is_formula or not _SPACE_BEFORE.sub("", around.before)
    before = _ANY_TAG.sub(" ", text[max(previous_end, around.start - _WINDOW) : around.start])
    if previous_end:
        before = _REFUTED_EARLIER.sub(".", before)  # \boxed{4}. No, that is wrong: \boxed{5}
    if is_whole_before and text_before_changes(before, value, strict=False):
        return True
    is_whole_behind = not around.is_formula or not around.behind.strip(" .,")
    behind = text[around.end : around.end + _WINDOW]
    if not is_whole_behind or _HEDGE_BEHIND.match(behind) is not None:
        return False
    own, *others = _BOX_COMMAND.split(_ANY_TAG.sub(" ", behind), maxsplit=1)
    return text_behind_changes(f"{own}box" if others else own, value)


def _formula_start(text: str, position: int) -> int | None:
    """Return where the formula that contains a position begins; None outside of a formula."""
    paragraph = max(text.rfind("\n\n", 0, position), position - _MOST_PARAGRAPH_CHARACTERS, 0)
    opening, mark = None, ""
    for match in _DELIMITER.finditer(text, paragraph, position):
        if opening is None and match.group() not in ("\\]", "\\)"):
            opening, mark = match.end(), match.group()
        elif opening is not None and match.group() in (mark, {"\\[": "\\]", "\\(": "\\)"}.get(mark)):
            opening = None
    return opening


def _is_separate(before: str) -> bool:
    """Return True when layout, or a letter or bracket with white space behind it, is before a box in plain text."""
    if _LAYOUT.fullmatch(before) is not None:
        return True
    return _SEPARATED.search(before) is not None and _COMMAND_BEFORE.search(before) is None


def _without_wrapper(before: str, behind: str, *, may_have_emphasis: bool) -> tuple[str, str]:
    r"""Remove commands that enclose the box and have no meaning, like `\textbf{`."""
    if before.strip() == "(" and behind.lstrip().startswith(")"):
        return "", behind.lstrip()[1:]
    for _ in range(4):
        before = _LAYOUT_COMMAND.sub(r"\1", before)
        wrapper = _WRAPPER.search(before)
        closing = re.match(r"[^{}$\\]*\}" if wrapper and "text" in wrapper.group() else r"\s*\}", behind)
        if wrapper is None or closing is None:
            break
        before, behind = before[: wrapper.start()], behind[closing.end() :]
    emphasis = _EMPHASIS_BEFORE.search(before) if may_have_emphasis else None
    if emphasis is not None and behind.startswith(emphasis[1]):
        before, behind = before[: emphasis.start()], behind[len(emphasis[1]) :]
    return before, behind
