"""Static memory of each pipeline rank: its layers and parameters, and the bytes of weights, gradients and optimizer.

Parameters are those of the real modules (models.module_sizes.ModuleSizes). They are laid out as in Megatron's buffers:
a parameter starts at a multiple of 64 elements, and a bucket ends at a multiple of lcm(dp, 128)
(param_and_grad_buffer.py:635-665 of Megatron-Core 0.16). Asserted by tests/unit/planner/test_phase_memory.py and,
against real runs, by tests/parallel/test_planner.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from grpo_mega.config.schema import Config
from grpo_mega.models.module_sizes import ModuleSizes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.pipeline_split import stage_layers
from grpo_mega.planner import fp8
from grpo_mega.planner.inputs import PlanInputs

GRADIENT_BYTES = 4
"""Bytes of an element of the main gradients, which are float32."""
_STATE_BYTES = 4  # of an element of a master weight or moment, which are saved in float32
_ORTHOGONALIZATION_BYTES = 28  # five float32 and four bf16 copies of a matrix (policy/muon.py)
_OVERLAP_BUCKET = 40_000_000  # elements; distributed_data_parallel.py:65


@dataclass(frozen=True)
class ModelChunk:
    """The layers that one pipeline rank computes between two messages.

    `moe_layers` says for each layer if it has experts. `fp8_layers` says for each layer if it multiplies in FP8; empty
    means none.
    """

    moe_layers: tuple[bool, ...]
    has_embedding: bool
    has_head: bool
    fp8_layers: tuple[bool, ...] = ()

    @property
    def layers(self) -> list[tuple[bool, bool]]:
        """For each layer: (it has experts, it multiplies in FP8)."""
        return list(zip(self.moe_layers, self.fp8_layers or (False,) * len(self.moe_layers), strict=True))


@dataclass(frozen=True)
class StaticBytes:
    """Bytes on every rank of one pipeline rank; `parameters` is a count."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    """Moments, and master weights if the weights are not their own masters; without `optimizer_on_host`. With Muon it
    is the state of the rank that holds the most elements with two moments."""
    optimizer_on_host: int = 0
    """The part of the optimizer state that is stored and updated on the host."""
    fp8_copies: int = 0
    """Copies of the weights in FP8, as Transformer Engine's matrix products read them."""
    largest_state: int = 0
    """The largest tensor that a rank saves: master weight or moment of its largest parameter, in float32."""
    one_moment: int = 0
    """Number of `parameters` that have one moment, because Muon updates them."""
    orthogonalization: int = 0
    """Temporary bytes of Muon for its largest matrix, which every rank of the tensor axis assembles."""


