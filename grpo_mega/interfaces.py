"""Interfaces between training, policy, engines and weight sync.

No implementation is imported here. `WeightSource` and `WeightSink` are the two ends of a weight sync: a source lists
the slices of Hugging Face tensors that its rank holds, a sink the regions of engine parameters that such slices fill.

Every implementation of `Engine` passes tests/engine/test_engine_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from grpo_mega.types import (
    AllowsUpdate,
    Completion,
    FileSink,
    Microbatch,
    Placement,
    Prompt,
    SamplingRequest,
    StateRecords,
    TensorSlice,
    UpdateStats,
)

if TYPE_CHECKING:
    from grpo_mega.observe.engine_gauges import EngineGauges
    from grpo_mega.parallel.peer_group import PeerGroup

RegionKind = Literal["plain", "permuted", "derived"]
LearnerState = Literal["params", "grads", "optimizer"]
"""The parts of a learner's memory: weights in the compute dtype, gradients, and master weights with moments."""


@dataclass(frozen=True)
class HeldSlice:
    """A slice of a Hugging Face tensor that this rank holds.

    `view` aliases the parameter, and `global_shape` is the shape of the whole tensor. Every rank that holds the slice
    may send it. Among the ranks of one copy of the model, exactly one slice has `counted` set for each byte; digests
    and whole tensors use that one.
    """

    hf: TensorSlice
    global_shape: tuple[int, ...]
    view: Tensor
    counted: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors that `part` returns."""
        return self.view.dtype

    def contains(self, hf: TensorSlice) -> bool:
        """Return True if `hf`, a slice of the same tensor, lies inside this slice."""
        ends = zip(hf.offsets, hf.shape, self.hf.offsets, self.hf.shape, strict=True)
        return all(h <= o and o + n <= h + m for o, n, h, m in ends)

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Return the parameter's own memory of `hf`, shaped `hf.shape`, or None if `part` computes its values.

        `hf` must lie inside this slice.
        """
        return self.part(hf)

    def part(self, hf: TensorSlice) -> Tensor:
        """Return the values of `hf`, shaped `hf.shape`, in `dtype`. `hf` must lie inside this slice."""
        starts = [o - h for o, h in zip(hf.offsets, self.hf.offsets, strict=True)]
        return self.view[tuple(slice(i, i + n) for i, n in zip(starts, hf.shape, strict=True))]


@dataclass(frozen=True)
class SinkRegion:
    """A region of an engine parameter, in the engine's dtype.

    `kind` states how the kernels use the region:

    - `plain`: the kernels read these bytes, so their digest verifies the region.
    - `permuted`: the kernels read the same numbers in another order; the digest is computed after the inverse.
    - `derived`: the kernels read values computed from these bytes; `WeightSink.probe` must confirm those values.
    """

    placement: Placement
    kind: RegionKind
    dtype: torch.dtype


