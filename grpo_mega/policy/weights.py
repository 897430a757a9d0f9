"""The policy's weights as slices of Hugging Face tensors: loading them from files, listing them, streaming them whole.

`load_from_hf` reads from the safetensors files only the slices that the rank holds. `MegatronWeights` is the
`WeightSource` of a sync. Streaming sums integer views of zero-filled buckets over the model-parallel ranks: exactly one
rank contributes each byte, so the sum is a bit-exact copy (also of -0.0 and NaN).
Asserted by tests/parallel/test_weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.convert.families import hf_shapes, parameter_placements
from grpo_mega.convert.hf_files import HfFiles
from grpo_mega.convert.spec import ModelSpec
from grpo_mega.interfaces import HeldSlice
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.types import Placement


class MegatronWeights:
    """Which slices of which Hugging Face tensors this rank's parameters are."""

    def __init__(self, model: torch.nn.Module, spec: ModelSpec, ranks: Ranks, group: dist.ProcessGroup) -> None:
        """`group`: the model-parallel ranks (tp x pp) of this data-parallel replica."""
        self._spec, self._ranks, self._group = spec, ranks, group
        self._parameters = dict(_named_globally(model))
        self._shapes = hf_shapes(spec)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the checkpoint."""
        return self._shapes

    def load_from_hf(self, folder: Path) -> int:
        """Fill every parameter; the padding of the vocabulary becomes zero. Returns the bytes of weights read."""
        checkpoint = HfFiles(folder)
        checkpoint.check(self._shapes)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.zero_()
                for placement in self._placements(name):
                    parameter[placement.local.index].copy_(checkpoint.read(placement.hf))
        checkpoint.close()
        return checkpoint.bytes_read

    def shards(self) -> Sequence[HeldSlice]:
        """Views of this rank's parameters, every byte of the checkpoint once over the model-parallel ranks."""
        held = []
        tied_copy = "output_layer.weight" if self._spec.tie_embeddings else ""
        for name, parameter in self._parameters.items():
            if name == tied_copy:
                continue
            for placement in self._placements(name):
                global_shape = self._shapes[placement.hf.name]
                replicated = placement.hf.shape == global_shape and self._ranks.topology.tp > 1
                if not replicated or self._ranks.at.tp_rank == 0:
                    held.append(HeldSlice(placement.hf, global_shape, parameter.data[placement.local.index]))
        return held

    def full_tensors(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the checkpoint, whole, in order, on every rank. A tensor is valid until the next bucket."""
        mine: dict[str, list[HeldSlice]] = {}
        for held in self.shards():
            mine.setdefault(held.hf.name, []).append(held)
        dtype = next(iter(self._parameters.values())).dtype
        for names in self._buckets(bucket_bytes, dtype.itemsize):
            sizes = [torch.Size(self._shapes[n]).numel() for n in names]
            words = -(-sum(sizes) * dtype.itemsize // 8)
            bits = torch.zeros(words, dtype=torch.int64, device=self._ranks.device)
            views = [
                part.view(self._shapes[n])
                for n, part in zip(names, bits.view(dtype)[: sum(sizes)].split(sizes), strict=True)
            ]
            for name, view in zip(names, views, strict=True):
                for held in mine.get(name, ()):
                    view[held.hf.index].copy_(held.view)
            if self._group.size() > 1:
                dist.all_reduce(bits, group=self._group)
            yield from zip(names, views, strict=True)

    def _buckets(self, bucket_bytes: int, itemsize: int) -> Iterator[list[str]]:
        names: list[str] = []
        filled = 0
        for name, shape in self._shapes.items():
            size = torch.Size(shape).numel() * itemsize
            if names and filled + size > bucket_bytes:
                yield names
                names, filled = [], 0
            names.append(name)
            filled += size
        yield names

    def _placements(self, parameter: str) -> list[Placement]:
        return parameter_placements(self._spec, parameter, self._ranks.topology.tp, self._ranks.at.tp_rank)


def _named_globally(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Megatron numbers layers from 0 on every stage; here from the model's first layer."""
    layers = model.decoder.layers  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{layers[int(local)].layer_number - 1}.{rest}"  # type: ignore[index, union-attr]
        yield name, parameter
