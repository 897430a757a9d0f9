r"""Find the final answer of a completion without a box and a marker: "the answer is x", or a statement at the end.

A statement is read completely or not at all: an operator, a relation, a function or an unknown word next to a number
makes it another answer or none.
"""

from __future__ import annotations

import re

from grpo_mega.rewards.final_answers.hedges import ADMITTED_IGNORANCE, RETRACTION, is_denied_behind, is_rejected
from grpo_mega.rewards.final_answers.words_around import ESTIMATE, is_continued, is_unfinished
from grpo_mega.rewards.math_answers.tokens import tokenize
from grpo_mega.rewards.math_answers.units import read_unit

_TAIL_CHARACTERS = 1000
_MAX_SENTENCES = 4  # at the end of a text, in which a statement is searched
_MAX_STATEMENTS = 20
_FORMULA = r"\$\$.*?\$\$|\$[^$]+\$|\\\[.*?\\\]|\\\(.*?\\\)"
_SENTENCE = re.compile(rf"(?:{_FORMULA}|[^\n.!?]|[.!?](?=\S)|(?<=\d)[!?])+", re.DOTALL)
NEXT_QUESTION = re.compile(r"\n[^\w\n]*(?:Q|Question|Problem|User|Human|Instruction)\b", re.IGNORECASE)
_ANSWER_PHRASE = re.compile(
    r"(?<!/)\banswers?(?:\s[A-Z0-9]\b)?[\s*_]{0,5}(?:(?:is|are)\b|[:=])(?:\s*:)?", re.IGNORECASE
)
_RESULT_PHRASE = re.compile(
    r"\b(?:solution|result|option|choice)s?\s{0,3}(?:(?:is|are)\b|[:=])(?:\s*:)?", re.IGNORECASE
)
_NUMBER = (
    r"(?<![\w^.\\:/])(?:[-+\u2212]\s?)?\\?[$\u20ac\u00a3]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[/:]\d+|\^-?\d+)?\s?(?:\\?%)?"
    r"(?![\w^!?/:])"
)
_VALUE = re.compile(rf"{_FORMULA}|\([^()]{{1,80}},[^()]{{1,80}}\)|{_NUMBER}", re.DOTALL)
_STATED_BEFORE = re.compile(
    rf"\b(?<!if the )answer(?:\s+is|\s*[:=])\s*[*_]*({_NUMBER})[*_]*\s*(?:[.;]|,\s*(?:so|thus"
    rf"|hence)\b)?[\s*_$]*(?:\\\[)?\s*\Z",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"<answer>([^<]{1,100})</answer>")
