"""A plan as a file: one line per slice, so that two plans can be compared with `diff`.

    "model.norm.weight[0:64]": [[0, 0, -1], [0, 1, 2]],

says: rank 0 keeps it in its own process (-1), and sends it to rank 1 in bucket 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from grpo_mega.types import TensorSlice, UserError
from grpo_mega.weight_sync.boxes import WireTensor, holdings
from grpo_mega.weight_sync.plan import Plan


def write_plan(plan: Plan, path: Path, summary: Mapping[str, Any]) -> None:
    """`summary` comes first; it is for readers, and not read again."""
    head = {
        "summary": dict(summary),
        "bucket_bytes": plan.bucket_bytes,
        "nodes": plan.nodes,
        "bounds": plan.bounds,
        "tensors": {name: asdict(tensor) for name, tensor in plan.tensors.items()},
    }
    with path.open("w") as out:
        out.write(json.dumps(head, indent=1)[:-2] + ',\n "transfers": {\n')
        out.write(",\n".join(_lines(plan)))
        out.write("\n }\n}\n")


def _lines(plan: Plan) -> Iterator[str]:
    order = np.lexsort((plan.dst, plan.piece))
    pieces = plan.piece[order]
    bounds = np.searchsorted(pieces, np.arange(len(plan.pieces) + 1)).tolist()
    columns = np.column_stack([plan.src[order], plan.dst[order], plan.bucket[order]]).tolist()
    for piece in range(len(plan.pieces)):
        yield f'  "{plan.slice_of(piece)}": {columns[bounds[piece] : bounds[piece + 1]]}'


def read_plan(path: Path) -> Plan:
    """The reverse of `write_plan`.

    Raises:
        UserError: the file holds no plan.
    """
    try:
        raw = json.loads(path.read_text())
        tensors = {name: WireTensor(tuple(t["shape"]), t["itemsize"]) for name, t in raw["tensors"].items()}
        slices = [slice_from_text(text) for text in raw["transfers"]]
        rows = [(i, *row) for i, each in enumerate(raw["transfers"].values()) for row in each]
        pieces = holdings(tensors, slices, 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no plan of tools/plan_sync.py ({error}); write it again") from None
    piece, src, dst, bucket = np.asarray(rows, np.int64).reshape(-1, 4).T
    order = np.lexsort((piece, dst, src, bucket))
    columns = (piece[order], src[order], dst[order], bucket[order])
    return Plan(tensors, tuple(raw["nodes"]), raw["bucket_bytes"], pieces, *columns, raw["bounds"])


def slice_from_text(text: str) -> TensorSlice:
    """The reverse of `str` of a slice."""
    name, _, box = text[:-1].rpartition("[")
    ends = [tuple(int(n) for n in part.split(":")) for part in box.split(", ")] if box else []
    return TensorSlice(name, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def difference(left: Plan, right: Plan) -> list[str]:
    """One line per slice that two plans treat differently."""
    ours, theirs = dict(_pairs(left)), dict(_pairs(right))
    found = []
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            found.append(f"{key}: {ours.get(key, 'not there')} / {theirs.get(key, 'not there')}")
    return found


def _pairs(plan: Plan) -> Iterator[tuple[str, str]]:
    for line in _lines(plan):
        key, _, rest = line.strip().rpartition(": ")
        yield key.strip('"'), rest
