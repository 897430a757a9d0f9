"""Rules of the sets in `data.train` and `data.eval`, and how their weights become a pattern of prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from grpo_mega.config.data_sections import DataConfig, DataSource, RowFilter
from grpo_mega.types import UserError

MAX_PATTERN = 100_000


def check_data(data: DataConfig) -> None:
    """Raises UserError for the first broken rule."""
    for key, sources in (("data.train", data.train_sets), ("data.eval", data.eval_sets)):
        if not sources and getattr(data, key.removeprefix("data.")) is not None:
            raise UserError(f"{key}=[] names no set", remedy="list at least one {path: ...}")
        _names(key, sources)
        for position, source in enumerate(sources):
            where = f"{key}[{position}]"
            _tokens(where, source, data)
            for number, row_filter in enumerate(source.filters):
                _filter(f"{where}.filters[{number}]", row_filter)
    _weights(data)


def pattern_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Prompts of each set in one pattern: the least whole numbers in the ratio of `weights`, e.g. (0.3, 0.7) -> (3, 7).

    Read as decimal fractions, as they are written.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scaled = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]
    return tuple(count // math.gcd(*scaled) for count in scaled)


def _names(key: str, sources: Sequence[DataSource]) -> None:
    seen: dict[str, int] = {}
    for position, source in enumerate(sources):
        name = source.label
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(
                f"{key}[{position}].name={name!r} becomes part of a metric's name",
                remedy="use letters, digits, _, . and -",
            )
        if name in seen:
            raise UserError(
                f"{key}[{position}] has the name {name!r} of {key}[{seen[name]}]",
                remedy="give one of them another name",
            )
        seen[name] = position


def _tokens(where: str, source: DataSource, data: DataConfig) -> None:
    low, high = source.min_prompt_tokens, source.max_prompt_tokens
    if high is not None and high > data.max_prompt_tokens:
        raise UserError(
            f"{where}.max_prompt_tokens={high} is more than data.max_prompt_tokens={data.max_prompt_tokens}, which "
            "holds for all sets",
            remedy="lower it",
        )
    highest = high if high is not None else data.max_prompt_tokens
    if low is not None and low > highest:
        raise UserError(
            f"{where}.min_prompt_tokens={low} is more than the greatest number, {highest}", remedy="lower it"
        )


def _filter(where: str, row_filter: RowFilter) -> None:
    low, high, any_of = row_filter.min, row_filter.max, row_filter.any_of
    if (any_of is None) == (low is None and high is None):
        raise UserError(
            f"{where}: {row_filter.key!r} needs either min, max or both, or any_of", remedy="set one of them"
        )
    if any_of == ():
        raise UserError(f"{where}.any_of=[] keeps no row", remedy="list at least one value")
    if low is not None and high is not None and low > high:
        raise UserError(f"{where}.min={low} is more than max={high}", remedy="exchange them")


def _weights(data: DataConfig) -> None:
    for position, source in enumerate(data.eval_sets):
        if source.weight != 1.0:
            raise UserError(
                f"data.eval[{position}].weight={source.weight} does nothing: held-out sets are asked whole",
                remedy="leave it out",
            )
    sources = data.train_sets
    if len(sources) == 1 and sources[0].weight != 1.0:
        raise UserError(f"data.train[0].weight={sources[0].weight} does nothing with one set", remedy="leave it out")
    if sources and (length := sum(pattern_of([source.weight for source in sources]))) > MAX_PATTERN:
        raise UserError(
            f"data.train: the weights {[source.weight for source in sources]} are exact only over {length} prompts",
            remedy=f"round them to fewer digits (at most {MAX_PATTERN} prompts)",
        )
