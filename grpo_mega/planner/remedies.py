"""Changes of a config that reduce memory, and the fewest of them that make a plan fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from grpo_mega.config.rules import check
from grpo_mega.config.schema import Config
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.plan import ResourcePlan
from grpo_mega.types import UserError

Change = dict[str, Any]
"""`section.key` -> value."""
Planner = Callable[[Config], ResourcePlan]
"""Plans a config; raises UserError if the config is not valid."""

_MOST_CHANGES = 4
_ROLLOUTS_IN_CACHE = 8


def changed(config: Config, change: Change) -> Config:
    """Return the config with these keys changed.

    Raises:
        UserError: the changed config breaks a rule.
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
    """Return the change as overrides of a command line."""
    return [f"{key}={_yaml_value(value)}" for key, value in change.items()]


def even_layout(num_layers: int, pp: int) -> str:
    """Return an explicit pipeline layout with one chunk per rank.

    If the layers do not divide evenly, the first ranks have one more.
    """
    each, more = divmod(num_layers, pp)
    stages = ["t" * (each + (i < more)) for i in range(pp)]
    return "E" + "|".join(_abbreviate(stage) for stage in stages) + "L"


def remedy(plan: ResourcePlan, planner: Planner, num_layers: int) -> Change | None:
    """Return the fewest changes that make the plan fit, or None.

    More devices are tried only if no other change makes it fit, up to 32 times as many.

    Args:
        plan: a plan that does not fit.
        planner: plans a changed config.
        num_layers: of the model.
    """
    config = plan.inputs.config
    for found in _fitting_changes(config, planner, list(_changes(plan.inputs, num_layers))):
        return found
    for factor in (2, 4, 8, 16, 32):
        wider: Change = {"run.world_size": plan.inputs.topology.world_size * factor}
        try:
            larger = planner(changed(config, wider))
        except UserError:
            continue
        if larger.fits:
            return wider
        for found in _fitting_changes(larger.inputs.config, planner, list(_changes(larger.inputs, num_layers))):
            return wider | found
    return None


def _fitting_changes(config: Config, planner: Planner, changes: list[Change]) -> Iterator[Change]:
    """Yield combinations of the changes that fit, the smallest combinations first."""
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


def _changes(inputs: PlanInputs, num_layers: int) -> Iterator[Change]:
    """Yield single changes, the cheapest in time first: saves, recomputation, engine, layout, optimizer on the host."""
    config, parallel = inputs.config, inputs.config.parallel
    if config.checkpoint.asynchronous:
        yield {"checkpoint.asynchronous": False}
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if parallel.recompute != "full":
        yield {"parallel.recompute": "full"} | (
            {"parallel.recompute_modules": None} if parallel.recompute_modules is not None else {}
        )
    row = _shortest_row(config)
    if row < config.train.max_tokens_per_microbatch:
        yield {"train.max_tokens_per_microbatch": row}
    yield from _engine_changes(inputs) if config.has_engine else ()
    yield from _layouts(inputs, num_layers)
    if config.optimizer.host_fraction < 1:
        yield {"optimizer.host_fraction": 1.0}


def _engine_changes(inputs: PlanInputs) -> Iterator[Change]:
    """Yield a smaller KV cache, and layouts that divide the engine over more ranks."""
    engine, tokens = inputs.config.engine, _ROLLOUTS_IN_CACHE * inputs.kv_cache.tokens_per_rollout
    if engine.kv_cache_tokens is None or engine.kv_cache_tokens > tokens:
        yield {"engine.kv_cache_tokens": tokens}
    for factor in (2, 4, 8, 16, 32):
        ranks = inputs.topology.engine_size * factor
        if inputs.topology.engine_servers or inputs.topology.world_size % ranks == 0:
            yield {"engine.tp": engine.tp * factor} | ({"engine.ep": ranks} if engine.ep > 1 else {})


def _layouts(inputs: PlanInputs, num_layers: int) -> Iterator[Change]:
    """Yield layouts that divide the model over more ranks."""
    parallel, per_node = inputs.config.parallel, inputs.gpu.per_node
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
    """Return the fewest tokens of a row that holds the longest rollout and that the layout divides."""
    parallel = config.parallel
    longest = config.longest_training_rollout
    multiple = math.lcm(2 * parallel.cp, parallel.tp) if parallel.cp > 1 else parallel.tp
    multiple *= parallel.tp if parallel.cp > 1 else 1
    return -(-longest // multiple) * multiple


def _abbreviate(stage: str) -> str:
    return stage if len(stage) < 3 else f"t*{len(stage)}"


def _yaml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
