"""Quantization errors of a model's weights in FP8, by matrix and by layer.

Asserted by tests/unit/weight_sync/test_fp8_report.py.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from grpo_mega.interfaces import HeldSlice, WeightSource
from grpo_mega.models.fp8_tensors import is_quantized
from grpo_mega.quantization.block_fp8 import dequantize
from grpo_mega.weight_sync.digest_comparison import parts_of
from grpo_mega.weight_sync.fp8 import Fp8Source, QuantizedSlice

Report = dict[str, dict[str, float]]
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def fp8_report(source: WeightSource, group: dist.ProcessGroup | None, *, power_of_two: bool) -> Report:
    """Collective: return the quantization error of each matrix.

    The result maps a matrix to `relative`, |W - q(W)| / |W| in the Frobenius norm, and `largest`, the largest
    |w - q(w)|, where q(W) is the matrix quantized and dequantized again.

    Args:
        source: the policy's weights, in its own dtype.
        group: the ranks that hold one copy of the policy; None: this rank alone.
        power_of_two: as in `Fp8Source`.
    """
    names = [name for name, shape in source.hf_shapes().items() if is_quantized(name, shape)]
    place = {name: i for i, name in enumerate(names)}
    sums, largest = torch.zeros(len(names), 2, dtype=torch.float64), torch.zeros(len(names), dtype=torch.float64)
    for held in Fp8Source(source, power_of_two=power_of_two).shards():
        if not isinstance(held, QuantizedSlice) or not held.counted:
            continue
        for hf in parts_of(held.hf):
            values = HeldSlice.part(held, hf).bfloat16().double()
            error = dequantize(held.part(hf), held.scales, hf.offsets).double() - values
            i = place[hf.name]
            sums[i] += torch.stack([error.square().sum(), values.square().sum()]).cpu()
            largest[i] = max(float(largest[i]), float(error.abs().amax()))
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return {
        name: {"relative": math.sqrt(sums[i, 0] / sums[i, 1]) if sums[i, 1] else 0.0, "largest": float(largest[i])}
        for name, i in place.items()
    }


@dataclass(frozen=True)
class LayerDeviation:
    """Errors of the matrices of one layer.

    `median` and `worst` are of the relative errors; `worst_name` is the matrix with the worst one. `largest` is the
    largest absolute error.
    """

    layer: int
    matrices: int
    median: float
    worst: float
    worst_name: str
    largest: float


def by_layer(report: Mapping[str, Mapping[str, float]]) -> list[LayerDeviation]:
    """Return one entry for each layer of the model, in order."""
    layers: dict[int, list[str]] = {}
    for name in report:
        found = _LAYER.search(f".{name}")
        layers.setdefault(int(found[1]) if found else 0, []).append(name)
    return [_layer_deviation(layer, {name: report[name] for name in names}) for layer, names in sorted(layers.items())]


def _layer_deviation(layer: int, report: Mapping[str, Mapping[str, float]]) -> LayerDeviation:
    worst = max(report, key=lambda name: report[name]["relative"])
    return LayerDeviation(
        layer=layer,
        matrices=len(report),
        median=statistics.median(each["relative"] for each in report.values()),
        worst=report[worst]["relative"],
        worst_name=worst,
        largest=max(each["largest"] for each in report.values()),
    )


def table_lines(report: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yield the lines of a table: a header, one line for each layer, and one for all layers."""
    rows = by_layer(report)
    width = max(len(row.worst_name) for row in rows)
    yield f"{'layer':>5} {'matrices':>8} {'median':>8} {'worst':>8}  {'of':<{width}} {'largest':>10}"
    whole = _layer_deviation(0, report)
    for label, row in [*((str(row.layer), row) for row in rows), ("all", whole)]:
        yield (
            f"{label:>5} {row.matrices:>8} {row.median:>8.4%} {row.worst:>8.4%}  {row.worst_name:<{width}} "
            f"{row.largest:>10.3g}"
        )
