"""Reads and writes a reshard plan as JSON with one line per slice, so that two plans can be compared with `diff`.

    "model.norm.weight[0:64]": [[0, 0, -1], [0, 1, 2]],

This line means that rank 0 copies the slice inside its process (bucket -1), and sends it to rank 1 in bucket 2. The key
`transfer_groups` lists the numbers of the slices with which a transfer group begins (weight_sync/coalescing.py).

Asserted by tests/unit/cli/test_plan_file.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mega.types import TensorSlice, UserError
from grpo_mega.weight_sync.plan import ReshardPlan
from grpo_mega.weight_sync.slice_table import SentTensor, table_of_rank


def write_plan(plan: ReshardPlan, path: Path, summary: Mapping[str, Any]) -> None:
    """Write `plan` to `path`. `summary` is written first, for human readers; `read_plan` ignores it."""
    head = {
        "summary": dict(summary),
        "bucket_bytes": plan.bucket_bytes,
        "nodes": plan.nodes,
        "bounds": plan.bounds,
        "transfer_groups": plan.group_starts[:-1].tolist(),
        "tensors": {name: asdict(tensor) for name, tensor in plan.tensors.items()},
    }
    with path.open("w") as out:
        out.write(json.dumps(head, indent=1)[:-2] + ',\n "transfers": {\n')
        out.write(",\n".join(_lines(plan)))
        out.write("\n }\n}\n")


def _lines(plan: ReshardPlan) -> Iterator[str]:
    order = np.lexsort((plan.dst, plan.group))
    bounds = np.searchsorted(plan.group[order], np.arange(len(plan.group_starts))).tolist()
    columns = np.column_stack([plan.src[order], plan.dst[order], plan.bucket[order]])
    for group, (low, high) in enumerate(itertools.pairwise(bounds)):
        transfers = str(columns[low:high].tolist())
        for piece in range(int(plan.group_starts[group]), int(plan.group_starts[group + 1])):
            yield f'  "{plan.slice_of(piece)}": {transfers}'


def read_plan(path: Path) -> ReshardPlan:
    """Return the plan that `write_plan` has written to `path`.

    Raises:
        UserError: the file was not found, or does not contain a plan.
    """
    try:
        raw = json.loads(path.read_text())
        tensors = {name: SentTensor(tuple(t["shape"]), t["itemsize"]) for name, t in raw["tensors"].items()}
        slices = [slice_from_text(text) for text in raw["transfers"]]
        transfers, starts = list(raw["transfers"].values()), raw["transfer_groups"]
        rows = [(number, *row) for number, piece in enumerate(starts) for row in transfers[piece]]
        pieces = table_of_rank(tensors, slices, 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a plan of tools/plan_sync.py ({error})", remedy="write the plan again with --out"
        ) from None
    group, src, dst, bucket = np.asarray(rows, np.int64).reshape(-1, 4).T
    order = np.lexsort((group, dst, src, bucket))
    columns = (group[order], src[order], dst[order], bucket[order])
    group_starts = np.asarray([*starts, len(pieces)], np.int64)
    return ReshardPlan(tensors, tuple(raw["nodes"]), raw["bucket_bytes"], pieces, group_starts, *columns, raw["bounds"])


def slice_from_text(text: str) -> TensorSlice:
    """Return the slice whose `str` is `text`."""
    name, _, ranges = text[:-1].rpartition("[")
    ends = [tuple(int(n) for n in part.split(":")) for part in ranges.split(", ")] if ranges else []
    return TensorSlice(name, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def difference(left: ReshardPlan, right: ReshardPlan) -> list[str]:
    """Return one line per slice whose transfers differ between two plans."""
    ours, theirs = dict(_transfers_by_slice(left)), dict(_transfers_by_slice(right))
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            found.append(f"{key}: {ours.get(key, 'missing')} / {theirs.get(key, 'missing')}")
    return found


def _transfers_by_slice(plan: ReshardPlan) -> Iterator[tuple[str, str]]:
    for line in _lines(plan):
        key, _, rest = line.strip().rpartition(": ")
        yield key.strip('"'), rest
