"""What each pipeline rank holds: its layers, its parameters, and the bytes of weights, gradients and optimizer state.

Parameters are those of the real modules (interfaces.ModuleSizes), laid out as Megatron's buffers lay them out
(param_and_grad_buffer.py:635-665 of 0.16: a parameter starts at a multiple of 64 elements, a bucket ends at one of
lcm(dp, 128)). Asserted by tests/unit/planner/test_phase_memory.py and, against real runs, by
tests/parallel/test_planner.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.interfaces import ModuleSizes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.pipeline_split import stage_layers
from grpo_mega.parallel.topology import Topology
from grpo_mega.planner import fp8

ITEMSIZE = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4  # main gradients are float32
_OVERLAP_BUCKET = 40_000_000  # distributed_data_parallel.py:65, elements


@dataclass(frozen=True)
class ModelChunk:
    """What one pipeline rank computes between two messages: the kinds of its layers, and whether it has the ends.
    `fp8_layers`: which of them multiply in FP8; empty: none."""

    moe_layers: tuple[bool, ...]
    has_embedding: bool
    has_head: bool
    fp8_layers: tuple[bool, ...] = ()

    @property
    def layers(self) -> list[tuple[bool, bool]]:
        """Of each: has it experts, does it multiply in FP8."""
        return list(zip(self.moe_layers, self.fp8_layers or (False,) * len(self.moe_layers), strict=True))


@dataclass(frozen=True)
class StaticBytes:
    """On every rank of one pipeline rank. `optimizer` holds master weights, where they are not the weights, and both
    moments; `optimizer_on_host` is the part of it that lives and is updated on the host. `fp8_copies` are weights once
    more, as Transformer Engine's products read them."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    optimizer_on_host: int = 0
    fp8_copies: int = 0


def model_chunks(spec: ModelSpec, config: Config, where: str) -> list[list[ModelChunk]]:
    """For each pipeline rank, its chunks in the order of the model.

    Raises:
        UserError: the layers cannot be split so.
    """
    pp, vpp = config.parallel.pp, config.parallel.vpp
    stages = stage_layers(spec.num_layers, config.parallel, where)
    chunks = [
        ModelChunk(
            tuple(spec.is_moe_layer(i) for i in layers),
            number == 0,
            number == len(stages) - 1,
            tuple(fp8.is_fp8_layer(config, i, spec.num_layers) for i in layers),
        )
        for number, layers in enumerate(stages)
    ]
    return [[chunks[chunk * pp + rank] for chunk in range(vpp)] for rank in range(pp)]


def chunk_parts(chunk: ModelChunk, tied: bool) -> list[str]:
    """Which fields of `ModuleSizes` a chunk is made of, one entry for each layer."""
    parts = ["embedding"] if chunk.has_embedding else []
    parts += ["moe_layer" if is_moe else "dense_layer" for is_moe in chunk.moe_layers]
    if chunk.has_head:
        parts.append("final_norm")
        if not tied:
            parts.append("head")
        elif not chunk.has_embedding:
            parts.append("embedding")  # a tied head on another stage is a copy
    return parts


def static_bytes(
    chunks: Iterable[ModelChunk], sizes: ModuleSizes, spec: ModelSpec, config: Config, topology: Topology
) -> StaticBytes:
    """Of one pipeline rank."""
    itemsize = ITEMSIZE[config.precision.dtype]
    master = 4 if itemsize < 4 else 0  # in fp32 the weights are their own masters
    numel = buffer = shard = quantised = 0
    for chunk in chunks:
        sums = [sizes.sums[part] for part in chunk_parts(chunk, spec.tie_embeddings)]
        numel += sum(s.numel for s in sums)
        quantised += sum(
            sizes.sums["moe_layer" if is_moe else "dense_layer"].matrices for is_moe, in_fp8 in chunk.layers if in_fp8
        )
        dense = [s.dense_aligned for s in sums], topology.dp * topology.cp
        experts = [s.expert_aligned for s in sums], topology.edp
        for elements, ranks in (dense, experts):
            size = _buffer_elements(elements, ranks, config.parallel.overlap_grad_reduce)
            buffer += size
            shard += size // ranks
    state = (master + 8) * shard
    on_host = round(config.optimizer.host_fraction * state)
    weights = itemsize * buffer - fp8.saved_weight_bytes(config, quantised)
    return StaticBytes(
        numel, weights, GRADIENT_BYTES * buffer, state - on_host, on_host, fp8.copied_weight_bytes(config, quantised)
    )


def _buffer_elements(elements: list[int], ranks: int, overlap: bool) -> int:
    """Elements of the flat buffer of these parts, over so many data-parallel ranks: a bucket ends with the part that
    makes it large enough."""
    end_multiple = math.lcm(ranks, 128)
    limit = max(_OVERLAP_BUCKET, 1_000_000 * ranks) if overlap else None
    at = begin = 0
    for part in elements:
        at += part
        if limit is not None and at - begin >= limit:
            at = begin = -(-at // end_multiple) * end_multiple
    return -(-at // end_multiple) * end_multiple