_HEDGE = re.compile(
    r"[\s,;/&]*(?:\b(?:or|and|to|maybe|possibly|perhaps|either)\b[\s,;]*)*[-\u2013/]?\s*", re.IGNORECASE
)
_DENIAL = re.compile(
    rf"\b(?:no|not|never|neither|nor|no ?body|false|wrong|incorrect|cannot|unless|except|anything but|{ESTIMATE}"
    r"|between|(?:more|less|fewer|greater|larger|smaller) than|at (?:least|most)|if|whether|suppose|supposing|assume"
    r"|assuming|let|could|might|may|possible|probably|probable|unlikely|would|should|either|doubt|unsure|guess|options?"
    r"|choices|step|question|vs)\b|n't\b",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:\b(?:is|are|was|were|equals?|gets?|have|has|obtain|obtains|finds?|gives?|yields?|makes?|be|it's|there's|total"
    r"|equal to|on|in|needs?|takes?|costs?|pays?|earns?|requires?|spends?|weighs?|measures?)\s*[:=]?"
    r"|(?:\A|[,:]\s*)(?:so|hence|thus|therefore|then|finally|and|in total|that's|overall"
    r"|in conclusion|consequently|as a result)\s*[,:]?|(?<![!<>])[:=])\s*"
    r"(?:(?:exactly|therefore|thus|the (?:number|value|integer|point|set|interval))\s+)?\Z",
    re.IGNORECASE,
)
_SUBJECT = r"[\s_$*]*(?:(?:the|my|our|your|this|final|correct|right|total)\b[\s*_]+){0,3}\Z"
_OPERAND_BEFORE = re.compile(  # `-The answer is 5`, `3 + the answer is 5`, `twice the answer is 5`
    r"(?:[-+/^=<>~|\\%!\u221a\u00d7\u00f7\u00b1\u2212\u2013\u2248\u2260\u2264\u2265][(\[{]?"
    r"|(?<![*\s])\s*\*(?=\s*[A-Za-z])|\d(?!\s*[.)])|\w[(\[{]"
    r"|\b(?:of|times|plus|minus|twice|thrice|half|double|triple|by|than|from|to|in|at|with|for|on|over|under|squared"
    r"|cubed)"
    rf"\b){_SUBJECT}",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(
    r"(?:\s|\*{1,3}|[-+>#|](?=[\s>#|*])|\(?\w{1,3}[.)]\s|[A-Za-z]{2,}\s+\d+\s*:"
    r"|[A-Za-z]{2,}[\s\d]*\s[-\u2013\u2014]\s)+"
)
_LINE_BEFORE = re.compile(r"(?<![-*=_+/])[-+/^=<(\u221a\u00d7\u00f7\u2212][ \t]*\n\s*\Z")
_THAT = re.compile(r"\bthat\s+(?:[A-Za-z]+\s+){0,3}\Z", re.IGNORECASE)
_AFFIRMED = re.compile(
    r"\b(?:so|follows?|conclude[sd]?|means?|sees?|finds?|found|gets?|got|shows?|shown|knows?|impl(?:y|ies)|confident"
    r"|sure"
    r"|certain|confirms?|gives?|given|deduced?|determined?|obtains?|hopes?|verif(?:y|ied)|clear|says?|states?)"
    r"[\s,:]+that\s+(?:[A-Za-z]+\s+){0,3}\Z",
    re.IGNORECASE,
)
_ALTERNATIVE_BEFORE = re.compile(r"\bor\s+(?:the\s+)?(?:final\s+|correct\s+)?\Z", re.IGNORECASE)
_ALTERNATIVE = re.compile(r"[\s.,]*(?:or|alternatively|otherwise)\b", re.IGNORECASE)
_CONNECTIVE = re.compile(r"(?:therefore|thus|hence|then|simply|exactly|just|indeed|equal to)\b[\s,:]*", re.IGNORECASE)
_REASON = re.compile(r",?\s+(?:because|since|which)\b", re.IGNORECASE)
_NEW_LINE = re.compile(r"[\s$.*]*?\n")
_NAME = re.compile(r"\$?\s*([A-Za-z]\w?(?:_\{?\w+\}?)?)\s*=")
_LEFT_SIDE = re.compile(r"(?:\A|(?<=\s))((?:[-+*/^()\d.\s]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])){1,60}=)\s*\Z")
_IN_TOTAL = re.compile(r"\s*\b(?:in total|in all|altogether|left|remaining|overall)\Z", re.IGNORECASE)
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n])\s*", re.DOTALL)
_DECORATION = " \t\r\n*_`:"
_WORD_STATEMENT = re.compile(
    r"(?:(?:so|hence|thus|therefore|then),?\s+)?"
    r"(?:(?:the|it|this|that|he|she)\b(?:\s+[a-z]+){0,3}?\s*\b(?:is|are)|it's|that's)\s+(.+)",
    re.IGNORECASE | re.DOTALL,
)
_IGNORANCE = re.compile(ADMITTED_IGNORANCE, re.IGNORECASE)
_NO_ANSWER = re.compile(r"\b(?:cannot|can't|could not|unable|don't know|do not know)\b", re.IGNORECASE)

Readings = tuple[str, ...]
"""The ways in which one statement may be read; it is right if one of them is."""


def tagged_statement(text: str) -> list[Readings] | None:
    """Return the content of the last `<answer>...</answer>` if it ends the text, else None."""
    stripped = text.rstrip()
    if not stripped.endswith("</answer>") or "<answer>" not in stripped:
        return None
    return [(stripped.rpartition("<answer>")[2].removesuffix("</answer>").strip(),)]


def tagged_values(text: str) -> list[str]:
    """Return the different contents of `<answer>...</answer>` that begin with a value and hold no box and no marker."""
    found = dict.fromkeys(match[1].strip() for match in _TAGGED.finditer(text)) if "<answer>" in text else {}
    contents = list(found)[:_MAX_STATEMENTS]
    return [value for value in contents if begins_with_value(value) and "\\" not in value and "#" not in value]


def value_stated_before(text: str, position: int) -> str | None:
    """Return x if "The answer is x." stands directly before a position; None without it."""
    match = _STATED_BEFORE.search(text[max(0, position - 160) : position])
    return None if match is None else match[1]