def model_chunks(spec: ModelSpec, config: Config, where: str) -> list[list[ModelChunk]]:
    """Return the chunks of each pipeline rank, in the order of the model.

    Raises:
        UserError: the layers do not divide into the pipeline stages.
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
    """Return the fields of `ModuleSizes` that a chunk consists of, one entry per layer."""
    parts = ["embedding"] if chunk.has_embedding else []
    parts += ["moe_layer" if is_moe else "dense_layer" for is_moe in chunk.moe_layers]
    if chunk.has_head:
        parts.append("final_norm")
        if not tied:
            parts.append("head")
        elif not chunk.has_embedding:
            parts.append("embedding")  # a tied head on another stage is a copy of the embedding
    return parts


def static_bytes(chunks: Iterable[ModelChunk], sizes: ModuleSizes, inputs: PlanInputs) -> StaticBytes:
    """Return the static bytes of one pipeline rank, which computes these chunks."""
    config, topology, itemsize = inputs.config, inputs.topology, inputs.itemsize
    master = 4 if itemsize < 4 else 0  # in fp32 the weights are their own masters
    numel = buffer = quantized = largest = one_moment = state = widest = 0
    with_muon = config.optimizer.name == "muon"
    moment = 2 if config.optimizer.moments == "bf16" else _STATE_BYTES
    for chunk in chunks:
        sums = [sizes.sums[part] for part in chunk_parts(chunk, inputs.spec.tie_embeddings)]
        numel += sum(s.numel for s in sums)
        largest = max([largest, *(s.largest for s in sums)])
        quantized += sum(
            sizes.sums["moe_layer" if is_moe else "dense_layer"].matrices for is_moe, in_fp8 in chunk.layers if in_fp8
        )
        of_layers = [part in ("dense_layer", "moe_layer") for part in chunk_parts(chunk, inputs.spec.tie_embeddings)]
        dense = [s.dense_aligned for s in sums], [s.dense_vectors for s in sums], topology.dp * topology.cp
        experts = [s.expert_aligned for s in sums], [s.expert_vectors for s in sums], topology.edp
        for elements, vectors, ranks in (dense, experts):
            size = _buffer_elements(elements, ranks, bool(inputs.parallel.overlap_grad_reduce))
            buffer += size
            shard = size // ranks
            twice = shard
            if with_muon:
                adams = [v if is_layer else e for e, v, is_layer in zip(elements, vectors, of_layers, strict=True)]
                one_moment += sum(elements) - sum(adams)
                twice = _most_with_two_moments(elements, adams, ranks, bool(inputs.parallel.overlap_grad_reduce))
            state += (master + moment) * shard + moment * twice
        for part, is_layer in zip(sums, of_layers, strict=True):
            if with_muon and is_layer:
                dense_matrix, expert_matrix = part.largest_dense_matrix, part.largest_expert_matrix
                widest = max(widest, dense_matrix * topology.tp, expert_matrix * topology.etp)
    on_host = round(config.optimizer.host_fraction * state)
    weights = itemsize * buffer - fp8.saved_weight_bytes(config, quantized)
    return StaticBytes(
        parameters=numel,
        weights=weights,
        gradients=GRADIENT_BYTES * buffer,
        optimizer=state - on_host,
        optimizer_on_host=on_host,
        fp8_copies=fp8.copied_weight_bytes(config, quantized),
        largest_state=_STATE_BYTES * largest,
        one_moment=min(one_moment, numel),
        orthogonalization=_ORTHOGONALIZATION_BYTES * widest,
    )


def _most_with_two_moments(elements: list[int], adams: list[int], ranks: int, overlap: bool) -> int:
    """Return the most elements with two moments that one of the data-parallel ranks holds.

    Megatron's buffers hold the parts from the last to the first. Within a part, `adams` are taken as evenly spread.
    """
    on_rank = [0.0] * ranks
    for bucket in _buckets(list(zip(elements, adams, strict=True))[::-1], ranks, overlap):
        size = sum(part for part, _ in bucket)
        per_rank = -(-size // math.lcm(ranks, 128)) * math.lcm(ranks, 128) // ranks
        begin = 0
        for part, with_two in bucket:
            for rank in range(begin // per_rank, -(-(begin + part) // per_rank)):
                inside = min(begin + part, (rank + 1) * per_rank) - max(begin, rank * per_rank)
                on_rank[rank] += with_two * inside / part
            begin += part
    return round(max(on_rank))


def _buckets(parts: list[tuple[int, int]], ranks: int, overlap: bool) -> list[list[tuple[int, int]]]:
    """Return the parts of each bucket. With `overlap`, a bucket ends after the part that makes it large enough."""
    limit = max(_OVERLAP_BUCKET, 1_000_000 * ranks)
    found: list[list[tuple[int, int]]] = [[]]
    for part in (part for part in parts if part[0]):
        if overlap and sum(size for size, _ in found[-1]) >= limit:
            found.append([])
        found[-1].append(part)
    return [bucket for bucket in found if bucket]


def _buffer_elements(elements: list[int], ranks: int, overlap: bool) -> int:
    """Return the elements of the flat buffer of these parts, which is sharded over `ranks` data-parallel ranks.

    With `overlap`, a bucket ends after the part that makes it large enough.
    """
    end_multiple = math.lcm(ranks, 128)
    limit = max(_OVERLAP_BUCKET, 1_000_000 * ranks) if overlap else None
    end = bucket_start = 0
    for part in elements:
        end += part
        if limit is not None and end - bucket_start >= limit:
            end = bucket_start = -(-end // end_multiple) * end_multiple
    return -(-end // end_multiple) * end_multiple
