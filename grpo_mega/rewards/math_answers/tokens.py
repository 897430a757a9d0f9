r"""Split an answer in LaTeX or plain text into tokens.

Equivalent spellings get the same token: `\dfrac` and `\frac`, `\leqslant` and `<=`, `²` and `^{2}`, `1{,}000` and
`1000`. Only layout is dropped: white space, sizes of brackets and dollar signs around formulas. Every other character
is part of a token, so two texts with equal tokens are equal.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from grpo_mega.rewards.math_answers.braces import closing_brace
from grpo_mega.rewards.math_answers.vocabulary import (
    COMMANDS,
    FONTS,
    FUNCTION_NAMES,
    GREEK,
    PLAIN_NAMES,
    STYLES,
    TEXT_COMMANDS,
    UNICODE,
    WORDS,
    split_words,
)


class Token(NamedTuple):
    """A token. `kind` is one of number, symbol, upright, word, function, mark and unknown."""

    kind: str
    text: str


_NAME_OF_CAPITALS = 3  # from this length on, a run of capital letters is one name: `ABC` is not `BAC`
_LONGEST_PRODUCT = 4  # a longer run of letters is a word: `abcd` is a product, `apples` is a word
_WORDS_OR_PRODUCTS = frozenset(("at", "by", "is", "to", "so"))
_OPERATORS_BEFORE = frozenset("+-*/^({")
_OPERATORS_BEHIND = frozenset("^_+*/")
_SUPERSCRIPTS = {"⁰": "0", "¹": "1", "²": "2", "³": "3", "⁴": "4", "⁵": "5", "⁶": "6", "⁷": "7", "⁸": "8", "⁹": "9"}
_SUPERSCRIPTS |= {"⁻": "-", "⁺": "+", "ⁿ": "n", "ˣ": "x"}
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT_RUN = re.compile("[₀-₉]+")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|°|\\degree(?:s)?(?![A-Za-z])")
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_NULL_DELIMITER = re.compile(r"\\(?:left|right)\s*\.")
_SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|mathstrut|rm|bf|it|large|Large|LARGE"
    r"|huge|Huge|normalsize|small)(?![A-Za-z])|\\(?:text)?color\s*(?:\[\w+\]\s*)?\{[\w!. ,]*\}"
)
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:\{,\}|\\,|\\!|,\\!\s?|\\ |\\;|~|[\u2009\u202f\u00a0])\d{3})+)(?!\d)")
_SPACED = re.compile(r"(?<![\d.,])(?<!\d )([1-9]\d{0,2})((?: \d{3})+)(?! ?\d)")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_REPEATING = re.compile(r"(\d*\.\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?(?!\d)")
_INFIX = re.compile(r"\{([^{}]*)\\(over|choose|atop)(?![A-Za-z])([^{}]*)\}")
_BASES = dict(zip(split_words("two three four five six seven eight nine ten"), range(2, 11), strict=True))
_BASE_IN_WORDS = re.compile(rf"(?<=\d)_\{{\s*\\(?:text|mathrm)\s*\{{\s*({'|'.join(_BASES)})\s*\}}\s*\}}")
_ROW_END = re.compile(r"\\\\(?:\*?\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|mu)\s*\])?")  # `\\[2pt]`
_COLON = re.compile(r"\{\s*:\s*\}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?!\d)|\d{1,2}/\d{1,2}/\d{4}(?!\d)")
_TIME_OF_DAY = re.compile(r"\b([AaPp])\.\s?([Mm])(?:\.|\b)")
_NUMBER = re.compile(r"\d*\.\d*\(\d+\)_|\d+(?:\.\d+)?|\.\d+")
_SCIENTIFIC = re.compile(r"[eE][-+]?\d+(?![\d.A-Za-z])")
_LETTERS = re.compile(r"[A-Za-z]+")
_COMMAND = re.compile(r"\\(?:[A-Za-z]+\*?|.)", re.DOTALL)
_PLAIN_MARK = re.compile(r"\*\*|<=|>=|!=|==|\.\.\.+|->|=>|[-+*/^_!'=<>,;:|.()\[\]{}&%@#?\"~`]")
_MARKS = {"**": "^", "==": "=", "\u2026": "...", "->": "arrow", "=>": "arrow", "%": "percent", "&": "amp"}
_GROUP_START = re.compile(r"\s*\{")
_ARRAY_COLUMNS = re.compile(r"\s*(?:\[[a-z]\]\s*)?\{[lcrp|\s@{}!*0-9.]*?\}")


def normalize_text(text: str) -> str:
    """Replace Unicode signs and equivalent LaTeX layout by one spelling, and join digits that thin spaces group."""
    if not text.isascii():
        text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + "".join(_SUPERSCRIPTS[c] for c in run.group()) + "}", text)
        text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + "".join(chr(ord(c) - 0x2050) for c in run.group()) + "}", text)
        text = "".join(UNICODE.get(c) or _ascii_form(c) for c in text)
    text = _COLON.sub(":", text)
    text = _TIME_OF_DAY.sub(r"\1\2", text)
    text = _GROUPED.sub(lambda match: match[1] + re.sub(r"[^\d]", "", match[2]), text)
    text = _SPACED.sub(lambda match: match[1] + match[2].replace(" ", ""), text)
    if "\\" in text or "$" in text:
        text = _BASE_IN_WORDS.sub(lambda match: f"_{{{_BASES[match[1]]}}}", text)
        text = _NULL_DELIMITER.sub(r" \\nulldelimiter ", text)
        text = _SIZES.sub(" ", _DELIMITERS.sub(" ", _ROW_END.sub(r"\\row ", text)))
        text = _REPEATING.sub(r"\1(\2)_", text)
        if "\\over" in text or "\\choose" in text:
            text = _INFIX.sub(_prefix_form, text)
    return _DEGREES.sub(r" \\degree ", text) if "\\" in text or "°" in text else text


def _prefix_form(match: re.Match[str]) -> str:
    r"""Return `\frac{1}{2}` for `{1 \over 2}` and `\binom{5}{2}` for `{5 \choose 2}`."""
    command = {"over": r"\frac", "choose": r"\binom"}.get(match[2])
    return match.group() if command is None else f"{{{command}{{{match[1]}}}{{{match[3]}}}}}"


def _ascii_form(character: str) -> str:
    if character.isascii():
        return character
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    plain = unicodedata.normalize("NFKC", character)  # full-width letters and mathematical alphanumerics
    return plain if len(plain) == 1 and plain.isascii() and not plain.isdigit() else character


def tokenize(text: str, *, join_thousands: bool = True) -> list[Token]:
    """Return all tokens of a text. With `join_thousands`, `1,000` outside of brackets is one number."""
    tokens = _Tokenizer(normalize_text(text), join_thousands).tokens
    if any(kind == "symbol" and text.startswith(("\\vec{", "\\hat{")) for kind, text in tokens):
        return tokens  # a cross product is no dot product
    sides = zip(tokens, tokens[1:], tokens[2:], strict=False)
    if any(mark.text == "times" and left.text.isupper() and right.text.isupper() for left, mark, right in sides):
        return tokens  # the product of two sets
    return [Token("mark", "*") if token == ("mark", "times") else token for token in tokens]


class _Tokenizer:
    def __init__(self, text: str, join_thousands: bool, *, in_words: bool = False) -> None:
        self.text, self.position, self.in_words = text, 0, in_words
        self.join_thousands = join_thousands
        self.depth = 0  # of ( [ \{, in which a comma separates
        self.tokens: list[Token] = []
        while self.position < len(text):
            self._read_one()

    def _add(self, kind: str, text: str) -> None:
        self.tokens.append(Token(kind, text))
        if kind == "mark":
            if text in ("(", "[", "\\{"):
                self.depth += 1
            elif text in (")", "]", "\\}"):
                self.depth -= 1

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match.group()

    def _read_one(self) -> None:
        character = self.text[self.position]
        if character.isspace():
            self.position += 1
        elif character.isdigit() or (character == "." and self.text[self.position + 1 : self.position + 2].isdigit()):
            self._read_number()
        elif character == "\\":
            self._read_command()
        elif character.isascii() and character.isalpha():
            letters = self._take(_LETTERS)
            assert letters is not None
            self._add_letters(letters)
        else:
            self._read_mark()

    def _read_number(self) -> None:
        date = self._take(_DATE) if not self.tokens or self.tokens[-1].kind != "number" else None
        if date is not None:
            self._add("unknown", date)
            return
        grouped = self._take(_THOUSANDS) if self.join_thousands and self.depth == 0 else None
        if grouped is not None:
            digits = grouped.replace(",", "")
            if self.text[self.position : self.position + 1] == ".":
                digits += (self._take(_NUMBER) or "").removesuffix("_")
        else:
            digits = (self._take(_NUMBER) or "").removesuffix("_")
        if not digits:  # a digit that is not a decimal digit, such as a circled one
            self._add("unknown", self.text[self.position])
            self.position += 1
            return
        exponent = self._take(_SCIENTIFIC) if not digits.endswith(")") else None
        self._add("number", digits + (exponent or "").lower())

    def _read_mark(self) -> None:
        mark = self._take(_PLAIN_MARK)
        if mark is None:
            self._add("unknown", self.text[self.position])
            self.position += 1
        elif mark != "~" or (not self.tokens and self.text[self.position : self.position + 1].isdigit()):  # ~5: about 5
            mark = "..." if mark.startswith("...") else mark
            self._add("mark", _MARKS.get(mark, mark))

    def _add_letters(self, letters: str) -> None:
        lower = letters.casefold()
        if self.in_words:
            self._add("word", letters)
        elif letters in PLAIN_NAMES:
            self._add(*PLAIN_NAMES[letters])
        elif len(letters) >= _NAME_OF_CAPITALS and letters.isupper():
            self._add("symbol", letters)
        elif len(letters) > _LONGEST_PRODUCT or (len(letters) > 1 and lower in WORDS and not self._is_product(letters)):
            self._add("word", letters)
        else:
            for letter in letters:
                self._add("symbol", letter)

    def _is_product(self, letters: str) -> bool:
        r"""Return True for letters like `at` that an operator touches: `at^2`, `ax+by`."""
        start = self.position - len(letters)
        return letters in _WORDS_OR_PRODUCTS and (
            self.text[max(0, start - 1) : start] in _OPERATORS_BEFORE
            or self.text[self.position : self.position + 1] in _OPERATORS_BEHIND
        )

    def _read_command(self) -> None:
        command = self._take(_COMMAND)
        if command is None:
            self._add("unknown", "\\")
            self.position += 1
            return
        name = command[1:]
        if name in TEXT_COMMANDS:
            self._read_text_command(name)
        elif name in STYLES:
            self._read_styled(name)
        elif name in ("begin", "end"):
            group = self._group() or ""
            if name == "begin" and group in ("array", "tabular"):
                self._take(_ARRAY_COLUMNS)
            self._add("mark", f"{name} {group.rstrip('*')}")
        elif name in GREEK:
            self._add("symbol", GREEK[name])
        elif name in FUNCTION_NAMES:
            self._add("function", name)
        elif name in COMMANDS:
            token = COMMANDS[name]
            if token is not None:
                self._add(*token)
        else:
            self._add("unknown", command)

    def _group(self) -> str | None:
        r"""Return the content of the next `{...}` and move behind it; None when there is no closed group."""
        match = _GROUP_START.match(self.text, self.position)
        end = None if match is None else closing_brace(self.text, match.end())
        if match is None or end is None:
            return None
        self.position = end + 1
        return self.text[match.end() : end]

    def _read_text_command(self, name: str) -> None:
        content = self._group()
        if content is None:
            self._add("unknown", "\\" + name)
            return
        stripped = content.strip(" ~")
        if name in ("mathrm", "operatorname", "rm") and stripped in FUNCTION_NAMES:
            self._add("function", stripped)
        elif name != "text" and len(stripped) == 1 and stripped.isalpha():  # \mathrm{e}, or the unit of \mathrm{~N}
            self._add("symbol" if stripped in ("e", "i") else "upright", stripped)
        else:
            nested = _Tokenizer(content, self.join_thousands, in_words=True)
            for kind, text in nested.tokens:
                self._add(kind, text)

    def _read_styled(self, name: str) -> None:
        r"""Read `\mathbf{x}` or `\vec{v}` as one symbol, and a style around anything else as a group."""
        start = self.position
        content = self._group()
        if content is None:
            content = self._take(re.compile(r"\s*(?:[A-Za-z]|\\[A-Za-z]+)"))
        plain = (content or "").strip()
        if content is not None and re.fullmatch(r"\\?[A-Za-z]+'*", plain):
            self._add("symbol", f"\\{STYLES[name]}{{{plain}}}" if STYLES[name] else plain)
        elif content is not None and name in FONTS:
            self.position = start  # \mathbf{5}: the style is dropped, its group remains
        else:
            self.position = start
            self._add("unknown", "\\" + name)
