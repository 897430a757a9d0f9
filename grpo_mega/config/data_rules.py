"""Rules for the sets in `data.train` and `data.eval`, and the pattern in which weighted sets alternate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction

from grpo_mega.config.data_sections import DataConfig, DataSource, RowFilter
from grpo_mega.types import UserError

MAX_PATTERN = 100_000

# Arguments of transformers' apply_chat_template that this program sets itself.
# fmt: off
_TEMPLATE_ARGUMENTS = frozenset((
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
    "truncation",
))
# fmt: on


def check_data(data: DataConfig) -> None:
    """Raise UserError for the first broken rule."""
    for key, sources in (("data.train", data.train_sets), ("data.eval", data.eval_sets)):
        if not sources and getattr(data, key.removeprefix("data.")) is not None:
            raise UserError(f"{key}=[] must list at least one set", remedy="add a set, for example {path: train.jsonl}")
        _check_names(key, sources)
        for position, source in enumerate(sources):
            where = f"{key}[{position}]"
            _check_hub_keys(where, source)
            _check_token_bounds(where, source, data)
            for number, row_filter in enumerate(source.filters):
                _check_filter(f"{where}.filters[{number}]", row_filter)
    _check_weights(data)
    _check_chat_template(data)


def pattern_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the prompts of each set in one pattern: the smallest integers in the ratio of `weights`.

    Example: (0.3, 0.7) -> (3, 7). Weights are read as exact decimal fractions.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scaled = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]
    return tuple(count // math.gcd(*scaled) for count in scaled)


def _check_names(key: str, sources: Sequence[DataSource]) -> None:
    seen: dict[str, int] = {}
    for position, source in enumerate(sources):
        name = source.label
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(
                f"{key}[{position}].name={name!r} must consist of letters, digits, _, . and -: it is part of metric "
                "names",
                remedy="rename the set",
            )
        if name in seen:
            raise UserError(
                f"{key}[{position}].name={name!r} must be unique: {key}[{seen[name]}] has the same name",
                remedy="set another name for one of them",
            )
        seen[name] = position


def _check_hub_keys(where: str, source: DataSource) -> None:
    for name in ("config", "revision"):
        if getattr(source, name) is not None and not source.is_on_hub:
            raise UserError(
                f"{where}.{name}={getattr(source, name)} has no effect: path={source.path} is not the name of a data "
                "set on the hub",
                remedy="leave it out, or correct the path",
            )


def _check_token_bounds(where: str, source: DataSource, data: DataConfig) -> None:
    low, high = source.min_prompt_tokens, source.max_prompt_tokens
    if high is not None and high > data.max_prompt_tokens:
        raise UserError(
            f"{where}.max_prompt_tokens={high} must be at most data.max_prompt_tokens={data.max_prompt_tokens}, which "
            "applies to all sets",
            remedy=f"use {data.max_prompt_tokens} or less",
        )
    highest = high if high is not None else data.max_prompt_tokens
    if low is not None and low > highest:
        raise UserError(
            f"{where}.min_prompt_tokens={low} must be at most the largest number of tokens, {highest}",
            remedy=f"use {highest} or less",
        )


def _check_filter(where: str, row_filter: RowFilter) -> None:
    low, high, any_of = row_filter.min, row_filter.max, row_filter.any_of
    if (any_of is None) == (low is None and high is None):
        raise UserError(
            f"{where}.key={row_filter.key!r} needs either bounds (min, max or both) or any_of",
            remedy="set one of them",
        )
    if any_of == ():
        raise UserError(f"{where}.any_of=[] must list at least one value", remedy="add a value")
    if low is not None and high is not None and low > high:
        raise UserError(f"{where}.min={low} must be at most {where}.max={high}", remedy="exchange them")


def _check_weights(data: DataConfig) -> None:
    for position, source in enumerate(data.eval_sets):
        if source.weight != 1.0:
            raise UserError(
                f"data.eval[{position}].weight={source.weight} does nothing: held-out sets are evaluated completely",
                remedy=f"remove data.eval[{position}].weight",
            )
    sources = data.train_sets
    if len(sources) == 1 and sources[0].weight != 1.0:
        raise UserError(
            f"data.train[0].weight={sources[0].weight} does nothing with one set", remedy="remove data.train[0].weight"
        )
    if sources and (length := sum(pattern_of([source.weight for source in sources]))) > MAX_PATTERN:
        raise UserError(
            f"data.train: the weights {[source.weight for source in sources]} repeat after {length} prompts, which "
            f"must be at most {MAX_PATTERN}",
            remedy="round the weights to fewer digits",
        )


def _check_chat_template(data: DataConfig) -> None:
    for key in ("chat_template", "chat_template_kwargs"):
        if data.template == "plain" and (value := getattr(data, key)):
            raise UserError(
                f"data.{key}={value} has no effect with data.template=plain", remedy="use data.template=chat"
            )
    for name, value in data.chat_template_kwargs.items():
        if name in _TEMPLATE_ARGUMENTS:
            raise UserError(f"data.chat_template_kwargs.{name} is set by this program", remedy=f"remove {name}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"data.chat_template_kwargs.{name}={value!r} is not a JSON value ({error})",
                remedy="use text, numbers, true, false, null, lists and mappings",
            ) from error
