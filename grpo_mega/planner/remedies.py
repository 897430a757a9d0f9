"""Other configs near one: single changes, and the fewest of them that make a plan fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from grpo_mega.config.rules import check
from grpo_mega.config.schema import Config
from grpo_mega.models.kv_cache import KvCacheSize
from grpo_mega.planner.plan import ResourcePlan
from grpo_mega.types import UserError

Change = dict[str, Any]  # `section.key` -> value
Planner = Callable[[Config], ResourcePlan]
"""Raises UserError for a config that cannot be."""

_MOST_CHANGES = 4
_ROLLOUTS_IN_CACHE = 8


def changed(config: Config, change: Change) -> Config:
    """The config with these keys.

    Raises:
        UserError: a rule is broken.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in change.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    updates = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    new = config.model_copy(update=updates)
    check(new)
    return new


def as_overrides(change: Change) -> list[str]:
    """As they are written on a command line."""
    return [f"{key}={_written(value)}" for key, value in change.items()]


def even_layout(num_layers: int, pp: int) -> str:
    """An explicit pipeline layout of one chunk a rank; where layers do not divide, the first ranks have one more."""
    each, more = divmod(num_layers, pp)
    stages = ["t" * (each + (i < more)) for i in range(pp)]
    return "E" + "|".join(_repeated(stage) for stage in stages) + "L"


def remedy(plan: ResourcePlan, planner: Planner, num_layers: int) -> Change | None:
    """The fewest changes that make it fit; more devices only when nothing else does. None: nothing found."""
    here = list(_changes(plan, num_layers))
    for found in _fitting(plan.config, planner, here):
        return found
    for factor in (2, 4, 8, 16, 32):
        wider: Change = {"run.world_size": plan.topology.world_size * factor}
        try:
            larger = planner(changed(plan.config, wider))
        except UserError:
            continue
        if larger.fits:
            return wider
        for found in _fitting(larger.config, planner, list(_changes(larger, num_layers))):
            return wider | found
    return None


def _fitting(config: Config, planner: Planner, changes: list[Change]) -> Iterator[Change]:
    for size in range(1, _MOST_CHANGES + 1):
        for chosen in combinations(changes, size):
            change: Change = {}
            for part in chosen:
                change |= part
            if sum(len(part) for part in chosen) != len(change):
                continue  # two values of one key
            try:
                if planner(changed(config, change)).fits:
                    yield change
            except UserError:
                continue


def _changes(plan: ResourcePlan, num_layers: int) -> Iterator[Change]:
    """Cheapest first: memory for a little time, then engine, layout, and the host's time."""
    config, parallel, engine = plan.config, plan.config.parallel, plan.config.engine
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if parallel.recompute != "full":
        yield {"parallel.recompute": "full"} | (
            {"parallel.recompute_modules": None} if parallel.recompute_modules is not None else {}
        )
    row = _shortest_row(config)
    if row < config.train.max_tokens_per_microbatch:
        yield {"train.max_tokens_per_microbatch": row}
    tokens = _ROLLOUTS_IN_CACHE * KvCacheSize.from_config(config).tokens_per_rollout
    if engine.kv_cache_tokens is None or engine.kv_cache_tokens > tokens:
        yield {"engine.kv_cache_tokens": tokens}
    for factor in (2, 4, 8, 16, 32):
        ranks = plan.topology.engine_size * factor
        if plan.topology.engine_servers or plan.topology.world_size % ranks == 0:
            yield {"engine.tp": engine.tp * factor} | ({"engine.ep": ranks} if engine.ep > 1 else {})
    yield from _layouts(plan, num_layers)
    if config.optimizer.host_fraction < 1:
        yield {"optimizer.host_fraction": 1.0}


def _layouts(plan: ResourcePlan, num_layers: int) -> Iterator[Change]:
    parallel, per_node = plan.config.parallel, plan.cluster.gpu.per_node
    tp = 2 * parallel.tp
    while tp <= per_node:
        yield {"parallel.tp": tp, "parallel.sequence_parallel": True}
        tp *= 2
    for factor in (2, 4, 8):
        pp = parallel.pp * factor
        if pp > num_layers:
            break
        change: Change = {"parallel.pp": pp}
        if num_layers % pp or parallel.pipeline_layout is not None:
            change["parallel.pipeline_layout"] = even_layout(num_layers, pp)
        yield change
    if parallel.ep > 1:
        yield from ({"parallel.ep": parallel.ep * factor} for factor in (2, 4, 8))


def _shortest_row(config: Config) -> int:
    """Tokens of a row that holds the longest rollout and divides as the layout wants."""
    parallel = config.parallel
    longest = config.longest_training_rollout
    multiple = math.lcm(2 * parallel.cp, parallel.tp) if parallel.cp > 1 else parallel.tp
    multiple *= parallel.tp if parallel.cp > 1 else 1
    return -(-longest // multiple) * multiple


def _repeated(stage: str) -> str:
    return stage if len(stage) < 3 else f"t*{len(stage)}"


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
