"""What the loop, the phases and the weight sync know of a policy and of an engine.

Nothing here imports an implementation. `WeightSource` and `WeightSink` are the two ends of a sync: a source lists the
slices of Hugging Face tensors that its rank holds, a sink the regions of its parameters that such slices fill.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from grpo_mega.types import Completion, Microbatch, Placement, Prompt, SamplingRequest, TensorSlice, UpdateStats

RegionKind = Literal["plain", "permuted", "derived"]


@dataclass(frozen=True)
class HeldSlice:
    """A slice of a Hugging Face tensor on this rank: `view` aliases the parameter, `global_shape` is the tensor's.

    Of the ranks that hold one copy of the model, each byte is `counted` by exactly one (in digests, in whole tensors);
    every holder may send it.
    """

    hf: TensorSlice
    global_shape: tuple[int, ...]
    view: Tensor
    counted: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of what `part` gives."""
        return self.view.dtype

    def contains(self, hf: TensorSlice) -> bool:
        """Is `hf`, a slice of the same tensor, inside this one?"""
        ends = zip(hf.offsets, hf.shape, self.hf.offsets, self.hf.shape, strict=True)
        return all(h <= o and o + n <= h + m for o, n, h, m in ends)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """The parameter's own memory of `hf`, which is inside; None where `part` computes something."""
        return self.part(hf)

    def part(self, hf: TensorSlice) -> Tensor:
        """The values of `hf`, which is inside, as they travel but for their dtype."""
        starts = [o - h for o, h in zip(hf.offsets, self.hf.offsets, strict=True)]
        return self.view[tuple(slice(i, i + n) for i, n in zip(starts, hf.shape, strict=True))]


@dataclass(frozen=True)
class SinkRegion:
    """A region of an engine parameter, in the engine's dtype. `plain`: the kernels read these bytes, so their digest is
    the proof. `permuted`: they read the same numbers in another order; the digest is made after the inverse. `derived`:
    they read something computed from these bytes, which `probe` must confirm beside the digest."""

    placement: Placement
    kind: RegionKind
    dtype: torch.dtype


@dataclass(frozen=True)
class ParameterSize:
    """A parameter as one rank holds it. `is_expert`: it belongs to a routed expert, on the grid of the experts."""

    name: str
    shape: tuple[int, ...]
    is_expert: bool

    @property
    def numel(self) -> int:
        """Elements on the rank."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SizeSums:
    """Elements of some parameters; `dense_aligned` and `expert_aligned` with each rounded up to 64, as Megatron's flat
    buffers lay them out (param_and_grad_buffer.py:658). `matrices`: of what layers multiply with, routers left out."""

    numel: int
    dense_aligned: int
    expert_aligned: int
    matrices: int

    @classmethod
    def of(cls, parameters: Sequence[ParameterSize]) -> SizeSums:
        """Of these."""
        aligned = {kind: sum(-(-p.numel // 64) * 64 for p in parameters if p.is_expert == kind) for kind in (0, 1)}
        matrices = sum(p.numel for p in parameters if len(p.shape) > 1 and ".router." not in p.name)
        return cls(sum(p.numel for p in parameters), aligned[0], aligned[1], matrices)


@dataclass(frozen=True)
class ModuleSizes:
    """What the policy's modules are made of on one rank of the tensor- and expert-parallel axes. A stage of a pipeline
    is a choice of these; `moe_layer` and `dense_layer` are empty where a model has no such layer."""

    embedding: tuple[ParameterSize, ...]
    dense_layer: tuple[ParameterSize, ...]
    moe_layer: tuple[ParameterSize, ...]
    final_norm: tuple[ParameterSize, ...]
    head: tuple[ParameterSize, ...]
    """Of an untied head; a tied one on another stage than the embedding is a copy of the embedding."""

    @functools.cached_property
    def sums(self) -> dict[str, SizeSums]:
        """Field -> sums over its parameters, of which a layer of many experts has hundreds."""
        return {field.name: SizeSums.of(getattr(self, field.name)) for field in dataclasses.fields(self)}


class ModuleCounter(Protocol):
    """Sizes of the real modules in a layout of the dense (tp) and the expert (ep, etp) axes; allocates nothing."""

    def __call__(self, *, tp: int, ep: int, etp: int) -> ModuleSizes: ...


class WeightSource(Protocol):
    """The policy's end of a sync."""

    def shards(self) -> Sequence[HeldSlice]:
        """All slices that this rank holds, also those that other ranks hold as well."""
        ...

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the checkpoint, in checkpoint order; the same on every rank."""
        ...


class WeightSink(Protocol):
    """The engine's end of a sync, on one rank."""

    @property
    def policy_version(self) -> int:
        """Updates behind the weights; -1 before the first sync."""
        ...

    @property
    def streams_because(self) -> str | None:
        """Why this engine must be given whole tensors (`load`); None: it takes slices (`write`)."""
        ...

    def layout(self) -> Sequence[SinkRegion]:
        """Every region that a sync must fill on this rank; covers each parameter element exactly once, but for the
        padding of the vocabulary. Empty where tensors are streamed."""
        ...

    def begin_update(self) -> None: ...

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        """Copy `values`, shaped `hf.shape`, to where that part of a region lies."""
        ...

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Where the values of that part of a region can be put without `write`; None where only `write` can."""
        ...

    def load(self, name: str, tensor: Tensor) -> None:
        """Give a whole tensor to the engine's own loader."""
        ...

    def end_update(self, policy_version: int) -> None:
        """Rebuild what is derived from the written weights, drop caches that depend on them, adopt the version."""
        ...

    def digest(self, hf: TensorSlice) -> int:
        """`convert.digest.slice_digest` of that part of a region, remade from what the kernels read."""
        ...

    def probe(self) -> dict[str, str]:
        """Parameters whose derived copy is not the one of their present weights -> what differs."""
        ...


