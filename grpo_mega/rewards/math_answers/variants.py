r"""Replace `\pm` by the values that it stands for, and a chain like `2+2 = 4` by its value."""

from __future__ import annotations

import itertools

from grpo_mega.rewards.math_answers.agreement import agree
from grpo_mega.rewards.math_answers.answers import MathAnswer
from grpo_mega.rewards.math_answers.exact import contains_minus_plus, depends_on, sign_variants
from grpo_mega.rewards.math_answers.expressions import Expression, UnreadableError
from grpo_mega.rewards.math_answers.scalars import are_equal_scalars, difference

_MAX_VARIANTS = 16
_MAX_ITEMS = 60


def with_variants(answer: MathAnswer) -> MathAnswer:
    r"""Replace `\pm` by the values that it stands for, and a chain of equal values by one of them.

    Raises:
        UnreadableError: the members of a chain differ (`1 = 2 = 3`).
    """
    if answer.kind == "chain":
        return _chain_value(answer)
    if answer.kind in ("list", "set"):
        items: list[MathAnswer] = []
        for item in answer.parts[0]:
            expanded = with_variants(item)
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
    members = tuple(with_variants(member) for member in members)
    if len(members) == 2 and operators == ("=",) and all(member.kind == "scalar" for member in members):
        sides = tuple(member.parts[0] for member in members)
        if depends_on(difference(*sides)) and not are_equal_scalars(*sides):
            return MathAnswer("relation", (operators, sides), label=answer.label)
    first: MathAnswer = members[0]
    for operator, member in zip(operators, members[1:], strict=True):
        is_approximation = operator == "~=" and _is_approximation(first, member)
        if not is_approximation and not agree(first, member):
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
