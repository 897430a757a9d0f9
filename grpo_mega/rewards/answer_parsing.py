r"""Parse numbers in prose and LaTeX exactly: `$1,234.50` is the fraction 2469/2, never a float.

This module defines the forms of a number: docs/rewards.md lists them, and tests/unit/rewards/builtin/test_gsm8k.py has
one test per form. The position of the answer in a completion is defined in `gsm8k.py`. All patterns take linear time in
the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 100
"""A longer run of digits is not an answer: Python rejects thousands of digits, and no question needs them."""

_FRACTIONS = "\u00bc\u00bd\u00be" + "".join(map(chr, range(0x2150, 0x215F)))
_CHARACTERS = str.maketrans(
    {fraction: f" {unicodedata.normalize('NFKC', fraction)}".replace("\u2044", "/") for fraction in _FRACTIONS}
    | dict.fromkeys("\u2010\u2011\u2012\u2212\u207b\u02d7\u2796\ufe63\uff0d", "-")  # hyphens and minus signs
    | dict.fromkeys("\u00a0\u2007\u2009\u202f", "\u2009")  # spaces that group digits become one kind of space
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")  # characters without width
    | {
        "\uff0c": ",",
        "\uff0e": ".",
        "\uff0b": "+",
        "\u2044": "/",
        "\u00d7": "*",
        "\u22c5": "*",
        "\u2248": "=",
        "\u00b0": " ",
    }
    | {"\u066b": ".", "\u066c": ","}  # separators between Arabic digits
)
_DIGITS_OF_OTHER_SCRIPTS = re.compile(r"[^\x00-\x7f\D]")
_MINUS_AS_DASH = re.compile(r"(?<![^\s$({])[\u2014\u2015](?=[0-9.$])")
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<<[^<>\n]*>>"), ""),  # GSM8K's calculator annotations
    (re.compile(r"\\[dtc]?frac\s?\{([^{}]{1,40})\}\s?\{([^{}]{1,40})\}"), r" \1/\2"),
    (re.compile(r"\\[dtc]?frac\s?([0-9])([0-9])"), r" \1/\2"),
    (re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|bf|rm)\b\s?"), ""),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\(?:approx|equiv)\b"), "="),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\(?:left|right|displaystyle)\b|\^\{?\\circ\}?"), " "),
    (re.compile(r"\\[,;:>]|\\thinspace\b"), "\u2009"),
    (re.compile(r"\\([$%#&_{} ])"), r"\1"),
    (re.compile(r"\\[()\[\]]"), " "),
)
_MARKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\*\*|__|`|~|\}|(?<![\^_])\{"), " "),  # Markdown, and rests of LaTeX
)
_THIN_GROUPS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:\u2009[0-9]{3})+(?![0-9])")
_SPACED_GROUPS = re.compile(r"(?<![0-9.,])(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9])")
_CURRENCY = r"(?:[$\u20ac\u00a3\u00a5\u20b9]|(?:USD|EUR|GBP|Rs\.?)(?=[\s0-9]))"
_NOT_INSIDE = r"(?<![0-9A-Za-z^])(?<![0-9A-Za-z]_)(?<![\^_]\{)"  # not a part of a word, an index or an exponent
_RUN = rf"(?:{_NOT_INSIDE}(?<!\.)\.|{_NOT_INSIDE})[0-9][0-9.,:'\u2019_]*"
_NUMBER = re.compile(
    r"(?=[-+\u2013.0-9$\u20ac\u00a3\u00a5\u20b9UEGR])"  # the first characters of a number; rejects most positions early
    rf"(?P<sign>[-+\u2013][ ]?)?(?P<currency>{_CURRENCY}\s?)?(?P<inner_sign>[-+])?(?P<run>{_RUN})"
    r"(?P<exponent>[eE][-+]?[0-9]{1,2}(?![0-9A-Za-z.])|\s?\*\s?10\s?\^\s?\{?\s?(?P<power>-?[0-9]{1,2})(?![0-9]))?"
    rf"(?:(?P<mixed>[ ]{{1,2}}[0-9]{{1,9}}/[0-9]{{1,9}}(?![0-9.,/]))|\s?/\s?(?P<denominator>{_RUN}))?"
)
_SHAPE = re.compile(  # 1,234,567 or 12,34,567
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}|[0-9]*)(?:\.[0-9]+)?"
)
SCALES = {"dozen": 12, "score": 20, "hundred": 100, "gross": 144, "k": 10**3, "thousand": 10**3, "lakh": 10**5}
SCALES |= {"million": 10**6, "crore": 10**7, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15}
"""Words that multiply the number before them."""
_SCALE = re.compile(rf"[\s-]{{0,2}}({'|'.join(SCALES)})(?:s|es)?\b", re.IGNORECASE)
_UNITS_IN_LATEX = "quad|qquad|degree|cent|hspace|end|checkmark|square|blacksquare|Box|newline|par|implies|R?rightarrow"
_VARIABLE = r"(?!(?:in|oz|yr|px|pc|cc|ea)\b)(?:[bcefijnopqruvwxyz]|(?<=[0-9])(?:a|[abcefijnopqruvwxyz]{2}))(?![A-Za-z])"
_GLUED = re.compile(
    r"\s?(?:[\^!]|_\{?[0-9A-Za-z]|-?[\u00b2\u00b3\u00b9\u2070-\u209c]|(?<=[0-9])[ie](?![A-Za-z])|[eE][-+]?[0-9]"
    r"|[-+*/\u00f7\u2013\u2014x]\s?[$\u20ac\u00a3]?\.?[0-9]"
    rf"|[MB](?![A-Za-z])|\u03c0|pi(?![A-Zb-qs-z])|{_VARIABLE}|[\u221a-\u221c]|\\(?!(?:{_UNITS_IN_LATEX})\b)[A-Za-z])"
)


@dataclass(frozen=True)
class FoundNumber:
    """A number in a normalized text. `value` is None for a malformed number (`5:30`, `1/0`); `4 dozen` is 48."""

    start: int
    end: int
    value: Fraction | None


def normalize(text: str) -> str:
    """Replace Unicode and LaTeX forms by ASCII ones, and join digits that thin spaces group."""
    if not text.isascii():
        text = _MINUS_AS_DASH.sub("-", with_ascii_digits(text).translate(_CHARACTERS))
    for pattern, replacement in _LATEX if "\\" in text else _LATEX[:1]:
        text = pattern.sub(replacement, text)
    for pattern, replacement in _MARKS:
        text = pattern.sub(replacement, text)
    if "\u2009" in text:
        text = _THIN_GROUPS.sub(lambda match: match.group().replace("\u2009", ""), text).replace("\u2009", " ")
    return text


def with_ascii_digits(text: str) -> str:
    """Return the text with the decimal digits of all scripts as `0` to `9`."""
    return _DIGITS_OF_OTHER_SCRIPTS.sub(lambda match: str(unicodedata.decimal(match.group())), text)


def join_spaced_groups(text: str) -> str:
    """Join `1 234 567` to `1234567`. Only for a text with one answer: prose may contain adjacent numbers."""
    return _SPACED_GROUPS.sub(lambda match: match.group().replace(" ", ""), text)


def find_numbers(text: str, last: int | None = None) -> list[FoundNumber]:
    """Return the numbers of a normalized text from left to right; with `last`, only that many at its end."""
    matches = list(_NUMBER.finditer(text))
    return [_read_number(match, text) for match in (matches if last is None else matches[-last:])]


def joins_number(tail: str) -> bool:
    """Return True if the normalized text behind a number belongs to its term: a power, a variable, another factor."""
    return _GLUED.match(tail) is not None or _GLUED.match(f"0{tail}", 1) is not None


def _read_number(match: re.Match[str], text: str) -> FoundNumber:
    run = match["run"].rstrip(".,:'\u2019_")
    end = match.end() if match["denominator"] or match["mixed"] or match["exponent"] else match.start("run") + len(run)
    sign_is_operator = match["sign"] is not None and _ends_a_term(text, match.start())
    start = match.end("sign") if sign_is_operator else match.start()
    malformed = FoundNumber(start, end, None)
    value = _parse_decimal(run)
    if value is None or _GLUED.match(text, end) is not None or _touches_other_numeral(text, start, end):
        return malformed
    if match["power"]:
        value *= Fraction(10) ** int(match["power"])
    elif match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"][1:])
    if match["mixed"]:
        numerator, denominator = (int(part) for part in match["mixed"].split("/"))
        if denominator == 0 or value.denominator != 1:
            return malformed
        value += Fraction(numerator, denominator)
    elif match["denominator"]:
        stripped = match["denominator"].rstrip(".,:'\u2019_")
        end -= len(match["denominator"]) - len(stripped)
        divisor = _parse_decimal(stripped)
        if not divisor or _GLUED.match(text, end) is not None:
            return malformed
        value /= divisor
    outer = None if sign_is_operator or match["sign"] is None else match["sign"].strip()
    if (match["inner_sign"] and match["sign"]) or _has_sign_before(text, match.start()):
        return malformed  # `--5`
    if (outer in ("-", "\u2013")) != (match["inner_sign"] == "-"):
        value = -value
    scale = _SCALE.match(text, end)
    if scale is None:
        return FoundNumber(start, end, value)
    return FoundNumber(start, scale.end(), value * SCALES[scale[1].lower()])


def _has_sign_before(text: str, position: int) -> bool:
    return text[position : position + 1] in ("-", "+") and text[max(0, position - 2) : position].strip()[-1:] in (
        "-",
        "+",
    )


def _touches_other_numeral(text: str, start: int, end: int) -> bool:
    """Return True if a numeral that is no digit is next to the number: `42\u4e07` is 420,000, `4\u00b2` is 16."""
    behind = text[end : end + 2].lstrip(" ")[:1]
    return text[max(0, start - 1) : start].isnumeric() or (behind.isnumeric() and not behind.isascii())


def _ends_a_term(text: str, position: int) -> bool:
    """Return True when an operand or a word ends at `position`, so that a sign there is a binary operator."""
    before = text[max(0, position - 2) : position]
    if not before.strip():
        return False
    glued = before[-1]
    return glued.isalnum() or glued in ")]%" or (glued == " " and (before.strip()[-1:].isdigit() or before[0] in ")]"))


def _parse_decimal(run: str) -> Fraction | None:
    """Return the value of a form like `1,234.50`, `.5` or `007`; None for other forms (`1.2.3`, `5:30`, `12,34`)."""
    if len(run) > MAX_DIGITS or _SHAPE.fullmatch(run) is None or not run:
        return None
    return Fraction(run.replace(",", ""))
