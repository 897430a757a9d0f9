r"""Parse tokens into the tree of one scalar expression. Every token is part of the tree, or the parse fails.

Notations with two readings fail: `1/2x`, `\sqrt23`, `x2`, `\sin 2(x+1)`. A whole number before a proper fraction is a
mixed number: `5 \frac{1}{4}` is 21/4. `f(x)` and `g(x)` are values of unknown functions; any other letter before a
bracket is a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo_mega.rewards.math_answers.tokens import Token

MAX_TOKENS = 600
_MAX_DEPTH = 40
_CLOSING = {"(": ")", "[": "]", "{": "}", "lfloor": "rfloor", "lceil": "rceil"}
_UNKNOWN_FUNCTIONS = frozenset(("f", "g"))
COMMUTATIVE_FUNCTIONS = frozenset(("\\gcd", "\\lcm", "\\max", "\\min"))
_ARGUMENT_KINDS = ("number", "symbol", "upright")


class UnreadableError(Exception):
    """The tokens are not a complete expression of the supported grammar."""


class Expression(NamedTuple):
    """A node of the tree. `args` are nodes, names or numbers, depending on `kind`.

    Kinds: number (mantissa, denominator, power of ten), symbol (name), add, multiply, divide, power, negate, factorial,
    root (degree, radicand), function (name, argument), log (base, argument), call (name, arguments), absolute, floor,
    ceiling, binomial, plus_minus (serial number, sign, argument), degrees, percent.
    """

    kind: str
    args: tuple[Any, ...]


def parse_expression(tokens: Sequence[Token]) -> Expression:
    """Return the expression that all tokens form.

    Raises:
        UnreadableError: the tokens form no expression, or one with two readings.
    """
    if not tokens or len(tokens) > MAX_TOKENS:
        raise UnreadableError
    if not _is_commutative(tokens):
        raise UnreadableError
    parser = _Parser(tokens)
    expression = parser.sum()
    if parser.position < len(tokens):
        raise UnreadableError
    return expression


def _is_commutative(tokens: Sequence[Token]) -> bool:
    r"""Return False where the order of factors matters: `\vec{a} \vec{b}`, and `A^{-1}B` of matrices."""
    num_vectors = sum(kind == "symbol" and text.startswith("\\vec{") for kind, text in tokens)
    if num_vectors == 0 and not any(kind == "symbol" and text.isupper() for kind, text in tokens):
        return True
    texts = [token.text for token in tokens]
    if num_vectors > 1 and any(
        follows_vector and (text in ("*", "times", "(") or text.startswith("\\vec{"))
        for follows_vector, text in zip((text.startswith("\\vec{") for text in texts), texts[1:], strict=False)
    ):
        return False
    capitals = {text for kind, text in tokens if kind == "symbol" and len(text) == 1 and text.isupper()}
    matrix_powers = (["^", "{", "-", "1"], ["^", "T"], ["^", "{", "T"])
    has_matrix = any(
        texts[k] in capitals and any(texts[k + 1 : k + 1 + len(power)] == power for power in matrix_powers)
        for k in range(len(texts))
    )
    return not (has_matrix and len(capitals - {"T"}) > 1)


def _derivative_part(tokens: Sequence[Token]) -> str | None:
    """Return a name for `dx`, `d^2 y` or `dx^2` as a part of a derivative; None for other tokens."""
    texts = [token.text for token in tokens if token.text not in ("{", "}")]
    if texts[:1] != ["d"] or len(texts) > 5 or any(token.kind not in ("symbol", "number", "mark") for token in tokens):
        return None
    return " ".join(texts)


def read_number(text: str) -> Expression:
    """Return the exact number of a token: `1.50`, `.5`, `2e10`, and `0.1(6)` for a repeating decimal."""
    digits, _, exponent = text.partition("e")
    power = int(exponent or "0") if len(exponent) < 12 else None
    if power is None or len(digits) > 2000:
        raise UnreadableError
    if digits.endswith(")"):
        start, _, repeated = digits[:-1].partition("(")
        whole, _, decimals = start.partition(".")
        scale = 10 ** len(decimals)
        nines = 10 ** len(repeated) - 1
        return Expression("number", (int(whole + decimals or "0") * nines + int(repeated), scale * nines, 0))
    whole, _, decimals = digits.partition(".")
    return Expression("number", (int(whole + decimals), 1, power - len(decimals)))


class _Parser:
    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens, self.position, self.depth, self.bars, self.num_plus_minus = tokens, 0, 0, 0, 0

    def peek(self) -> Token:
        return self.tokens[self.position] if self.position < len(self.tokens) else Token("end", "")

    def at(self, *marks: str) -> bool:
        token = self.peek()
        return token.kind == "mark" and token.text in marks

    def next(self) -> Token:
        token = self.peek()
        if token.kind == "end":
            raise UnreadableError
        self.position += 1
        return token

    def expect(self, mark: str) -> None:
        if not self.at(mark):
            raise UnreadableError
        self.position += 1

    def sum(self) -> Expression:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise UnreadableError
        terms = [self.signed(self.product)]
        while self.at("+", "-", "pm", "mp"):
            if self.at("+"):
                self.position += 1
                terms.append(self.signed(self.product) if self.at("-") else self.product())
            else:
                terms.append(self.signed(self.product))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Expression("add", tuple(terms))

    def signed(self, operand: Any) -> Expression:
        """Parse an operand with at most one sign. Raises UnreadableError for two signs (`--5`)."""
        if not self.at("+", "-", "pm", "mp"):
            return operand()  # type: ignore[no-any-return]
        sign = self.next().text
        if sign in ("pm", "mp"):
            serial = self.num_plus_minus
            self.num_plus_minus += 1
            return Expression("plus_minus", (serial, sign, operand()))
        value: Expression = operand()
        return value if sign == "+" else Expression("negate", (value,))

    def product(self) -> Expression:
        value, is_quotient = self.factor(), False
        while True:
            if self.at("*"):
                self.position += 1
                value, is_quotient = Expression("multiply", (value, self.signed(self.factor))), False
            elif self.at("/"):
                self.position += 1
                value, is_quotient = Expression("divide", (value, self.signed(self.factor))), True
            elif self.starts_factor():
                if is_quotient or (self.peek().kind == "number" and self.tokens[self.position - 1].text != "!"):
                    raise UnreadableError  # 1/2x, x2
                value = Expression("multiply", (value, self.factor()))
            else:
                return value

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind == "mark":
            return token.text in ("(", "[", "{", "lfloor", "lceil") or (token.text == "|" and self.bars == 0)
        return token.kind in ("number", "symbol", "upright", "function")

    def factor(self) -> Expression:
        return self.postfix(self.mixed_number() if self.peek().kind == "number" else self.base())

    def postfix(self, value: Expression) -> Expression:
        has_power = False
        while True:
            if self.at("^"):
                if has_power:
                    raise UnreadableError  # 9^9^9
                self.position += 1
                value, has_power = Expression("power", (value, self.exponent())), True
            elif self.at("!"):
                self.position += 1
                if self.at("!"):
                    raise UnreadableError
                value = Expression("factorial", (value,))
            elif self.at("degree", "percent"):
                value = Expression("degrees" if self.next().text == "degree" else "percent", (value,))
            else:
                return value

    def exponent(self) -> Expression:
        if self.at("{"):
            return self.bracketed()
        if self.peek().kind == "function" and self.peek().text not in ("frac", "sqrt"):
            raise UnreadableError
        return self.signed(self.base)

    def bracketed(self) -> Expression:
        closing = _CLOSING[self.next().text]
        bars, self.bars = self.bars, 0
        value = self.sum()
        self.bars = bars
        self.expect(closing)
        return value

    def mixed_number(self) -> Expression:
        r"""Parse a number, and a proper fraction behind it as a part of a mixed number (`2 1/2`, `2\frac{1}{2}`)."""
        first = self.next().text
        start = self.position
        if first.isdigit() and self.peek() == Token("function", "frac"):
            self.position += 1
            numerator, denominator = self.fraction_part(), self.fraction_part()
            if _is_proper(numerator, denominator):
                return Expression("add", (read_number(first), Expression("divide", (numerator, denominator))))
            if numerator.kind == denominator.kind == "number":
                raise UnreadableError  # 2 \frac{3}{2}
            self.position = start
        texts = [token.text for token in self.tokens[start : start + 3]]
        if first.isdigit() and len(texts) == 3 and texts[1] == "/" and texts[0].isdigit() and texts[2].isdigit():
            numerator, denominator = read_number(texts[0]), read_number(texts[2])
            if not _is_proper(numerator, denominator):
                raise UnreadableError
            self.position += 3
            return Expression("add", (read_number(first), Expression("divide", (numerator, denominator))))
        if self.at("_"):  # 101_2, a number in another base
            raise UnreadableError
        return read_number(first)

    def base(self) -> Expression:
        token = self.peek()
        if token.kind == "number":
            return read_number(self.next().text)
        if token.kind in ("symbol", "upright"):
            return self.symbol()
        if token.kind == "function":
            return self.function()
        if self.at("(", "[", "{"):
            return self.bracketed()
        if self.at("lfloor", "lceil"):
            kind = "floor" if token.text == "lfloor" else "ceiling"
            return Expression(kind, (self.bracketed(),))
        if self.at("|"):
            self.position += 1
            self.bars += 1
            value = self.sum()
            self.bars -= 1
            self.expect("|")
            return Expression("absolute", (value,))
        raise UnreadableError

    def symbol(self) -> Expression:
        name = self.next().text
        if name == "oo":
            return Expression("symbol", (name,))
        if self.at("_"):
            self.position += 1
            name += "_" + self.subscript()
        while self.at("'"):
            self.position += 1
            name += "'"
        if name in COMMUTATIVE_FUNCTIONS and not self.at("("):
            raise UnreadableError
        if self.at("(") and (name in COMMUTATIVE_FUNCTIONS or name.rstrip("'") in _UNKNOWN_FUNCTIONS):
            return self.call(name)
        return Expression("symbol", (name,))

    def subscript(self) -> str:
        if not self.at("{"):
            token = self.next()
            if token.kind not in ("number", "symbol", "upright", "word"):
                raise UnreadableError
            return token.text
        self.position += 1
        texts, depth = [], 1
        while depth:
            token = self.next()
            depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "mark" else 0
            texts.append(token.text)
        return " ".join(texts[:-1])

    def call(self, name: str) -> Expression:
        self.position += 1
        arguments = [self.sum()]
        while self.at(","):
            self.position += 1
            arguments.append(self.sum())
        self.expect(")")
        return Expression("call", (name, *arguments))

    def fraction_part(self) -> Expression:
        """Parse one argument of `frac`: a group, a digit or a symbol, as TeX reads them."""
        if self.at("{"):
            return self.bracketed()
        token = self.peek()
        if token.kind == "number":
            if not token.text.isdigit():
                raise UnreadableError
            if len(token.text) == 1:
                return read_number(self.next().text)
            if len(token.text) == 2:  # \frac12: the second digit is the other argument
                self.tokens = [
                    *self.tokens[: self.position],
                    *(Token("number", digit) for digit in token.text),
                    *self.tokens[self.position + 1 :],
                ]
                if self.tokens[self.position - 1] == Token("function", "frac"):
                    return read_number(self.next().text)
        elif token.kind in ("symbol", "upright"):
            return Expression("symbol", (self.next().text,))
        raise UnreadableError

    def function(self) -> Expression:
        name = self.next().text
        if name == "frac":
            derivative = self.derivative()
            if derivative is not None:
                return derivative
            return Expression("divide", (self.fraction_part(), self.fraction_part()))
        if name == "binom":
            return Expression("binomial", (self.fraction_part(), self.fraction_part()))
        if name in ("sqrt", "radical"):
            return self.root(is_command=name == "sqrt")
        base = exponent = None
        if name == "log" and self.at("_"):
            self.position += 1
            base = self.bracketed() if self.at("{") else self.base()
        if self.at("^"):
            self.position += 1
            exponent = self.exponent()
        argument = self.argument()
        value = Expression("log", (base, argument)) if base is not None else Expression("function", (name, argument))
        if exponent is None:
            return value
        if exponent == Expression("negate", (Expression("number", (1, 1, 0)),)):
            if name not in ("sin", "cos", "tan"):
                raise UnreadableError
            return Expression("function", ("arc" + name, argument))
        return Expression("power", (value, exponent))

    def derivative(self) -> Expression | None:
        r"""Parse the arguments of `\frac{dy}{dx}`: one name, in which `d` is no factor."""
        groups: list[str] = []
        position = self.position
        for _ in range(2):
            if position >= len(self.tokens) or self.tokens[position].text != "{":
                return None
            depth, end = 1, position + 1
            while depth and end < len(self.tokens):
                depth += {"{": 1, "}": -1}.get(self.tokens[end].text, 0)
                end += 1
            name = _derivative_part(self.tokens[position + 1 : end - 1])
            if name is None:
                return None
            groups.append(name)
            position = end
        if groups[1] == "d":
            return None
        self.position = position
        return Expression("symbol", (" / ".join(groups),))

    def root(self, *, is_command: bool) -> Expression:
        degree = Expression("number", (2, 1, 0))
        if is_command and self.at("["):
            degree = self.bracketed()
        token = self.peek()
        if is_command and token.kind == "number" and len(token.text) > 1:
            raise UnreadableError  # \sqrt23
        return Expression("root", (degree, self.base()))

    def argument(self) -> Expression:
        r"""Parse a function's argument: a bracket, or factors without one (`\sin 2\pi x`)."""
        if self.at("(", "{", "["):
            return self.bracketed()
        factors = [self.factor()]
        while self.peek().kind in ("symbol", "upright") or (self.peek() == Token("function", "sqrt")):
            factors.append(self.factor())
        if self.at("(", "[", "{") or (self.at("/") and len(factors) > 1):
            raise UnreadableError
        value = factors[0]
        for factor in factors[1:]:
            value = Expression("multiply", (value, factor))
        return value


def _is_proper(numerator: Expression, denominator: Expression) -> bool:
    return (
        numerator.kind == denominator.kind == "number"
        and numerator.args[1:] == denominator.args[1:] == (1, 0)
        and 0 < numerator.args[0] < denominator.args[0]
    )
