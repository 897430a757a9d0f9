"""The policy's weights as slices of Hugging Face tensors: loads, lists and streams them.

`load_from_hf` reads only the slices that the rank holds from the safetensors files. `MegatronWeights` is the
`WeightSource` of a sync. Streaming sums integer views of zero-filled buckets over the ranks that hold one copy of the
model: exactly one of them contributes each byte, so the sum is a bit-exact copy (also of -0.0 and NaN).
Asserted by tests/parallel/test_weights.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.formats.safetensors_reader import HfFiles
from grpo_mega.formats.torch_dist_as_hf import DistAsHf
from grpo_mega.interfaces import HeldSlice
from grpo_mega.models.parameter_tables import (
    hf_shapes,
    hf_shapes_aside,
    is_expert_parameter,
    keeps_float32,
    number_expert,
    parameter_placements,
)
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy import fp8
from grpo_mega.types import Placement


def weight_copies(topology: Topology) -> list[list[int]]:
    """Return the ranks of each copy of the whole model.

    A copy has lcm(tp, etp x ep) consecutive ranks of every pipeline stage: the fewest that hold all dense layers and
    all experts of the stage.
    """
    stage, size = topology.world_size // topology.pp, _copy_size(topology)
    return [
        [pp_rank * stage + first + i for pp_rank in range(topology.pp) for i in range(size)]
        for first in range(0, stage, size)
    ]


def weight_copy_group(ranks: Ranks) -> dist.ProcessGroup:
    """Create and return the process group of this rank's copy of the model. Collective over all ranks."""
    mine: dist.ProcessGroup | None = None
    for members in weight_copies(ranks.topology):
        group: dist.ProcessGroup = dist.new_group(members)
        if ranks.rank in members:
            mine = group
    assert mine is not None, "every rank belongs to one copy"
    return mine


def _copy_size(topology: Topology) -> int:
    return math.lcm(topology.tp, topology.etp * topology.ep)


