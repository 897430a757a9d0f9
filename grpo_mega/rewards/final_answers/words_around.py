r"""Words and signs around a value that make it an operand, a part, a bound, a denial or a guess instead of an answer.

A value may stand among units, currencies, articles and names. It is no answer if a word around it names an operation
(`twice 5`, `5 squared`), a fraction (`5 halves`), a negation, a relation, an estimate, or another number in words.
Where grammar decides, there is a rule instead of a list of words:

- an adverb in -ly before a value is an estimate (`roughly 5`), unless it is one of a few that confirm (`exactly 5`);
- `of` before a value makes it an operand (`the square of 5`, `upwards of 5`), unless an indefinite article or the name
  of a measure stands before it (`a team of 5`, `the price of 5`);
- a participle that directly follows a value and ends the clause changes it (`5 halved`, `5 increased by 2`);
- dots, a modulus and `out of` with a number make the value before them a part of something else;
- a sentence that begins in lower case, or a line that begins with an operator, continues the value before it.

This is the only home of such words: boxes, marked lines, sentences and the last number of a text are read with it.
Asserted by tests/unit/rewards/builtin/test_gsm8k_attacks.py and the labeled rows next to it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from grpo_mega.rewards.answer_parsing import SCALES, normalize
from grpo_mega.rewards.final_answers.denials import is_called_wrong_before, is_called_wrong_behind, is_negated_before

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_NUMBER_WORD = re.compile(
    rf"\b(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_ONES[1:10])}))?|{'|'.join(_ONES)}"
    rf"|{'|'.join(SCALES.keys() - {'k'})})\b(?!-[a-z])",  # a two-digit number
    re.IGNORECASE,
)
_FRACTION_WORD = (
    r"(?:half|halves|thirds?|fourths?|quarters?|(?:fif|six|seven|eigh|nin|ten|eleven|twelf)ths?|\w+(?:teen|tie)ths?"
    r"|hundredths?|thousandths?|millionths?)"
)
_UNKNOWN = r"unknown|undefined|undetermined|indeterminate|impossible|unclear|unsure|uncertain|guess\w*|n/a"
ESTIMATE = r"about|approximately|approx|roughly|around|nearly|almost|circa|close to|near|maybe|perhaps|possibly"
"""Words that make a value an estimate, as alternatives of a regular expression."""
_OPERATION = (
    r"plus|minus|times|multipl\w+|divided|squared?|cubed?|sqrt|roots?|log|ln|exp|sin|cos|tan|factorial|reciprocal"
    r"|inverse|opposite|absolute|modulus|mod|modulo|power|twice|thrice|doubled?|tripled?|quadrupled?|negative|(?:some"
    r"|any"
    r"|all|one|each|part|sum|product|difference|quotient|fraction|factors?|multiples?|divisors?) of"
    rf"|complement|supplement|conjugate|triple|{_FRACTION_WORD}"
)
WORDS_BEFORE = (
    r"not|cannot|never|neither|nor|no|none|nothing|no ?body|without|except|unlike|than|least|most|between|under|above"
    r"|below|or|depends|tbd|todo|nicht|keine?|pas|\u043d\u0435|either|alternatively"
    rf"|exceed\w*|up to|{_UNKNOWN}|{ESTIMATE}|{_OPERATION}"
)
"""Words that make a number anywhere behind them no answer, as alternatives of a regular expression."""

_DOUBT_BEFORE = (
    r"probably|likely|could be|might be|may be|can be|rounded|false|wrong|incorrect|invalid|error"
    r"|(?:every|any|no)?(?:thing|one|body) but|(?:every|any|each) (?:\w+ ){1,2}but|all but|excluding|besides"
    r"|instead of|rather|give or take|far from|over|suppose|assume"
)
_POSITION_BEFORE = (
    r"first|second|last|next|previous|before|after|since|within|couple(?: of)?|pair of|dozens?|hundreds?|thousands?"
    r"|max|min|over|step|question|example|exercise|figure|table|section|equation|appendix|footnote|case|item|option"
    r"|one of|every|per|from|beyond|past|until|other|if"
)
WORDS_DIRECTLY_BEFORE = rf"{WORDS_BEFORE}|{_DOUBT_BEFORE}|{_POSITION_BEFORE}"
"""Words that make the number directly behind them, or behind one more word, no answer."""

_CONFIRMING = (  # the adverbs in -ly that may stand before a value, and nouns with this ending
    "only|exactly|precisely|simply|finally|actually|really|truly|certainly|clearly|obviously|definitely|consequently"
    "|accordingly|originally|initially|currently|daily|weekly|monthly|hourly|yearly|namely|equally|respectively"
    "|family|supply"
)
_MEASURE = (
    "price|cost|value|rate|amount|total|age|speed|size|length|width|height|weight|area|volume|distance|profit|average"
    "|answer|number|fee|salary|temperature|probability"
)
_ADVERB = rf"(?-i:(?!(?:{_CONFIRMING})\b)[a-z]+ly)"
_MODIFIER_BEFORE = re.compile(rf"\b{_ADVERB}[\s$*({{]*\Z", re.IGNORECASE)
_OF_BEFORE = re.compile(r"\bof[\s$*({]*\Z", re.IGNORECASE)
_NAMED_AMOUNT_BEFORE = re.compile(
    rf"\b(?:(?:an?|another)\s+(?:[a-z]+\s+){{0,2}}[a-z]+|(?:{_MEASURE})s?|consists?|made)\s+of[\s$*({{]*\Z",
    re.IGNORECASE,
)
_ESTIMATE_SIGN = (
    r"(?:[\u2248\u2243\u2245\u223c\u2213\u2209\u00ac!#\u2211\u220f\u03a3]|\\(?:approx|sim|simeq|cong|neg|not|mp)\b)"
)
_APPROXIMATE = re.compile(rf"[\s*_$({{\[]*~|[^0-9]*{_ESTIMATE_SIGN}")
_APPROXIMATE_END = re.compile(rf"(?:\A|\n|[.!?:]\s)[^0-9\n]*(?:{_ESTIMATE_SIGN}|~)[\s$*({{\[]*[-+]?[$0-9.,]*\Z")
_SHORT_FORM_BEFORE = re.compile(r"\b(?:approx|ca|c|no|nr)\.\s*\Z|[A-Za-z]\(\Z|[\u03a3\u2211\u220f]\s*\Z", re.IGNORECASE)
_DIRECTLY_BEHIND = re.compile(
    rf"[\s-]*(?:{_FRACTION_WORD}|(?:st|nd|rd|th)\s+(?:roots?|power)|sin|cos|tan|exp|ish|odd|fold|something"
    r"|negative|twice|thrice|about|and a bit|and then some|(?:octal|hex\w*|binary)(?=\W*\Z)|over|choose"
    r"|by(?=\W*[0-9])|mod|modulo|plus|minus|divided|multiplied|base"
    r"|raised|factorial|squared|cubed|sqrt|root|log|ln|to the|power|times(?=\s*[0-9(]|\s+[b-z]\b))\b"
    r"|\s*(?:of|and|or|to|by|from|with|without|per|every|not|no|never)\W*\Z"
    r"|\s*\?|\s*\((?:no|not|wrong|false)\b"
    r"|\s+is (?:only |just )?(?:one of\b|one possib|among\b|what\b|(?:un)?likely\b|doubtful|questionable|the first of\b"
    r"|an?\s+(?:lower|upper|loose|naive|common|typical|rough|wrong|decoy|lie|trap|guess|possibility|bluff|placeholder"
    r"|joke)\b)"
    r"|\s*,?\s*plus or minus\b|\s+(?:seems|looks|feels) (?:off|odd|low|high|wrong)\b|\s*,?\s*said (?:no ?body|no one)\b"
    r"|\s*,?\s*(?:but\b(?! not)|for (?:instance|example)\b|fails?\b"
    r"|and (?:up|above|below|over|under|more|less)(?=\W*\Z|[.,;]))|\s?%\s*[%\u2030\u2031]"
    r"|\s*R\s?[0-9]"
    r"|\s*(?:[^\W\d]|\s|[-,(])*[0-9]+(?:ths|rds|nds)\b|\s*(?:in|percent|per cent|pct) (?:of|binary|octal|hex\w*|base)\b"
    r"|\s?(?:bn|mln|mn|mil|mille|mila"
    r"|tausend|\u0442\u044b\u0441\w*|\u043c\u043b\u043d|tens|ppm|ppb|bps|basis points?|pairs of)\b"
    r"|\s?[\u2030\u2031]"
    r"|\s*[-\[({]\s*(?:no|not|wrong|false|negative)\b"
    r"|\s*parts? (?:of|out)\b|\s*[\u221e\u2213\u2080-\u2089\u2215\u2219\u00b7\u2022]"
    r"|\((?![^()]*[A-Za-z]{2})(?=[^()\s])"
    r"|\s*[-+\u2013\u2014*/^<>=\u00f7\u00d7]+[^\w]*\Z"
    r"|\s*\(?\\?[bp]?mod\b|\s*(?:[a-z]+\s+)?out of\W*(?:the\s+)?[0-9]"
    r"|\s+(?-i:(?!\w*eed\b)[a-z]{3,}ed)(?=\s*(?:[.,;]|\Z))|\s*,?\s+(?-i:[a-z]{3,}ed)\s+(?:by|to|up|down|twice)\b"
    rf"|\s+and (?:(?:an?|one|two|three) {_FRACTION_WORD}|half|change|some|more)\b"
    r"|\s*,?\s+(?:with|without|unless|except|only (?:if|when)|if|give or take|more or less|or thereabouts)\b"
    rf"|\s*,\s*(?:{ESTIMATE}|{_ADVERB})(?=\W*\Z|\s*[.;])",
    re.IGNORECASE,
)
_OPERATOR_BEHIND = re.compile(
    r"\s*(?:[-+*/\u00d7\u00f7\u00b1\u2212](?![-*])\s?[$(]?(?:[0-9.]|[A-Za-z](?![A-Za-z])|\\)|(?:[%]|percent)\s*of\b"
    r"|[\^_][0-9{(A-Za-z]|[0-9{]|\.[0-9]|,[0-9]{3}|=\s*[-0-9]|[<>\u2264\u2265\u2260])",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    rf"\b(?:{_UNKNOWN}|depend\w*|tbd|todo|nope|h+m+|(?:of course|surely|definitely|certainly) not|but no(?=\W*\Z)"
    rf"|at best|at worst|tops|give or take"
    rf"|maybe|perhaps|possibly|probably|likely|invalid|rounded|doubled|tripled|halved"
    rf"|increased|decreased|(?<!\()reduced|and (?:change|some|more)|at (?:least|most)|to the power|and (?:an? )?half"
    r"|and (?:up|above|below|over|under|more|less)|too (?:low|high|small|big|large|few|many|much)"
    r"|(?<!the )(?:max|min|maximum|minimum)(?=\W*\Z))(?!\w)",
    re.IGNORECASE,
)
_ONE_IN_LIST = re.compile(r"(?:\b(?:and|or|to|plus)|[,;/-])\s*\Z", re.IGNORECASE)
_DIRECTLY_BEFORE = re.compile(r"[\s($]*(?:of\b[\s($]*)?\Z", re.IGNORECASE)

_WINDOW = 80  # characters around a box
_LONGEST_WORDS = 50  # characters of the words directly before a value
_MATH_OPENED = re.compile(r"(?:\$|\\\(|\\\[|\\displaystyle\b|\s)*\Z")
_ESTIMATE_BEFORE = re.compile(r"[~\u2248\u2245\u2243\u223c\u2213\u00ac]\Z")
_CLAUSE_END = re.compile(r"[=.;,\n]|\b(?:because|since|as|so|which|where|for|if|and)\b", re.IGNORECASE)
_NUMBER_START = r"[\s$*(]*(?:about )?(?:[0-9]|(?:zero|one|two|three|four|five|six|seven|eight|nine|ten)\b)"
_SECOND = re.compile(
    r"[\s$*]*(?:[,/:&|\u2192~\u2245\u223c\u2261%]|->|=>|\+/-"
    r"|\b(?:and|or|to|vs\.?|versus|becomes|rounds? to|rounded to)\b)"
    rf"{_NUMBER_START}|[\s$*]*(?:,\s*)?(?:and\s+)?then\s+(?:[a-z]+\s+)?{_NUMBER_START}"
    r"|\s*\W?\s*(?:is(?:n't| not)|was not|not\W*\Z|wrong|false|incorrect|invalid|[(]mod|hundred|thousand)\b"
    r"|\s*[\u2032'][0-9]|\s*-?to-",
    re.IGNORECASE,
)
_QUALIFIED = re.compile(r"\b(?:for|in|per|of|after|every|each|with|at|on|from|among|by|during|the)\s+\Z", re.IGNORECASE)
_NUMBER_BEHIND = re.compile(
    r"\s*(?:(?!(?:for|in|per|of|after|over|every|each|with|at|on|from|among|by|within|during"
    r"|out)\b)[A-Za-z(]+\s)?[(]?[0-9]"
)
_SENTENCE_START = re.compile(r"[.!?](?:\s|\Z)|\n")
_DENIED_LINE = re.compile(r"(?:\b(?:not|never|cannot be|than|twice|half of|minus)|n't)[\s:]*\Z", re.IGNORECASE)
_FILLERS = r"[^\w\\]*(?:(?:the|an?|of|be|equal(?: to)?)\b[^\w\\]*){0,2}\Z"
_WORD_BEFORE = re.compile(rf"(?:\b(?:{WORDS_DIRECTLY_BEFORE})\b|n't\b){_FILLERS}", re.IGNORECASE)
_CHANGE_BEFORE = re.compile(rf"(?:\b(?:{WORDS_BEFORE}|{_DOUBT_BEFORE})\b|n't\b){_FILLERS}", re.IGNORECASE)
_BOUND_OR_LIST = re.compile(r"\bat (?:least|most)\b|\b(?:either|or)\b|\bno\s*[,.:!;]", re.IGNORECASE)
_DENIED_CLAUSE = re.compile(
    r"\b(?:by no means|no ?body|no one|never|wrong|incorrect|naive(?:ly)?|mistaken(?:ly)?)\b[^.,;\n]*\Z"
    r"|\b(?:for example|for instance|e\.g)\b[.,:\s$]*\Z"
    r"|\b(?:do|does|did|should|must)(?: not|n't)\s+\w+[\s$*:({]*\Z",
    re.IGNORECASE,
)
_WHEN = re.compile(r"\bwhen(?!\w)", re.IGNORECASE)
_DOTS_BEHIND = re.compile(r"[\s$*)]*(?:\.\s?\.|\u2026|\\[lc]?dots(?![A-Za-z]))")
_EMPHASIS_END = re.compile(r"\A(?:\*{1,3}|_{1,3})(?=\s|[.,;:!?)]|\Z)(?!\s*[\d(\\$])")
_NOTHING_BEHIND = re.compile(r"(?:[\s$]|\\[\])])*\.?(?:[\s$]|\\[\])])*")  # most boxes end their text
_CLOSING = r"(?:[\s$*_`)\]}\"']|\\[\])])*"
_CONTINUED = re.compile(
    rf"{_CLOSING}[.!?]{_CLOSING}[a-z]|{_CLOSING}[.]?{_CLOSING}\n\s*(?:[+*/^\u00d7\u00f7\u2212-]\s?[\d(]|\\times|\\cdot)"
    rf"|{_CLOSING}\n\s*(?:squared|cubed|plus|minus|times|divided|thousand|million)\b"
)


def is_approximate(text: str) -> bool:
    r"""Return True if a sign like `~` or `\approx` comes before the first digit of a text that is not normalized."""
    return _APPROXIMATE.match(text) is not None


def is_approximate_before(before: str) -> bool:
    """Return True if a text that is not normalized, and ends in a number, has such a sign or a function before it."""
    return _APPROXIMATE_END.search(before) is not None


def has_modifier_before(before: str) -> bool:
    """Return True if a text ends in an adverb of estimation, `of` behind a function, or a short form like `approx.`."""
    end = before[-_LONGEST_WORDS:]
    return (
        _SHORT_FORM_BEFORE.search(end[-12:]) is not None
        or _MODIFIER_BEFORE.search(end) is not None
        or (_OF_BEFORE.search(end[-12:]) is not None and _NAMED_AMOUNT_BEFORE.search(end) is None)
    )


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


def changes_number_before(
    tail: str, value: Fraction | None, qualifier: re.Pattern[str], *, strict: bool = True
) -> bool:
    """Return True if the text behind a number makes it an operand, a guess, or adds another number in words.

    Args:
        tail: the text that begins directly behind the number.
        value: value of the number.
        qualifier: matches a text behind whose end another number may stand, like "for" in `5 for two people`.
        strict: "when" is a condition.
    """
    if strict and _WHEN.search(tail) is not None:
        return True
    if (
        _DOTS_BEHIND.match(tail) is not None
        or _DIRECTLY_BEHIND.match(tail) is not None
        or _BEHIND.search(tail) is not None
    ):
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


def is_unfinished(text: str, end: int) -> bool:
    """Return True if dots stand directly behind a value: `42...`."""
    return _DOTS_BEHIND.match(text, end) is not None


def is_continued(text: str, end: int) -> bool:
    r"""Return True if the text behind a statement continues it: `42. squared`, or `+ 3` in the next line."""
    return _CONTINUED.match(text, end, end + _WINDOW) is not None


def words_change_box(text: str, start: int, end: int, value: Fraction | None) -> bool:
    r"""Return True if words or signs around the box text[start:end] change its number, deny it, or estimate it.

    Args:
        text: contains the box.
        start: first position of the box.
        end: first position behind the box.
        value: the number that the box names; the text may repeat it in words, as in `\boxed{5} (five)`.
    """
    before, behind = text[max(0, start - _WINDOW) : start], text[end : end + _WINDOW]
    return text_before_changes(before, value) or text_behind_changes(behind, value, strict=True)


def text_before_changes(before: str, value: Fraction | None, *, strict: bool = True) -> bool:
    r"""Return True if the text before a box changes what the box behind it names.

    Unless `strict`, words of a list, a bound or a position do not: `at least \boxed{5}`, `first \boxed{3}`.
    """
    outside = _MATH_OPENED.sub("", before if strict else _BOUND_OR_LIST.sub("", before))
    sentence = _SENTENCE_START.split(outside)[-1]
    end = outside[-_LONGEST_WORDS:]
    return (
        _DENIED_LINE.search(end) is not None
        or _ESTIMATE_BEFORE.search(end[-1:]) is not None
        or _DENIED_CLAUSE.search(sentence) is not None
        or is_called_wrong_before(sentence)
        or is_negated_before(end)
        or (_WORD_BEFORE if strict else _CHANGE_BEFORE).search(sentence[-_LONGEST_WORDS:]) is not None
        or has_modifier_before(sentence)
        or names_other_number_before(sentence, value, only_adjacent=True)
    )


def text_behind_changes(behind: str, value: Fraction | None, *, strict: bool = False) -> bool:
    """Return True if the text behind a box changes what the box before it names. With `strict`, "when" does."""
    if _NOTHING_BEHIND.fullmatch(behind) is not None:
        return False
    if is_continued(behind, 0) or is_unfinished(behind, 0):
        return True
    tail = normalize(behind.partition("\n")[0])
    is_math_ended = re.match(r"\s*(?:\$|\\\)|\\\])", behind) is not None
    tail = re.sub(r"\A[\s$]+", " ", _EMPHASIS_END.sub("", tail))
    if is_math_ended and re.match(r"\s*[!]", tail):
        return False
    clause = _CLAUSE_END.split(tail, maxsplit=1)[0]
    is_operand = _DIRECTLY_BEHIND.match(tail) is not None or _OPERATOR_BEHIND.match(tail) is not None
    is_operand = is_operand or is_called_wrong_behind(tail)
    is_first = _SECOND.match(tail) is not None or _NUMBER_BEHIND.match(clause) is not None
    return is_operand or is_first or changes_number_before(clause, value, _QUALIFIED, strict=strict)


def _value(words: str) -> int | None:
    parts = re.split(r"[- ]", words.lower())
    return sum(_VALUES[part] for part in parts) if all(part in _VALUES for part in parts) else None