class WeightSource(Protocol):
    """The policy's end of a weight sync, on one rank."""

    def shards(self) -> Sequence[HeldSlice]:
        """Return all slices that this rank holds, including slices that other ranks hold too."""
        ...

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor of the checkpoint, in checkpoint order; the same on every rank."""
        ...


class WeightSink(Protocol):
    """The engine's end of a weight sync, on one rank.

    One update is `begin_update`, then `write` (or `load`) for all weights, then `end_update`.
    """

    @property
    def policy_version(self) -> int:
        """Number of updates behind the weights; -1 before the first sync."""
        ...

    @property
    def supports_slices(self) -> bool:
        """True if the engine takes slices (`write`); False if it needs whole tensors (`load`)."""
        ...

    @property
    def streaming_reason(self) -> str:
        """The reason why the engine needs whole tensors; empty if it supports slices."""
        ...

    def layout(self) -> Sequence[SinkRegion]:
        """Return every region that a sync must fill on this rank.

        The regions cover each parameter element exactly once, except for the padding of the vocabulary. The result is
        empty if the engine does not support slices.
        """
        ...

    def begin_update(self) -> None:
        """Start an update. Until `end_update`, the engine does not sample."""
        ...

    def write(self, hf: TensorSlice, values: Tensor) -> None:
        """Copy `values`, shaped `hf.shape` and in the region's dtype, to every region that contains `hf`.

        Raises:
            ValueError: `hf` is not inside a region, or the shape or dtype is wrong.
            RuntimeError: no update has begun, or the engine failed.
        """
        ...

    def memory_of(self, hf: TensorSlice) -> Tensor | None:
        """Return memory, shaped `hf.shape`, into which the values of `hf` can be copied instead of calling `write`.

        Return None if only `write` can store them.

        Raises:
            ValueError, RuntimeError: as `write`.
        """
        ...

    def load(self, name: str, tensor: Tensor) -> None:
        """Pass the whole tensor `name`, in its checkpoint shape, to the engine's own loader."""
        ...

    def end_update(self, policy_version: int) -> None:
        """Recompute values derived from the weights, drop caches that depend on them, and set `policy_version`."""
        ...

    def digests(self, slices: Sequence[TensorSlice]) -> list[int]:
        """Return `models.digest.slice_digest` of each slice, computed from what the kernels read.

        Raises:
            ValueError: a slice is not inside a region.
            RuntimeError: the engine failed.
        """
        ...

    def probe(self) -> dict[str, str]:
        """Return parameter -> difference, for parameters whose derived values do not match their present weights."""
        ...


@dataclass(frozen=True)
class SyncPeers:
    """Ranks outside of this job that take part in its weight syncs: those of the engine servers.

    Args:
        group: the ranks of the job, followed by the ranks of all servers.
        replicas: for each engine, its ranks in `group`.
        announce: `announce(policy_version, verify)` starts the servers' part of a push, and returns at once.
    """

    group: PeerGroup
    replicas: Sequence[Sequence[int]]
    announce: Callable[[int, bool], None]


class Engine(Protocol):
    """An inference engine on this rank. Every rank of one replica makes the same calls in the same order."""

    @property
    def policy_version(self) -> int:
        """Number of updates behind the weights; -1 before the first sync."""

    @property
    def steps(self) -> int:
        """Number of engine steps so far, or of completions of an engine in other processes; shows its progress."""

    @property
    def sink(self) -> WeightSink:
        """The engine's end of a weight sync on this rank."""

    def sync_peers(
        self, shapes: dict[str, tuple[int, ...]], where: str, *, bucket_bytes: int, transport: str
    ) -> SyncPeers | None:
        """Collective: connect the ranks of the job with the ranks of engine servers.

        Args:
            shapes: `WeightSource.hf_shapes` of the policy.
            where: this rank's coordinates, for messages.
            bucket_bytes: `weight_sync.bucket_bytes`.
            transport: `weight_sync.transport`.

        Returns:
            None if the engine's weights are on the ranks of this job.

        Raises:
            RuntimeError: a server did not connect in time (names it).
        """
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingRequest,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample G completions per prompt and return them in the prompts' order.

        Args:
            prompts: tokenized prompts; empty where the other data-parallel ranks of the replica have prompts.
            sampling: group size G, temperature, limits in tokens, and the seed.
            on_completion: called as `on_completion(prompt_position, member, completion)` when a rollout is complete.

        Returns:
            One list of G completions per prompt, with log-probs in nats.

        Raises:
            RuntimeError: the engine is asleep, is being updated, or has no weights yet.
            ValueError: a prompt and its completion exceed the engine's maximum length.
        """

    def take_gauges(self) -> EngineGauges:
        """Return the gauges since the last call. Only those of the first rank of an engine count."""

    def fault(self) -> str:
        """Return why the processes of the engine cannot be used any more, or an empty string. Does not wait."""

    def sleep(self) -> None:
        """Release KV cache and weights, and reject sampling until a sync; with servers, release nothing."""

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Allocate the memory that `sleep` released. The weights are undefined until the next sync."""

    def close(self) -> None:
        """Free all resources. A second call does nothing."""


