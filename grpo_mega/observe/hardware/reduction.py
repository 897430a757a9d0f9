"""Reduces the readings of all nodes and ranks to metrics of the job: mean, min, max, and where the outlier is.

Asserted by tests/unit/observe/hardware/test_reduction.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from grpo_mega.observe.hardware.sampler import NodeReading


def gpu_metrics(nodes: Sequence[NodeReading]) -> dict[str, float]:
    """Return `gpu/NAME_mean`, `_min`, `_max`, `_outlier_node`, `_outlier_gpu` of each quantity.

    The outlier is the GPU whose value is farthest from the median of all GPUs; there is none if all are equal. Its node
    is a position in `nodes`, its GPU NVML's index there.
    """
    found: dict[str, float] = {}
    for name in _names(node.gpus for node in nodes):
        places = [
            (number, index, value)
            for number, node in enumerate(nodes)
            for index, value in zip(node.gpu_indices, node.gpus.get(name, ()), strict=False)
            if value is not None
        ]
        found |= _spread(f"gpu/{name}", [(value, (node, gpu)) for node, gpu, value in places], ("node", "gpu"))
    return found


def host_metrics(nodes: Sequence[NodeReading]) -> dict[str, float]:
    """Return `host/NAME_mean`, `_min`, `_max` and `_outlier_node` of each value of the hosts."""
    found: dict[str, float] = {}
    for name in _names(node.host for node in nodes):
        values = [(node.host[name], (number,)) for number, node in enumerate(nodes) if name in node.host]
        found |= _spread(f"host/{name}", values, ("node",))
    return found


def rank_metrics(prefix: str, ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return `PREFIX/NAME_mean`, `_min`, `_max` and `_outlier_rank` of values that each rank has, rank 0 first."""
    found: dict[str, float] = {}
    for name in _names(ranks):
        values = [(of_rank[name], (rank,)) for rank, of_rank in enumerate(ranks) if name in of_rank]
        found |= _spread(f"{prefix}/{name}", values, ("rank",))
    return found


def _names(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _spread(name: str, placed: Sequence[tuple[float, tuple[int, ...]]], axes: tuple[str, ...]) -> dict[str, float]:
    """Return mean, min and max of values, and the place of the outlier. One value has only a mean."""
    values = [value for value, _ in placed]
    if not values:
        return {}
    found = {f"{name}_mean": statistics.fmean(values)}
    if len(values) == 1:
        return found
    found |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    if min(values) < max(values):
        median = statistics.median(values)
        _, place = max(placed, key=lambda item: abs(item[0] - median))
        found |= {f"{name}_outlier_{axis}": float(number) for axis, number in zip(axes, place, strict=True)}
    return found
