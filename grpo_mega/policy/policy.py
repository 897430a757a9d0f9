"""The policy on this rank: log-probs, updates, the reference, and its weights as a source of syncs.

Owns Megatron's schedules; never decides what is sampled or how it is scored. The loss of an update is the sum over all
tokens of all microbatches on all ranks of token_loss * token_weights (types.Microbatch): nothing else divides it.
Rows are cut over context-parallel ranks on their way into the model, and log-probs are whole again before the loss:
a loss sees whole rollouts in every layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.convert.spec import ModelSpec
from grpo_mega.interfaces import TokenLoss
from grpo_mega.parallel.context import rank_index, whole_row
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.build import MegatronParts, build_policy, init_groups
from grpo_mega.policy.gradients import gather_gradients, gradient_of
from grpo_mega.policy.offload import Part, PolicyMemory
from grpo_mega.policy.reference import Reference
from grpo_mega.policy.reports import UpdateReport
from grpo_mega.policy.state import load_state, load_weights, save_state, save_weights
from grpo_mega.policy.weights import MegatronWeights, weight_copy_group
from grpo_mega.types import Microbatch, UpdateStats

from megatron.core import parallel_state  # isort: skip - after policy.build, which prepares the import
from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip


class MegatronPolicy:
    """Built collectively: every rank constructs it with the same arguments."""

    def __init__(self, config: Config, spec: ModelSpec, folder: Path, ranks: Ranks, *, with_reference: bool) -> None:
        """Loads the weights of `folder`; they also become the reference, when one is asked for."""
        init_groups(ranks, config.guard.timeout_seconds)
        self.spec, self.ranks = spec, ranks
        self._gathers_later, self._gather_pending = config.parallel.overlap_param_gather, False
        self.parts: MegatronParts = build_policy(spec, config.parallel, config.precision, config.optimizer, ranks)
        self.temperature = config.sampling.temperature
        self.model_parallel_group = weight_copy_group(ranks)
        self.weights = MegatronWeights(self.parts.models, spec, ranks, self.model_parallel_group, self._settle)
        self.weights.load_from_hf(folder)
        self.parts.optimizer.reload_model_params()  # the optimizer's master weights were copied before the load
        self.dp_group = parallel_state.get_data_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        self._reference = Reference(self.parts.buffers) if with_reference else None
        self._reference_moves = config.algorithm.ref_update_every > 0
        self._memory = PolicyMemory(self.parts.buffers, self.parts.optimizer)

    @property
    def source(self) -> MegatronWeights:
        """The end of a weight sync."""
        return self.weights

    def full_tensors(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Every HF tensor, whole, in checkpoint order, on every rank; at most one bucket is alive."""
        return self.weights.full_tensors(bucket_bytes)

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `log_probs` are the reference's."""
        assert self._reference is not None, "no reference was built: the loss does not need one"
        self._settle()
        return self._reference.active()

    def log_probs(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """[T] per microbatch, without gradient, on every rank of the last stage; None elsewhere."""

        def keep(hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            values, _ = self._head(hidden, microbatch)
            return values.new_zeros(()), _NO_TOKENS, values

        with torch.no_grad():
            outputs = self._run_schedule(microbatches, keep, forward_only=True)
        return outputs if self.ranks.is_last_stage else None

    def logits(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """[T, V] float32 per microbatch, whole, on every rank of the last stage; None elsewhere. For comparisons: a row
        of a large model's logits does not fit a device."""

        def keep(hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            values = self.parts.models[-1].head_logits(hidden, vocab_size=self.spec.vocab_size)
            if self.ranks.topology.cp > 1:
                values = whole_row(values, microbatch.cu_seqlens, self.cp_group)
            return values.new_zeros(()), _NO_TOKENS, values

        with torch.no_grad():
            outputs = self._run_schedule(microbatches, keep, forward_only=True)
        return outputs if self.ranks.is_last_stage else None

    def update(
        self, microbatches: Sequence[Microbatch], loss: TokenLoss, learning_rate: float
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        """One optimizer step; also returns the log-probs of before it, as `log_probs` would.

        Raises:
            RuntimeError: loss or gradient is not finite (names rank and microbatch); the weights are unchanged.
        """
        stats, outputs = self.backward(microbatches, loss)
        for group in self.parts.optimizer.param_groups:
            group["lr"] = learning_rate
        self.parts.optimizer.step()
        self._gather_pending = self._gathers_later
        return replace(stats, learning_rate=learning_rate), outputs

    def backward(self, microbatches: Sequence[Microbatch], loss: TokenLoss) -> tuple[UpdateStats, list[Tensor] | None]:
        """The gradient of an update and what the update reports, without its step (and with learning rate 0).

        Raises:
            RuntimeError: as `update`.
        """
        report = UpdateReport(self.ranks)

        def token_losses(hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            values, entropy = self._head(hidden, microbatch)
            token_loss, metrics = loss(values, entropy, microbatch)
            total = (token_loss * microbatch.token_weights).sum()
            report.add(microbatch, total, token_loss, metrics)
            return total, _NO_TOKENS, values.detach()

        for ddp in self.parts.ddps:
            ddp.zero_grad_buffer()
        self.parts.optimizer.zero_grad()
        outputs = self._run_schedule(microbatches, token_losses, forward_only=False)
        sums, maxima = report.reduce(self.dp_group, parallel_state.get_pipeline_model_parallel_group())
        self.parts.optimizer.prepare_grads()
        grad_norm = float(self.parts.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise RuntimeError(f"the gradient norm is {grad_norm} although every loss is finite; no update was made")
        return UpdateStats(grad_norm, 0.0, sums, maxima), outputs if self.ranks.is_last_stage else None

    def full_gradients(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """After `backward`: the gradient of every HF tensor, float32, whole, in checkpoint order, on every rank."""
        for buffer in self.parts.buffers:
            gather_gradients(buffer)
        return self.weights.mirrored(gradient_of).full_tensors(bucket_bytes)

    def offload(self, *parts: Part) -> None:
        """Free the device memory of these parts; without CUDA there is one memory and nothing to free."""
        if self.ranks.device.type == "cuda":
            self._settle()
            self._memory.offload(*parts)

    def reload(self, *parts: Part) -> None:
        """Bring them back."""
        if self.ranks.device.type == "cuda":
            self._memory.reload(*parts)

    def update_reference(self) -> None:
        """Collective: the present weights become the reference."""
        assert self._reference is not None, "no reference was built: the loss does not need one"
        self._settle()
        self._reference.update()

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Collective: weights, optimizer state and `extra` into an existing, empty folder; and the reference, where it
        moves."""
        self._settle()
        save_state(self.parts, folder, extra)
        if self._reference_moves:
            with self.reference():
                save_weights(self.parts, folder / _REFERENCE, is_first=self.ranks.is_first)

    def load(self, folder: Path) -> dict[str, Any]:
        """Collective: the reverse, at any layout; returns `extra`. A reference that is frozen stays what it was."""
        self._settle()
        if self._reference_moves:
            load_weights(self.parts, folder / _REFERENCE)
            self.update_reference()
        return load_state(self.parts, folder)

    def _settle(self) -> None:
        """Collective: finish what the last update left to the next forward pass, so that parameters can be read."""
        if self._gather_pending:
            for ddp in self.parts.ddps:
                ddp.start_param_sync(force_sync=True)
            self._gather_pending = False

    def _head(self, hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the whole row [T], on every rank of the last stage."""
        found = self.parts.models[-1].head_log_probs(
            hidden, self._share(microbatch.labels, microbatch), temperature=self.temperature,
            vocab_size=self.spec.vocab_size,
        )  # fmt: skip
        if self.ranks.topology.cp == 1:
            return found
        log_probs, entropy = whole_row(torch.stack(found, 1), microbatch.cu_seqlens, self.cp_group).unbind(1)
        return log_probs, entropy

    def _share(self, values: Tensor, microbatch: Microbatch) -> Tensor:
        """[T] -> those of the tokens that this context-parallel rank computes."""
        cp = self.ranks.topology.cp
        if cp == 1:
            return values
        return values[rank_index(microbatch.cu_seqlens, cp, self.ranks.at.cp_rank).to(values.device)]

    def _run_schedule(
        self,
        microbatches: Sequence[Microbatch],
        last_stage: Callable[[Tensor, Microbatch], tuple[Tensor, Tensor, Tensor]],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's pipeline schedule; `last_stage(hidden, microbatch)` -> (loss, an int tensor, what to return)."""

        def forward(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            microbatch = next(iterator)
            hidden = model(
                self._share(microbatch.token_ids, microbatch)[None],
                self._share(microbatch.position_ids, microbatch)[None],
                None,
                packed_seq_params=_packed_params(microbatch),
            )
            return hidden, lambda output: last_stage(output, microbatch)

        row_tokens = {len(m.token_ids) for m in microbatches}
        assert len(row_tokens) == 1, f"rows of {sorted(row_tokens)} tokens: pipeline messages have one shape"
        rows = [_to_device(m, self.ranks.device) for m in microbatches]
        chunks = self.parts.ddps
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=row_tokens.pop(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return outputs


_REFERENCE = "reference"  # folder in a checkpoint
_NO_TOKENS = torch.zeros((), dtype=torch.int)  # Megatron counts tokens to divide by them; we do not


def _packed_params(microbatch: Microbatch) -> PackedSeqParams:
    longest = int(microbatch.cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        cu_seqlens_q_padded=microbatch.cu_seqlens,  # padding belongs to the sequence before it
        cu_seqlens_kv_padded=microbatch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    if device.type == "cpu":
        return microbatch
    tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(microbatch).items() if isinstance(v, Tensor)}
    return replace(microbatch, **tensors)