class TokenLoss(Protocol):
    """An algorithm's loss, per token."""

    @property
    def needs_reference(self) -> bool:
        """True if microbatches must carry `ref_log_probs`."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of each token.

        Args:
            log_probs: [T] float32 with gradient, nats.
            entropy: [T] float32 with gradient, nats.
            microbatch: whole rollouts. A row that is sharded over context-parallel ranks is gathered first.

        Returns:
            The loss per token [T] before `token_weights`, and per-token metrics [T], detached.
        """


class TokenValueLoss(Protocol):
    """A critic's loss, per token."""

    def __call__(self, values: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of each token.

        Args:
            values: [T] float32 with gradient.
            microbatch: whole rollouts.

        Returns:
            The loss per token [T] before `token_weights`, and per-token metrics [T], detached.
        """


class LearnerMemory(Protocol):
    """The memory of a trained model on this rank."""

    def offload(self, *parts: LearnerState) -> None:
        """Move these parts from the device to host memory. Gradients are discarded: they are zero after `reload`."""
        ...

    def reload(self, *parts: LearnerState) -> None:
        """Bring these parts back to the device."""
        ...

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes on this rank of `params`, `grads` and `optimizer` (master weights, moments)."""
        ...


class SavedLearner(LearnerMemory, Protocol):
    """A trained model on this rank whose state is part of a checkpoint."""

    def save(self, folder: Path, extra: dict[str, Any], files: FileSink | None = None) -> StateRecords:
        """Collective: save weights, optimizer state and `extra` into an existing, empty folder.

        A moving reference is saved too. Return the records of the live tensors, computed before anything was written.
        Files that hold tensors are passed to `files`; others, and all without it, are written at once.
        """
        ...

    def load(self, folder: Path) -> dict[str, Any]:
        """Collective: read what `save` wrote, from any layout, and return `extra`. A frozen reference is unchanged."""
        ...

    def live_records(self, *, with_optimizer: bool) -> StateRecords:
        """Collective: return what `save` returns; without master weights and moments unless `with_optimizer`."""
        ...


class Critic(SavedLearner, Protocol):
    """A second trained model on this rank. It estimates the expected reward before each token of a rollout."""

    def values(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """Return [T] float32 per microbatch, aligned to the predicted token and without gradient.

        The result is on every rank of the last pipeline stage, and None elsewhere.
        """
        ...

    def update(
        self, microbatches: Sequence[Microbatch], loss: TokenValueLoss, rate: float, allows: AllowsUpdate = ...
    ) -> UpdateStats:
        """Take one optimizer step on microbatches with `returns` and `old_values`, [T]. See `Policy.update`."""
        ...


class Policy(SavedLearner, Protocol):
    """The trained model on this rank."""

    @property
    def source(self) -> WeightSource:
        """The policy's end of a weight sync on this rank."""
        ...

    def log_probs(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """Return [T] float32 log-probs, in nats, per microbatch and without gradient.

        The result is on every rank of the last pipeline stage, and None elsewhere.
        """
        ...

    def update(
        self, microbatches: Sequence[Microbatch], loss: TokenLoss, rate: float, allows: AllowsUpdate = ...
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        """Take one optimizer step.

        Args:
            microbatches: of this data-parallel rank; all ranks pass the same number, with rows of one length.
            loss: loss per token, multiplied by `token_weights` and summed over all tokens of all ranks.
            rate: learning rate of this step.
            allows: gets the statistics before the step, which is not made if it returns False on all ranks. Without it
                a loss or a gradient that is not finite raises RuntimeError.

        Returns:
            The statistics, and the log-probs before the step as `log_probs` returns them: [T] per microbatch, in nats.
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Return a context in which the policy computes with the reference's weights."""
        ...

    def update_reference(self) -> None:
        """Collective: make the present weights the reference."""
        ...

    def full_tensors(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of every Hugging Face tensor in checkpoint order, on every rank.

        The shapes are those of `WeightSource.hf_shapes`. At most one bucket of `bucket_bytes` is alive at a time.
        """
        ...
