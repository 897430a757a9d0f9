r"""Words and signs around a number that make it an operand, a part, a bound, a denial or a guess instead of an answer.

A number may stand among units, currencies, articles and names. It is no answer if a word around it names an operation
(`twice 5`, `5 squared`), a fraction (`5 halves`), a negation, a relation, an estimate, or another number in words.
Asserted by tests/unit/rewards/builtin/test_gsm8k_attacks.py.
"""

from __future__ import annotations

import re
from fractions import Fraction

from grpo_mega.rewards.answer_parsing import SCALES

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_NUMBER_WORD = re.compile(
    rf"\b(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_ONES[1:10])}))?|{'|'.join(_ONES)}"
    rf"|{'|'.join(SCALES.keys() - {'k'})})\b",
    re.IGNORECASE,
)
_FRACTION_WORD = (
    r"(?:half|halves|thirds?|fourths?|quarters?|(?:fif|six|seven|eigh|nin|ten|eleven|twelf)ths?|\w+(?:teen|tie)ths?"
    r"|hundredths?|thousandths?|millionths?)"
)
_UNKNOWN = r"unknown|undefined|undetermined|indeterminate|impossible|unclear|unsure|uncertain|guess\w*|n/a"
_ESTIMATE = r"about|approximately|approx|roughly|around|nearly|almost|circa|close to|maybe|perhaps|possibly"
_OPERATION = (
    r"plus|minus|times|multipl\w+|divided|squared?|cubed?|sqrt|roots?|log|ln|exp|sin|cos|tan|factorial|reciprocal"
    r"|inverse|opposite|absolute|modulus|mod|modulo|power|twice|thrice|doubled?|tripled?|quadrupled?|negative|(?:some|any"
    r"|all|one|each|part|sum|product|difference|quotient|fraction|factors?|multiples?|divisors?) of"
    rf"|complement|supplement|conjugate|triple|{_FRACTION_WORD}"
)
WORDS_BEFORE = (
    r"not|cannot|never|neither|nor|no|none|nothing|without|except|unlike|than|least|most|between|under|above|below|or"
    rf"|depends|tbd|todo|nicht|keine?|pas|\u043d\u0435|either|alternatively"
    rf"|exceed\w*|up to|{_UNKNOWN}|{_ESTIMATE}|{_OPERATION}"
)
"""Words that make a number anywhere behind them no answer, as alternatives of a regular expression."""

WORDS_DIRECTLY_BEFORE = (
    rf"{WORDS_BEFORE}|probably|likely|could be|might be|may be|can be|rounded|false|wrong|incorrect|invalid|error"
    r"|(?:every|any|no)?(?:thing|one|body) but|all but|other|excluding|besides|instead of|rather|beyond|past|until"
    r"|first|second|last|next|previous|before|after|since|within|couple(?: of)?|pair of|dozens?|hundreds?|thousands?"
    r"|max|min|over|step|question|case|item|option|one of|every|per|from"
)
"""Words that make the number directly behind them, or behind one more word, no answer."""