class MegatronWeights:
    """The slices of Hugging Face tensors that this rank's parameters hold."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        spec: ModelSpec,
        ranks: Ranks,
        group: dist.ProcessGroup,
        settle: Callable[[], None],
    ) -> None:
        """Map the parameters of this rank to slices.

        Args:
            models: model chunks of this rank.
            spec: the model.
            ranks: layout and coordinates.
            group: ranks of this copy of the model (`weight_copy_group`).
            settle: called before weights are read, to finish an overlapping parameter gather.
        """
        self._spec, self._ranks, self._group, self._settle = spec, ranks, group, settle
        experts = spec.moe.num_experts // ranks.topology.ep if spec.moe is not None else 0
        self._parameters: dict[str, Tensor] = {
            name: p for model in models for name, p in _named_globally(model, ranks.at.ep_rank * experts)
        }
        self._shapes = hf_shapes(spec)
        self._latent_split = models[0].config.transformer_impl == "local"  # type: ignore[union-attr]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor of the checkpoint."""
        return self._shapes

    def mirrored(self, tensor_of: Callable[[Tensor], Tensor]) -> MegatronWeights:
        """Return the same slices of the tensors `tensor_of(parameter)`, which have the same shapes and one dtype."""
        other = copy.copy(self)
        other._parameters = {name: tensor_of(parameter) for name, parameter in self._parameters.items()}
        return other

    def without(self, parameter: str) -> MegatronWeights:
        """Return the same slices without one parameter that is in no checkpoint."""
        other = copy.copy(self)
        other._parameters = {name: p for name, p in self._parameters.items() if name != parameter}
        return other

    def load_start(self, config: Config, folder: Path) -> None:
        """Load the weights with which a run starts: those of `model.checkpoint`, else those of `folder`.

        Args:
            config: section model.
            folder: Hugging Face folder of the model.

        Raises:
            UserError: as `load_from_hf`; or the checkpoint is damaged.
        """
        if config.model.checkpoint is None:
            self.load_from_hf(folder)
            return
        files = DistAsHf(Path(config.model.checkpoint), folder)
        self._fill(files)
        files.close()

    def load_from_hf(self, folder: Path) -> int:
        """Load every parameter and return the bytes that were read. The padding of the vocabulary is set to zero."""
        checkpoint = HfFiles(folder)
        checkpoint.check(self._shapes, hf_shapes_aside(self._spec))
        self._fill(checkpoint)
        checkpoint.close()
        return checkpoint.bytes_read

    def _fill(self, files: HfFiles | DistAsHf) -> None:
        """Read the slices of every parameter."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                values = fp8.room_for(parameter)
                for placement in self._placements(name):
                    part = torch.empty(placement.hf.shape, dtype=files.dtype(placement.hf.name), device="cpu")
                    files.read_into(placement.hf, part)
                    values[placement.local.index].copy_(part)
                fp8.put(values, parameter)

    def shards(self) -> Sequence[HeldSlice]:
        """Return the slices of this rank: views of its parameters, or copies of FP8 parameters.

        Call it again after every update. In one copy of the model, exactly one rank counts each byte. The first of
        several ranks counts a replicated tensor, and the rank of the embedding counts a tied embedding.
        """
        self._settle()
        topology, held = self._ranks.topology, []
        place = self._ranks.rank % (topology.world_size // topology.pp) % _copy_size(topology)
        tied_copy = "output_layer.weight" if self._spec.tie_embeddings else ""
        for name, parameter in self._parameters.items():
            cut = topology.etp * topology.ep if is_expert_parameter(name) else topology.tp
            values = fp8.values_of(parameter)
            for placement in self._placements(name):
                global_shape = self._shapes[placement.hf.name]
                replicated = not is_expert_parameter(name) and placement.hf.shape == global_shape and topology.tp > 1
                first = place < cut and (not replicated or self._ranks.at.tp_rank == 0)
                view = values[placement.local.index]
                held.append(HeldSlice(placement.hf, global_shape, view, first and name != tied_copy))
        return held

    def full_tensors(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) in checkpoint order on every rank. A tensor is valid until the next bucket."""
        mine: dict[str, list[HeldSlice]] = {}
        for held in self.shards():
            if held.counted:
                mine.setdefault(held.hf.name, []).append(held)
        for names in self._buckets(bucket_bytes):
            bits = torch.zeros(sum(map(self._words, names)), dtype=torch.int64, device=self._ranks.device)
            views = {
                name: part.view(self._dtype_of(name))[: math.prod(self._shapes[name])].view(self._shapes[name])
                for name, part in zip(names, bits.split([self._words(n) for n in names]), strict=True)
            }
            for name, view in views.items():
                for held in mine.get(name, ()):
                    view[held.hf.index].copy_(held.view)
            if self._group.size() > 1:
                dist.all_reduce(bits, group=self._group)
            yield from views.items()

    def _buckets(self, bucket_bytes: int) -> Iterator[list[str]]:
        names: list[str] = []
        filled = 0
        for name in self._shapes:
            size = 8 * self._words(name)
            if names and filled + size > bucket_bytes:
                yield names
                names, filled = [], 0
            names.append(name)
            filled += size
        yield names

    def _words(self, name: str) -> int:
        """Return the 8-byte words of a tensor; every tensor starts at a word."""
        return -(-math.prod(self._shapes[name]) * self._dtype_of(name).itemsize // 8)

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if keeps_float32(name) else next(iter(self._parameters.values())).dtype

    def _placements(self, parameter: str) -> list[Placement]:
        return parameter_placements(
            self._spec, parameter, self._ranks.topology, self._ranks.at, latent_split=self._latent_split
        )


def _named_globally(model: torch.nn.Module, first_expert: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (global name, tensor) of the parameters and of the routers' correction biases.

    Megatron numbers layers from 0 on every stage and experts from 0 on every rank; global names number them in the
    model.
    """
    layers = model.decoder.layers  # type: ignore[union-attr]
    biases = ((name, bias) for name, bias in model.named_buffers() if name.endswith(".router.expert_bias"))
    for name, parameter in (*model.named_parameters(), *biases):
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{layers[int(local)].layer_number - 1}.{rest}"  # type: ignore[index, union-attr]
        yield number_expert(name, first_expert), parameter
