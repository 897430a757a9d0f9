r"""Decide whether an answer is right, given the text of the reference answer.

An answer is right in one of two cases: its tokens are those of the reference, or both can be parsed completely and
are equal. An answer that names several values is right only if the reference names the same ones.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from grpo_mega.rewards.math_answers.answers import MathAnswer, parse_answer, split_at_top
from grpo_mega.rewards.math_answers.comparable_tokens import answer_tokens, comparable_texts
from grpo_mega.rewards.math_answers.exact import (
    UndefinedError,
    contains_minus_plus,
    depends_on,
    fraction_value,
    sign_variants,
)
from grpo_mega.rewards.math_answers.expressions import MAX_TOKENS, Expression, UnreadableError, parse_expression
from grpo_mega.rewards.math_answers.interval_sets import (
    are_equal_regions,
    increasing_relation,
    read_region,
    variable_of,
)
from grpo_mega.rewards.math_answers.scalars import are_equal_scalars, are_proportional, difference
from grpo_mega.rewards.math_answers.tokens import Token
from grpo_mega.rewards.math_answers.units import NOT_UNITS, read_unit

MAX_ANSWER_CHARACTERS = 2000
_MAX_VARIANTS = 16
_MAX_ITEMS = 60
_PERCENT = frozenset((("percent", 1),))
_HUNDREDTH = Expression("number", (1, 1, -2))
_NOTHING = ("no", "solution"), ("no", "solutions")


def is_right(answer: str, reference: str) -> bool:
    """Return True when the answer equals the reference answer."""
    if len(answer) > MAX_ANSWER_CHARACTERS + 2 * len(reference):
        return False
    expected, forms = _read_reference(reference)
    tokens = answer_tokens(answer)
    if not tokens:
        return False
    if comparable_texts(tokens) == expected:
        return True
    if not forms or len(tokens) > MAX_TOKENS:
        return False
    if _parses_and_agrees(tokens, forms):
        return True
    lists = [form for form in forms if form.kind == "list"]
    separate = answer_tokens(answer, join_thousands=False) if lists else tokens
    return separate != tokens and _parses_and_agrees(separate, lists)  # 40,200 where the reference is 40, 200


def _parses_and_agrees(tokens: Sequence[Token], forms: Sequence[MathAnswer]) -> bool:
    try:
        parsed = _with_variants(parse_answer(tokens))
        return any(_agree(form, parsed) for form in forms)
    except (UnreadableError, UndefinedError):
        return False


def is_prose(reference: str) -> bool:
    """Return True when a reference is compared as words: it contains a word, and is no formula, list or number."""
    forms = _read_reference(reference)[1]
    has_word = any(token.kind == "word" for token in answer_tokens(reference))
    return has_word and all(form.kind == "words" for form in forms)


@functools.lru_cache(maxsize=4096)
def _read_reference(reference: str) -> tuple[tuple[str, ...], tuple[MathAnswer, ...]]:
    r"""Return the comparable tokens of a reference, and its parsed forms.

    There may be several: `x \le 2: (-\infty, 2]` has both halves, and a chain of equations that
    cannot be parsed has its last member.
    """
    tokens = answer_tokens(reference)
    alternatives = [tokens]
    halves = [part for part, _ in split_at_top(tokens, (":",))]
    if len(halves) == 2 and any(token.text in ("<", ">", "<=", ">=", "empty") for token in tokens):
        alternatives += [half for half in halves if half]
    members = [part for part, _ in split_at_top(tokens, ("=", "~="))]
    if len(members) > 1 and members[-1] and not any(token.kind == "word" for token in tokens):
        alternatives.append(members[-1])
    forms: list[MathAnswer] = []
    for alternative in alternatives:
        try:
            form = _with_variants(parse_answer(alternative))
        except (UnreadableError, UndefinedError):
            continue
        if alternative is not members[-1] or not forms:
            forms.append(form)
    forms += [] if forms else _value_with_unknown_unit(tokens)
    return comparable_texts(tokens), tuple(dict.fromkeys(forms))


def _value_with_unknown_unit(tokens: Sequence[Token]) -> list[MathAnswer]:
    """Return the value of a reference like `5 widgets`, with the words behind it as its unit."""
    position = len(tokens)
    while position and tokens[position - 1].kind == "word" and tokens[position - 1].text.casefold() not in NOT_UNITS:
        position -= 1
    if position in (0, len(tokens)) or any(token.kind == "word" for token in tokens[:position]):
        return []
    try:
        form = _with_variants(parse_answer(tokens[:position]))
    except (UnreadableError, UndefinedError):
        return []
    name = " ".join(token.text.casefold() for token in tokens[position:])
    return [form._replace(unit=frozenset(((name, 1),)))] if form.kind == "scalar" and form.unit is None else []


def _with_variants(answer: MathAnswer) -> MathAnswer:
    r"""Replace `\pm` by the values that it stands for, and a chain of equal values by one of them.

    Raises:
        UnreadableError: the members of a chain differ (`1 = 2 = 3`).
    """
    if answer.kind == "chain":
        return _chain_value(answer)
    if answer.kind in ("list", "set"):
        items: list[MathAnswer] = []
        for item in answer.parts[0]:
            expanded = _with_variants(item)
            items += expanded.parts[0] if expanded.kind == "list" and expanded.separator == "pm" else [expanded]
        if len(items) > _MAX_ITEMS:
            raise UnreadableError
        return answer._replace(parts=(tuple(items),))
    if answer.kind == "scalar":
        variants = [answer._replace(parts=(value,), label=()) for value in sign_variants(answer.parts[0])]
        return _variant_list(answer, variants)
    if answer.kind == "bracket":
        return _bracket_variants(answer)
    return answer


def _bracket_variants(answer: MathAnswer) -> MathAnswer:
    opening, closing, items = answer.parts
    if not all(item.kind == "scalar" for item in items):
        return answer
    choices = [sign_variants(item.parts[0]) for item in items]
    if any(contains_minus_plus(item.parts[0]) for item in items):
        together: list[tuple[Expression, ...]] = [tuple(choice[k % len(choice)] for choice in choices) for k in (0, -1)]
    else:
        together = list(itertools.islice(itertools.product(*choices), _MAX_VARIANTS + 1))
    if len(together) > _MAX_VARIANTS:
        raise UnreadableError
    variants = [
        answer._replace(
            parts=(opening, closing, tuple(i._replace(parts=(v,)) for i, v in zip(items, values, strict=True))),
            label=(),
        )
        for values in together
    ]
    return _variant_list(answer, variants)


def _variant_list(answer: MathAnswer, variants: list[MathAnswer]) -> MathAnswer:
    if len(variants) == 1:
        return variants[0]._replace(label=answer.label)
    return MathAnswer("list", (tuple(variants),), label=answer.label, separator="pm")


def _chain_value(answer: MathAnswer) -> MathAnswer:
    members, operators = answer.parts
    members = tuple(_with_variants(member) for member in members)
    if len(members) == 2 and operators == ("=",) and all(member.kind == "scalar" for member in members):
        sides = tuple(member.parts[0] for member in members)
        if depends_on(difference(*sides)) and not are_equal_scalars(*sides):
            return MathAnswer("relation", (operators, sides), label=answer.label)
    first: MathAnswer = members[0]
    for operator, member in zip(operators, members[1:], strict=True):
        is_approximation = operator == "~=" and _is_approximation(first, member)
        if not is_approximation and not _agree(first, member):
            raise UnreadableError
    return first._replace(label=answer.label)


def _is_approximation(exact: MathAnswer, rounded: MathAnswer) -> bool:
    r"""Return True for `\sqrt{2} \approx 1.41`: the decimal number is the exact one, rounded to its digits."""
    if exact.kind != "scalar" or rounded.kind != "scalar" or rounded.parts[0].kind != "number":
        return False
    _, _, power = rounded.parts[0].args
    scale = Expression("number", (1, 1, -power))
    half = Expression("number", (5, 1, -1))
    scaled = Expression("floor", (Expression("add", (Expression("multiply", (exact.parts[0], scale)), half)),))
    return power < 0 and are_equal_scalars(scaled, Expression("multiply", (rounded.parts[0], scale)))


def _agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    named = _named_values(reference), _named_values(answer)
    if named[0] and named[1]:
        return named[0].keys() == named[1].keys() and all(_agree(v, named[1][k]) for k, v in named[0].items())
    for values, other in ((named[0], answer), (named[1], reference)):
        if values and other.kind == "bracket" and not other.label and other.parts[:2] == ("(", ")"):
            order = sorted(values, key=lambda key: [token.text for token in key])
            return _agree_in_order([values[key] for key in order], other.parts[2])
    if reference.kind == "relation" or answer.kind == "relation":
        return _relations_agree(reference, answer)
    if reference.label and answer.label and reference.label != answer.label:
        return _relations_agree(reference, answer)
    return _values_agree(reference, answer)


def _named_values(answer: MathAnswer) -> dict[tuple[Token, ...], MathAnswer] | None:
    r"""Return the values of `x=1, y=2` or `(x, y)=(1, 2)` by their labels; None for another kind of answer."""
    if answer.kind == "list" and not answer.label:
        named = {item.label: item._replace(label=()) for item in answer.parts[0] if item.label}
        return named if len(named) == len(answer.parts[0]) > 1 else None
    if answer.kind == "set" and len(answer.parts[0]) > 1:
        return _named_values(MathAnswer("list", answer.parts))
    if answer.kind == "bracket" and answer.label and answer.label[0].text == "(":
        names = [tuple(part) for part, _ in split_at_top(answer.label[1:-1], (",",))]
        if len(names) == len(set(names)) == len(answer.parts[2]):
            return dict(zip(names, answer.parts[2], strict=True))
    return None


def _values_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    kinds = reference.kind, answer.kind
    if kinds == ("scalar", "scalar"):
        return _scalars_agree(reference, answer)
    if kinds in (("bracket", "bracket"), ("colon", "colon")):
        if kinds[0] == "bracket" and reference.parts[:2] != answer.parts[:2]:
            return False
        first, second = (a.parts[2] if a.kind == "bracket" else a.parts for a in (reference, answer))
        return _agree_in_order(first, second)
    if kinds == ("matrix", "matrix"):
        rows = reference.parts[1], answer.parts[1]
        cells = [[MathAnswer("scalar", (cell,)) for row in side for cell in row] for side in rows]
        is_shape_equal = [len(row) for row in rows[0]] == [len(row) for row in rows[1]]
        return reference.parts[0] == answer.parts[0] and is_shape_equal and _agree_in_order(*cells)
    if set(kinds) <= {"list", "set"}:
        return _collections_agree(reference, answer)
    for one, other in ((reference, answer), (answer, reference)):
        is_one_value = one.kind == "set" and len(one.parts[0]) == 1 and not _is_empty_symbol(one.parts[0][0])
        if is_one_value and other.kind == "scalar":
            return _agree(one.parts[0][0], other)
        if one.kind == "words" and (other == MathAnswer("set", ((),)) or _is_empty_symbol(other)):
            return one.parts in _NOTHING
        if one == MathAnswer("set", ((),)) and _is_empty_symbol(other):
            return True
        if one.kind == "words" and len(one.parts) == 1 and all(token.kind == "symbol" for token in other.tokens):
            return bool("".join(token.text for token in other.tokens).casefold() == one.parts[0])  # east, \text{east}
    if kinds[0] == kinds[1] and kinds[0] in ("words", "dots"):
        return reference.parts == answer.parts
    if kinds in (("bracket", "scalar"), ("scalar", "bracket")):
        line = Expression("symbol", (r"\bb{R}",))
        is_line = any(a.kind == "scalar" and a.parts[0] == line for a in (reference, answer))
        return is_line and _regions_agree(reference, answer)
    for one, other in ((reference, answer), (answer, reference)):
        if (one.kind, other.kind) == ("list", "bracket"):
            return _regions_agree(reference, answer)  # x > 1 and x < 3
    if {"union", "difference"} & set(kinds):
        if kinds == ("union", "union") and _match_in_any_order(reference.parts, answer.parts):
            return True
        return _regions_agree(reference, answer)
    return False


def _is_empty_symbol(answer: MathAnswer) -> bool:
    return answer.kind == "scalar" and answer.parts[0] == Expression("symbol", ("empty",))


def _collections_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    reference, answer = _with_common_label(reference, answer), _with_common_label(answer, reference)
    if not answer.label and not any(item.label for item in answer.parts[0]):
        reference = _without_numbered_labels(reference)
    if not reference.label and not any(item.label for item in reference.parts[0]):
        answer = _without_numbered_labels(answer)
    first, second = reference.parts[0], answer.parts[0]
    if (_named_values(reference) is None) != (_named_values(answer) is None):
        return False  # x=1, y=2 is not 1, 2
    if any(item.kind == "dots" for item in (*first, *second)):
        return reference.kind == answer.kind and _agree_in_order(first, second)
    if reference.separator != answer.separator and any(item.kind in ("relation", "words") for item in first):
        return False
    if reference.kind == "set" or answer.kind == "set":
        return all(any(_agree(a, b) for b in second) for a in first) and all(
            any(_agree(a, b) for a in first) for b in second
        )
    return _match_in_any_order(first, second)


def _without_numbered_labels(answer: MathAnswer) -> MathAnswer:
    r"""Remove the labels of `x_1 = 2, x_2 = 3`: they number the values of one variable."""
    labels = [item.label for item in answer.parts[0]]
    is_numbered = all(
        len(label) >= 3 and label[1].text == "_" and label[-1 - (label[-1].text == "}")].text.isdigit()
        for label in labels
    )
    if len(labels) < 2 or not is_numbered or len({label[0] for label in labels}) > 1 or len(set(labels)) < len(labels):
        return answer
    return answer._replace(parts=(tuple(item._replace(label=()) for item in answer.parts[0]),))


def _with_common_label(numbered: MathAnswer, other: MathAnswer) -> MathAnswer:
    r"""Replace the labels of `x_1 = 2, x_2 = 3` by `x` if this is the label of the other list: `x = 2, 3`."""
    plain = _without_numbered_labels(numbered)
    if plain is numbered or len(other.label) != 1 or numbered.parts[0][0].label[:1] != other.label:
        return numbered
    return plain._replace(label=other.label)


def _agree_in_order(first: Sequence[MathAnswer], second: Sequence[MathAnswer]) -> bool:
    return len(first) == len(second) and all(_agree(a, b) for a, b in zip(first, second, strict=True))


def _match_in_any_order(first: Sequence[MathAnswer], second: Sequence[MathAnswer]) -> bool:
    if len(first) != len(second):
        return False
    rest = list(second)
    for item in first:
        match = next((k for k, other in enumerate(rest) if _agree(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _scalars_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    if reference.unit is None and answer.unit is not None:
        reference = _with_plain_unit(reference, answer)
    elif answer.unit is None and reference.unit is not None:
        answer = _with_plain_unit(answer, reference)
    first, second = reference.parts[0], answer.parts[0]
    if reference.unit is not None and answer.unit is not None and reference.unit != answer.unit:
        return False
    if reference.unit is None and _is_ambiguous_letter(answer):
        return False
    if are_equal_scalars(first, second):
        return True
    if (reference.unit == _PERCENT) == (answer.unit == _PERCENT):
        return False
    percent, other = (first, second) if reference.unit == _PERCENT else (second, first)
    return fraction_value(other) is not None and are_equal_scalars(Expression("multiply", (percent, _HUNDREDTH)), other)


def _is_ambiguous_letter(answer: MathAnswer) -> bool:
    """Return True for a unit of one capital letter: `5 K` may be 5000, and `5 N` may be a product."""
    has_one_unit = answer.unit is not None and len(answer.unit) == 1
    return has_one_unit and len(answer.tokens[-1].text) == 1 and answer.tokens[-1].text.isupper()


def _with_plain_unit(answer: MathAnswer, other: MathAnswer) -> MathAnswer:
    """Read letters behind a number as a unit if the other answer has this unit: `5 m`, when the other is `7 m`."""
    tokens = list(answer.tokens)
    for position in range(1, len(tokens)):
        if tokens[position].kind not in ("symbol", "upright"):
            continue
        rest = [Token("upright", text) if kind == "symbol" else Token(kind, text) for kind, text in tokens[position:]]
        if read_unit(rest) == other.unit:
            try:
                return answer._replace(parts=(parse_expression(tokens[:position]),), unit=other.unit)
            except UnreadableError:
                return answer
    return answer


def _relations_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    if reference.label == answer.label or not (reference.label and answer.label):
        names = variable_of(reference), variable_of(answer)
        same_variable = reference.kind != answer.kind or names[0] == names[1]
        if same_variable and _regions_agree(reference, answer):
            return True
    first, second = _as_relation(reference), _as_relation(answer)
    if first is None or second is None:
        return False
    first, second = increasing_relation(*first), increasing_relation(*second)
    if len(first[0]) > 1 or len(second[0]) > 1:
        same_sides: Callable[[Any, Any], bool] = are_equal_scalars
        return first[0] == second[0] and all(map(same_sides, first[1], second[1]))
    (op_a,), (left_a, right_a) = first
    (op_b,), (left_b, right_b) = second
    is_order = op_a in ("<", "<=")
    return op_a == op_b and are_proportional(
        difference(left_a, right_a), difference(left_b, right_b), positive=is_order
    )


def _as_relation(answer: MathAnswer) -> tuple[tuple[str, ...], tuple[Expression, ...]] | None:
    if answer.kind == "relation":
        operators, sides = answer.parts
        return operators, sides
    if answer.kind == "scalar" and answer.label:
        try:
            return ("=",), (parse_expression(answer.label), answer.parts[0])
        except UnreadableError:
            return None
    return None


def _regions_agree(reference: MathAnswer, answer: MathAnswer) -> bool:
    first, second = read_region(reference), read_region(answer)
    return first is not None and second is not None and are_equal_regions(first, second)