_ESTIMATE_SIGN = (
    r"(?:[\u2248\u2243\u2245\u223c\u2213\u00ac!#\u2211\u220f\u03a3]|\\(?:approx|sim|simeq|cong|neg|not|mp)\b)"
)
_APPROXIMATE = re.compile(rf"[\s*_$({{\[]*~|[^0-9]*{_ESTIMATE_SIGN}")
_APPROXIMATE_END = re.compile(rf"(?:\A|\n|[.!?:]\s)[^0-9\n]*(?:{_ESTIMATE_SIGN}|~)[\s$*({{\[]*[-+]?[$0-9.,]*\Z")
_SHORT_FORM_BEFORE = re.compile(r"\b(?:approx|ca|c|no)\.\s*\Z|[A-Za-z]\(\Z|[\u03a3\u2211\u220f]\s*\Z", re.IGNORECASE)
_DIRECTLY_BEHIND = re.compile(
    rf"[\s-]*(?:{_FRACTION_WORD}|(?:st|nd|rd|th)\s+(?:roots?|power)|sin|cos|tan|exp|ish|odd|fold|something"
    r"|over|choose|by|mod|modulo|plus|minus|divided|multiplied"
    r"|raised|factorial|squared|cubed|sqrt|root|log|ln|to the|power|times(?=\s*[0-9(]|\s+[b-z]\b))\b"
    r"|\s*(?:of|and|or|to|by|from|with|without|per|every|not|no|never)\W*\Z"
    r"|\s*\?|\s*\((?:no|not|wrong|false)\b"
    r"|\s*R\s?[0-9]"
    r"|\s*(?:[^\W\d]|\s|[-,(])*[0-9]+(?:ths|rds|nds)\b|\s*(?:in|percent|per cent|pct) (?:of|binary|octal|hex\w*|base)\b"
    r"|\s?(?:bn|mln|mn|mil|mille|mila"
    r"|tausend|\u0442\u044b\u0441\w*|\u043c\u043b\u043d|tens|ppm|ppb|bps|basis points?|pairs of)\b"
    r"|\s?\u2030"
    r"|\s*[-\[({]\s*(?:no|not|wrong|false)\b"
    r"|\s*parts? (?:of|out)\b|\s*[\u221e\u2213\u2080-\u2089\u2215\u2219\u00b7\u2022]"
    r"|\((?![^()]*[A-Za-z]{2})(?=[^()\s])"
    r"|\s*[-+\u2013\u2014*/^<>=\u00f7\u00d7]+[^\w]*\Z",
    re.IGNORECASE,
)
_OPERATOR_BEHIND = re.compile(
    r"\s*(?:[-+*/\u00d7\u00f7\u00b1\u2212](?![-*])\s?[$(]?(?:[0-9.]|[A-Za-z](?![A-Za-z])|\\)|(?:[%]|percent)\s*of\b"
    r"|[\^_][0-9{(A-Za-z]|[0-9{]|\.[0-9]|,[0-9]{3}|=\s*[-0-9]|[<>\u2264\u2265\u2260])",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    rf"\b(?:{_UNKNOWN}|depend\w*|tbd|todo|maximum|max|minimum|at best|at worst|tops|when"
    rf"|maybe|perhaps|possibly|probably|likely|invalid|rounded|doubled|tripled|halved"
    rf"|increased|decreased|reduced|and (?:change|some|more)|at (?:least|most)|to the power|and (?:an? )?half"
    r"|and (?:up|above|below|over|under|more|less)|too (?:low|high|small|big|large|few|many|much))(?!\w)",
    re.IGNORECASE,
)
_ONE_IN_LIST = re.compile(r"(?:\b(?:and|or|to|plus)|[,;/-])\s*\Z", re.IGNORECASE)
_DIRECTLY_BEFORE = re.compile(r"[\s($]*(?:of\b[\s($]*)?\Z", re.IGNORECASE)


def is_approximate(text: str) -> bool:
    r"""Return True if a sign like `~` or `\approx` comes before the first digit of a text that is not normalized."""
    return _APPROXIMATE.match(text) is not None


def is_approximate_before(before: str) -> bool:
    """Return True if a text that is not normalized, and ends in a number, has such a sign or a function before it."""
    return _APPROXIMATE_END.search(before) is not None


def has_short_form_before(before: str) -> bool:
    """Return True if a text ends in a short form like `approx.` or in the name of a function: `f(`."""
    return _SHORT_FORM_BEFORE.search(before) is not None


def names_other_number_before(before: str, value: Fraction | None, *, only_adjacent: bool = False) -> bool:
    """Return True if the text before a number holds another number in words: `two 5`, but not `five (5)`.

    With `only_adjacent`, only a word directly before the number counts.
    """
    for match in _NUMBER_WORD.finditer(before):
        if only_adjacent and not _DIRECTLY_BEFORE.match(before, match.end()):
            continue
        is_pronoun = match.group().lower() == "one" and not _DIRECTLY_BEFORE.match(before, match.end())
        if not is_pronoun and _value(match.group()) != value:
            return True
    return False


def changes_number_before(tail: str, value: Fraction | None, qualifier: re.Pattern[str]) -> bool:
    """Return True if the text behind a number makes it an operand, a guess, or adds another number in words.

    Args:
        tail: the text that begins directly behind the number.
        value: value of the number.
        qualifier: matches a text behind whose end another number may stand, like "for" in `5 for two people`.
    """
    if _DIRECTLY_BEHIND.match(tail) is not None or _BEHIND.search(tail) is not None:
        return True
    for match in _NUMBER_WORD.finditer(tail):
        between = tail[: match.start()]
        if match.group().lower() in SCALES and between.rstrip()[-1:].isdigit():
            continue  # a part of another numeral
        if match.group().lower() == "one" and between.strip() and not _ONE_IN_LIST.search(between):
            continue
        if _value(match.group()) != value and not qualifier.search(between):
            return True
    return False


def changes_by_sign_or_word(tail: str) -> bool:
    """Return True if a sign or a word directly behind an answer makes it an operand: `squared`, `+ 3`, `% of`."""
    return _DIRECTLY_BEHIND.match(tail) is not None or _OPERATOR_BEHIND.match(tail) is not None


def _value(words: str) -> int | None:
    parts = re.split(r"[- ]", words.lower())
    return sum(_VALUES[part] for part in parts) if all(part in _VALUES for part in parts) else None
