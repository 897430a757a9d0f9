"""The layers of each pipeline stage: split evenly, uneven at the ends, or by an explicit layout. Pure functions.

Stages are in model order: stage i is model chunk i // pp of pipeline rank i % pp.
Asserted by tests/unit/parallel/test_pipeline_split.py, and against the built modules by tests/parallel/test_update.py.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.types import UserError


def stage_layers(num_layers: int, parallel: ParallelConfig, where: str) -> list[range]:
    """Return the layers of each of the pp * vpp stages. `where` names the model in messages.

    Raises:
        UserError: the layers do not divide, the explicit layout does not fit, or a rank has no layer.
    """
    if parallel.pipeline_layout is not None:
        counts = _layers_per_explicit_stage(parallel.pipeline_layout, num_layers, parallel, where)
    else:
        per_rank = _layers_per_rank(num_layers, parallel, where)
        for layers in per_rank:
            if layers % parallel.vpp:
                raise UserError(
                    f"parallel.vpp={parallel.vpp} does not divide the {layers} layers of a pipeline rank "
                    f"({num_layers} layers of {where}, pp={parallel.pp})",
                    remedy=f"{_divisors(layers)}",
                )
        counts = [layers // parallel.vpp for layers in per_rank] * parallel.vpp
    for rank in range(1, parallel.pp - 1):  # the first has the embedding, the last the head
        if not any(counts[rank :: parallel.pp]):
            raise UserError(
                f"parallel.pp={parallel.pp}: pipeline rank {rank} must have at least one of the {num_layers} "
                f"layers of {where}",
                remedy="give it one in parallel.pipeline_layout, or use fewer stages",
            )
    return [range(begin, end) for begin, end in pairwise([0, *accumulate(counts)])]


def _layers_per_rank(num_layers: int, parallel: ParallelConfig, where: str) -> list[int]:
    """Return the number of layers of each pipeline rank."""
    first, last, pp = parallel.num_layers_first_stage, parallel.num_layers_last_stage, parallel.pp
    ends = [n for n in (first, last) if n is not None]
    left, ranks = num_layers - sum(ends), pp - len(ends)
    if not ends and num_layers % pp:
        raise UserError(
            f"parallel.pp={pp} does not divide the {num_layers} layers of {where}",
            remedy=f"{_divisors(num_layers)}, or set "
            "parallel.num_layers_first_stage, parallel.num_layers_last_stage or parallel.pipeline_layout",
        )
    if left < 0 or (left % ranks if ranks else left):
        keys = ", ".join(
            f"parallel.{key}={n}"
            for key, n in (("num_layers_first_stage", first), ("num_layers_last_stage", last))
            if n is not None
        )
        raise UserError(
            f"{keys} leave {left} of the {num_layers} layers of {where} to {ranks} other pipeline rank(s)",
            remedy="change them so that the rest divides",
        )
    middle = [left // ranks] * ranks if ranks else []
    return ([first] if first is not None else []) + middle + ([last] if last is not None else [])


def _layers_per_explicit_stage(text: str, num_layers: int, parallel: ParallelConfig, where: str) -> list[int]:
    """Return the number of layers of each stage of an explicit layout.

    Syntax: `|` between stages, E the embedding, t a layer, L the head; `x*3` and `(x|y)*3` repeat.
    """
    key = f"parallel.pipeline_layout={text}"
    flat = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([Et|L])\*(\d+)"):
        flat = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), flat)
    if wrong := re.search(r"[^Et|L]", flat):
        raise UserError(
            f"{key} holds {wrong.group()!r}", remedy="use E, t, L, | and repetitions such as t*3 and (t|)*3"
        )
    stages = flat.split("|")
    wanted = parallel.pp * parallel.vpp
    if len(stages) != wanted:
        raise UserError(
            f"{key} has {len(stages)} stages, parallel.pp x parallel.vpp = {parallel.pp} x {parallel.vpp}",
            remedy="change one of them",
        )
    if not re.fullmatch(r"E[t|]*L", flat):
        raise UserError(f"{key} must begin with its only E (embedding) and end with its only L (head)")
    if flat.count("t") != num_layers:
        raise UserError(f"{key} has {flat.count('t')} layers (t), {where} has {num_layers}", remedy="use as many")
    return [stage.count("t") for stage in stages]


def _divisors(number: int) -> str:
    return f"use one of {', '.join(str(d) for d in range(1, min(number, 64) + 1) if number % d == 0)}"