def phrase_statements(text: str) -> list[Readings] | None:
    """Return what the sentences with "the answer is x" state, after the last retraction; None without such a sentence.

    An empty list: a sentence is denied, vague, or has an alternative behind it.
    """
    return _stated_behind(_ANSWER_PHRASE, text)


def result_statements(text: str) -> list[Readings] | None:
    """Return the same for "the result is x", "solution: x" and "the option is x"."""
    return _stated_behind(_RESULT_PHRASE, text)


def _stated_behind(pattern: re.Pattern[str], text: str) -> list[Readings] | None:
    tail = text[-_TAIL_CHARACTERS:]
    phrases = list(pattern.finditer(tail))
    return _phrase_statements(tail, phrases) if phrases else None


def begins_with_value(text: str) -> bool:
    """Return True if a text begins with a number, a formula or a pair."""
    return _VALUE.match(text) is not None


def statements_behind(text: str, position: int) -> list[Readings]:
    """Return the values that "the answer is x" states behind a position, or a text that is only a value.

    A next question ends the text.
    """
    question = NEXT_QUESTION.search(text, position)
    rest = text[position : len(text) if question is None else question.start()]
    only = rest.strip(_DECORATION + "$.")
    if _NEW_LINE.match(rest) is not None and _VALUE.fullmatch(only) is not None:
        return [(only,)]
    phrases = list(_ANSWER_PHRASE.finditer(rest))[:_MAX_STATEMENTS]
    statements = [_statement_behind(rest, phrase) for phrase in phrases]
    return [readings for readings in statements if readings and begins_with_value(readings[0])]


def last_statements(text: str) -> list[Readings] | None:
    """Return the last statements of a text that have the same form, `x = 5`, `So we get 5.`; None without any."""
    return _last_statements(text[-_TAIL_CHARACTERS:]) or None


def _phrase_statements(tail: str, phrases: list[re.Match[str]]) -> list[Readings]:
    first = 0
    for k in range(len(phrases) - 1, 0, -1):
        if RETRACTION.search(tail, phrases[k - 1].end(), phrases[k].start()) is not None:
            first = k
            break
    statements: list[Readings] = []
    for phrase in phrases[first:][-_MAX_STATEMENTS:]:
        rest = tail[phrase.end() :].lstrip(_DECORATION)
        sentence = _SENTENCE.match(rest)
        sentence_start = max(tail.rfind(mark, 0, phrase.start()) for mark in ".!?\n") + 1
        before = tail[sentence_start : phrase.start()]
        if sentence is None or not _introduces(before, tail[:sentence_start]):
            return []
        following = rest[sentence.end() :]
        if (
            following.startswith("?")
            or is_continued(following, 0)
            or _ALTERNATIVE.match(following) is not None
            or is_rejected(following)
            or (phrase is phrases[-1] and is_denied_behind(following, 0))
        ):
            return []
        statements.append(_phrase_readings(sentence.group()))
    return list(dict.fromkeys(statements))


def _introduces(before: str, earlier: str) -> bool:
    """Return True if the text before "the answer is" can stand there: no denial, operand, or doubt about the clause.

    Args:
        before: the text of the same sentence.
        earlier: the text before that sentence.
    """
    mark = _LIST_MARK.match(before)
    rest = before if mark is None else before[mark.end() :]
    if _DENIAL.search(rest) is not None or _ALTERNATIVE_BEFORE.search(rest) is not None:
        return False
    if _THAT.search(rest) is not None and _AFFIRMED.search(rest) is None:
        return False
    return _OPERAND_BEFORE.search(rest) is None and _LINE_BEFORE.search(earlier) is None


def _statement_behind(text: str, phrase: re.Match[str]) -> Readings:
    rest = text[phrase.end() : phrase.end() + _TAIL_CHARACTERS]
    sentence = _SENTENCE.match(rest.lstrip(_DECORATION))
    return () if sentence is None else _phrase_readings(sentence.group())


def _phrase_readings(sentence: str) -> Readings:
    whole = _REASON.split(sentence)[0]
    connective = _CONNECTIVE.match(whole)
    whole = (whole if connective is None else whole[connective.end() :]).strip(_DECORATION)
    value = _stated_value(sentence)
    if _IGNORANCE.search(sentence) is not None:
        return ("",)
    if whole.startswith("~") or is_rejected(sentence[len(_REASON.split(sentence)[0]) :]):  # about; "which is wrong"
        return ("",)
    return (whole,) if value is None or _VALUE.match(whole) is not None else (whole, value[1])


def sentence_tails(text: str, length: int) -> list[str]:
    """Return the ends of a text that begin with a sentence and are about `length` characters long, shortest first."""
    longest = 2 * length + 80
    tail = text[-longest:].rstrip()
    starts = [match.end() for match in _SENTENCE_START.finditer(tail) if match.start() or len(text) <= longest]
    return [tail[start:] for start in reversed(starts) if 2 * len(tail[start:]) >= length][:20]


def _last_statements(tail: str) -> list[Readings]:
    sentences = [(match.group(), tail[match.end() : match.end() + 1]) for match in _SENTENCE.finditer(tail)]
    sentences = [pair for pair in sentences if pair[0].strip()]
    statements: list[Readings] = []
    lead = name = None
    for k in range(len(sentences) - 1, max(-1, len(sentences) - _MAX_SENTENCES - 1 - len(statements)), -1):
        sentence, ending = sentences[k]
        if _VALUE.search(sentence) is None:
            if statements or is_rejected(sentence) or _NO_ANSWER.search(sentence) is not None:
                break
            if k and sentences[k - 1][1] in (".", "!") and sentence.lstrip()[:1].islower():
                return []  # `x = 5. squared`
            continue
        stated = None if ending == "?" else _stated_value(sentence)
        if not statements:
            if stated is None:
                return []
            lead, name = stated[0], _name_of(stated[1])
        elif stated is None or stated[0] != lead or _name_of(stated[1]) != name:
            if not lead and (_is_part_of_list(sentence) or re.search(r"\bvs\s*\Z", sentence) is not None):
                return []
            break
        assert stated is not None
        statements.insert(0, (stated[1],))
    if any(is_rejected(sentence) for sentence, _ in sentences[-1:]):
        return []
    return list(dict.fromkeys(statements))


def _is_part_of_list(sentence: str) -> bool:
    return re.fullmatch(r"\s*(?:\(?\w[).]\s*)?[\d\s.,;:/|-]+", sentence) is not None


def _name_of(value: str) -> str:
    match = _NAME.match(value)
    return "" if match is None else match[1]


def _stated_value(sentence: str) -> tuple[str, str] | None:
    """Return the words before the last value of a sentence, and the value with the values joined to it and its unit.

    None for a sentence that is denied or vague, and where other words than a unit are next to the value.
    """
    sentence = re.sub(r"(?<=\s)\*\*|\*\*(?=\W|\Z)|\A\*\*", "", sentence.strip(_DECORATION))
    values = list(_VALUE.finditer(sentence))
    if not values or _DENIAL.search(sentence) is not None:
        return None
    first = len(values) - 1
    while first and _HEDGE.fullmatch(sentence, values[first - 1].end(), values[first].start()):
        first -= 1
    if is_unfinished(sentence, values[-1].end()):
        return None
    lead, behind = sentence[: values[first].start()].strip(), sentence[values[-1].end() :].strip(_DECORATION + ".,")
    behind = re.sub(r"\Asuch\s+", "", _IN_TOTAL.sub("", behind))
    name = _LEFT_SIDE.search(lead)
    start = values[first].start()
    if name is not None:
        lead, start = lead[: name.start()].strip(), lead.rfind(name[1])
        start = sentence.find(name[1], start)
    if lead and _LEAD.search(lead + " ") is None and _LEAD.search(lead) is None:
        return None
    if behind and (not lead or read_unit(tokenize(rf"\text{{{behind}}}")) is None):
        return None
    value = sentence[start : values[-1].end()]
    return lead.casefold(), value if not behind or "$" in value else f"{value} \\text{{{behind}}}"


def stated_word(text: str) -> str | None:
    """Return the word of a text that is one sentence like `It is Wednesday.` or `The function is even.`"""
    stripped = text.strip(_DECORATION).removesuffix(".")
    match = _WORD_STATEMENT.fullmatch(stripped) if len(stripped) <= 200 else None
    if match is None or re.search(r"[.!?\n]", stripped) is not None or _DENIAL.search(stripped[: match.start(1)]):
        return None
    word = match[1].strip(_DECORATION)
    return word if word.casefold() == "false" or _DENIAL.search(word) is None else None