class Engine(Protocol):
    """An inference engine on this rank; every rank of one replica makes the same calls in the same order."""

    @property
    def policy_version(self) -> int: ...

    @property
    def sink(self) -> WeightSink: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """G completions per prompt, in the prompts' order.

        `on_completion(prompt_position, member, completion)` is called as soon as a rollout is complete, while others
        are still being sampled.
        """
        ...

    def sleep(self) -> None:
        """Release the KV cache (and, on a device, the weights)."""
        ...

    def wake(self, what: Literal["weights", "kv_cache"]) -> None: ...

    def close(self) -> None: ...


class TokenLoss(Protocol):
    """An algorithm's loss, per token."""

    @property
    def needs_reference(self) -> bool:
        """Whether microbatches must carry `ref_log_probs`."""
        ...

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """log_probs, entropy: [T] float32 with gradient. Returns the loss per token [T] (before `token_weights`) and
        per-token metrics [T] (detached). The microbatch holds whole rollouts: a row that is cut over ranks
        is put together for its loss."""
        ...


class TokenValueLoss(Protocol):
    """A critic's loss, per token."""

    def __call__(self, values: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """values: [T] float32 with gradient. Returns the loss per token [T] (before `token_weights`) and per-token
        metrics [T] (detached)."""
        ...


class Critic(Protocol):
    """A second trained model on this rank: what reward a rollout can expect before each of its tokens."""

    def values(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """[T] per microbatch, aligned to the predicted token, without gradient, on every rank of the last pipeline
        stage; None elsewhere."""
        ...

    def update(self, microbatches: Sequence[Microbatch], loss: TokenValueLoss, learning_rate: float) -> UpdateStats:
        """One optimizer step on the given microbatches, which carry `returns` and `old_values`."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """As `Policy.state_bytes`."""
        ...

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Collective: weights, optimizer state and `extra` into an existing, empty folder."""
        ...

    def load(self, folder: Path) -> dict[str, Any]:
        """Collective: the reverse, at any layout; returns `extra`."""
        ...


class Policy(Protocol):
    """The trained model on this rank."""

    @property
    def source(self) -> WeightSource: ...

    def log_probs(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """[T] per microbatch, without gradient, on every rank of the last pipeline stage; None elsewhere."""
        ...

    def update(
        self, microbatches: Sequence[Microbatch], loss: TokenLoss, learning_rate: float
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        """One optimizer step on the given microbatches (all ranks bring the same number, of one row length). Also
        returns the log-probs of before the step, as `log_probs` would."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the policy computes with the reference's weights."""
        ...

    def update_reference(self) -> None:
        """Collective: the present weights become the reference."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """What this rank trains with: bytes of `params`, `grads` and `optimizer` (master weights, moments)."""
        ...

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Collective: weights, optimizer state and `extra` into an existing, empty folder; and the reference, where it
        moves."""
        ...

    def load(self, folder: Path) -> dict[str, Any]:
        """Collective: the reverse, at any layout; returns `extra`. A reference that is frozen stays what it was."""
        ...

    def full_tensors(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Every HF tensor, whole, in checkpoint order, on every rank; at most one bucket is alive."""
        ...
