"""Check at the start of a job that all ranks have the same resolved config and the same prompts.

Machines that are started by hand can get different commands, different files under one path, or different commits of a
model. Asserted by tests/parallel/test_equal_inputs.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from grpo_mega.data.dataset import PromptDataset
from grpo_mega.data.example_dataset import ExampleDataset
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.types import UserError


def require_equal_inputs(
    resolved: Mapping[str, Any], data: PromptDataset | ExampleDataset, held_out: PromptDataset | None, ranks: Ranks
) -> None:
    """Compare config and prompts of all ranks by their digests. Collective.

    Args:
        resolved: the resolved config as nested plain values.
        data: prompts or examples of training.
        held_out: prompts of the evaluation, or None.
        ranks: coordinates of this rank.

    Raises:
        UserError: a rank differs from rank 0; names key, rank and both values. Raised on every rank.
    """
    world_size = ranks.topology.world_size
    if world_size == 1:
        return
    values = flat_values(resolved)
    values["rows of data.train"] = data.digest[:16]
    values["rows of data.eval"] = held_out.digest[:16] if held_out is not None else "none"
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    digests = [""] * world_size
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    other = next(rank for rank, found in enumerate(digests) if found != digests[0])
    compared: list[dict[str, str]] = [{}] * world_size
    dist.all_gather_object(compared, values if ranks.rank in (0, other) else {})
    first, second = compared[0], compared[other]
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    shown = ", ".join(f"{k}={second.get(k, '(missing)')} (rank 0: {first.get(k, '(missing)')})" for k in keys[:5])
    raise UserError(
        f"rank {other} has other inputs than rank 0: {shown}",
        remedy="start all machines with the same command, the same files and the same revisions",
    )


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return {'a.b': '1'} for {'a': {'b': 1}}, with every value as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_values(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat
