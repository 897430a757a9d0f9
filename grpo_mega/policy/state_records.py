"""Records of the live state: shape, dtype and digest of every weight, master weight and moment, by Megatron's names.

A digest is the sum over the slices of all ranks (models/digest.py), so it does not depend on the layout. The rows by
which the vocabulary is padded are left out, because their number depends on the layout.
Asserted by tests/parallel/test_checkpoint.py: equal records in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor

from grpo_mega.models.digest import digest_text, digest_threads, slice_digest, wrap_int64
from grpo_mega.policy.megatron_patches import cpu
from grpo_mega.types import TensorRecord, TensorSlice

cpu.prepare_import()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402 - only after prepare_import
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def state_records(sharded: Any, vocab_size: int) -> dict[str, TensorRecord]:
    """Return the records of a sharded state, which aliases the tensors to save. Collective.

    Args:
        sharded: nested containers with the sharded tensors of this rank.
        vocab_size: rows of the embedding and of the head without padding.
    """
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    slices: list[tuple[Tensor, TensorSlice]] = []
    for tensor in _main_replicas(sharded):
        offsets, shape = list(tensor.global_offset), [1] * tensor.prepend_axis_num + list(tensor.local_shape)
        values, whole = tensor.data, list(tensor.global_shape)
        if tensor.key.endswith(_PADDED):
            rows = max(0, min(shape[0], vocab_size - offsets[0]))
            values, shape[0], whole[0] = values[:rows], rows, min(whole[0], vocab_size)
        shapes[tensor.key] = tuple(whole), str(values.dtype).removeprefix("torch.")
        slices.append((values, TensorSlice(tensor.key, tuple(offsets), tuple(shape))))
    sums: dict[str, int] = {}
    for (_, part), digest in zip(slices, _digests(slices), strict=True):
        sums[part.name] = wrap_int64(sums.get(part.name, 0) + digest)
    everywhere: list[Any] = [(shapes, sums)]
    if dist.get_world_size() > 1:
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (shapes, sums))
    total: dict[str, int] = {}
    for _, found in everywhere:
        for key, digest in found.items():
            total[key] = wrap_int64(total.get(key, 0) + digest)
    known: dict[str, tuple[tuple[int, ...], str]] = {
        key: each for found, _ in everywhere for key, each in found.items()
    }
    return {key: TensorRecord(shape, dtype, digest_text(total[key])) for key, (shape, dtype) in sorted(known.items())}


def _digests(slices: Sequence[tuple[Tensor, TensorSlice]]) -> list[int]:
    """Return the digest of each slice. Those in host memory are computed by several threads."""
    with ThreadPoolExecutor(digest_threads()) as pool:
        of_host = {i: pool.submit(slice_digest, *each) for i, each in enumerate(slices) if each[0].is_cpu}
        of_device = {i: slice_digest(*each) for i, each in enumerate(slices) if not each[0].is_cpu}
        return [of_host[i].result() if i in of_host else of_device[i] for i in range(len(slices))]


def _main_replicas(sharded: Any) -> Iterator[ShardedTensor]:
    """Yield the sharded tensors that count: of every slice exactly one over all ranks."""
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensorFactory):
            yield from _main_replicas(value.build())
        elif isinstance(value, ShardedTensor) and is_main_replica(value.replica_id):
            yield value
