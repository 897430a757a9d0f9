"""A plan as a file: one line per slice, so that two plans can be compared with `diff`.

    "model.norm.weight[0:64]": [[0, 0, -1], [0, 1, 2]],

says: rank 0 keeps it in its own process (-1), and sends it to rank 1 in bucket 2. `parcels`: numbers of the slices with
which a parcel begins (parcels.py).
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
from grpo_mega.weight_sync.slice_table import WireTensor, holdings


def write_plan(plan: ReshardPlan, path: Path, summary: Mapping[str, Any]) -> None:
    """`summary` comes first; it is for readers, and not read again."""
    head = {
        "summary": dict(summary),
        "bucket_bytes": plan.bucket_bytes,
        "nodes": plan.nodes,
        "bounds": plan.bounds,
        "parcels": plan.first[:-1].tolist(),
        "tensors": {name: asdict(tensor) for name, tensor in plan.tensors.items()},
    }
    with path.open("w") as out:
        out.write(json.dumps(head, indent=1)[:-2] + ',\n "transfers": {\n')
        out.write(",\n".join(_lines(plan)))
        out.write("\n }\n}\n")


def _lines(plan: ReshardPlan) -> Iterator[str]:
    order = np.lexsort((plan.dst, plan.parcel))
    bounds = np.searchsorted(plan.parcel[order], np.arange(len(plan.first))).tolist()
    columns = np.column_stack([plan.src[order], plan.dst[order], plan.bucket[order]])
    for parcel, (low, high) in enumerate(itertools.pairwise(bounds)):
        ways = str(columns[low:high].tolist())
        for piece in range(int(plan.first[parcel]), int(plan.first[parcel + 1])):
            yield f'  "{plan.slice_of(piece)}": {ways}'


def read_plan(path: Path) -> ReshardPlan:
    """The reverse of `write_plan`.

    Raises:
        UserError: the file holds no plan.
    """
    try:
        raw = json.loads(path.read_text())
        tensors = {name: WireTensor(tuple(t["shape"]), t["itemsize"]) for name, t in raw["tensors"].items()}
        slices = [slice_from_text(text) for text in raw["transfers"]]
        ways = list(raw["transfers"].values())
        rows = [(number, *row) for number, piece in enumerate(raw["parcels"]) for row in ways[piece]]
        pieces = holdings(tensors, slices, 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no plan of tools/plan_sync.py ({error})", remedy="write it again") from None
    parcel, src, dst, bucket = np.asarray(rows, np.int64).reshape(-1, 4).T
    order = np.lexsort((parcel, dst, src, bucket))
    columns = (parcel[order], src[order], dst[order], bucket[order])
    first = np.asarray([*raw["parcels"], len(pieces)], np.int64)
    return ReshardPlan(tensors, tuple(raw["nodes"]), raw["bucket_bytes"], pieces, first, *columns, raw["bounds"])


def slice_from_text(text: str) -> TensorSlice:
    """The reverse of `str` of a slice."""
    name, _, box = text[:-1].rpartition("[")
    ends = [tuple(int(n) for n in part.split(":")) for part in box.split(", ")] if box else []
    return TensorSlice(name, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def difference(left: ReshardPlan, right: ReshardPlan) -> list[str]:
    """One line per slice that two plans treat differently."""
    ours, theirs = dict(_pairs(left)), dict(_pairs(right))
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            found.append(f"{key}: {ours.get(key, 'not there')} / {theirs.get(key, 'not there')}")
    return found


def _pairs(plan: ReshardPlan) -> Iterator[tuple[str, str]]:
    for line in _lines(plan):
        key, _, rest = line.strip().rpartition(": ")
        yield key.strip('"'), rest
