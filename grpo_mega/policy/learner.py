"""Base class of the trained Megatron models: pipeline schedule, updates, memory and state.

Subclasses define the output of the last stage: log-probabilities (policy.py) or values (critic.py). The loss of an
update is the sum of token_loss * token_weights (types.Microbatch) over all tokens of all microbatches on all ranks;
nothing else divides it. Rows are split over context-parallel ranks before they enter the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.config.policy_sections import OptimizerConfig
from grpo_mega.config.schema import Config
from grpo_mega.interfaces import LearnerState
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.context_parallel import rank_index
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.build import MegatronParts, build_policy
from grpo_mega.policy.fp8 import forget_copies
from grpo_mega.policy.fp8_histories import Fp8Histories
from grpo_mega.policy.fp8_scales import reported_scales
from grpo_mega.policy.host_threads import host_threads, intra_op_threads
from grpo_mega.policy.inspect.full_gradients import gather_gradients, gradient_of
from grpo_mega.policy.megatron_patches.checkpoint_writing import writing_to
from grpo_mega.policy.module_choice import choose_modules
from grpo_mega.policy.modules.policy_model import PolicyModel
from grpo_mega.policy.modules.routing_replay import RowParams
from grpo_mega.policy.phase_offload import PolicyMemory
from grpo_mega.policy.sharded_state import live_records, load_state, save_state
from grpo_mega.policy.update_metrics import UpdateReport
from grpo_mega.policy.weight_source import MegatronWeights
from grpo_mega.policy.work_clock import WorkClock
from grpo_mega.types import AllowsUpdate, FileSink, Microbatch, StateRecords, UpdateStats

from megatron.core import parallel_state  # isort: skip - after policy.build, which prepares the import
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

LastStage = Callable[[Tensor, Microbatch], tuple[Tensor, Tensor, Tensor]]
"""(output, microbatch) -> (loss, an integer tensor that Megatron expects, the value to return)."""
TokenLosses = Callable[[Tensor, Microbatch], tuple[Tensor, dict[str, Tensor], Tensor]]
"""(output, microbatch) -> (loss per token [T], metrics per token [T], the value to return)."""


class MegatronLearner:
    """A trained Megatron model. Construction is collective and needs Megatron's process groups."""

    weights: MegatronWeights

    def __init__(
        self, config: Config, spec: ModelSpec, ranks: Ranks, optimizer: OptimizerConfig, model: type[PolicyModel]
    ) -> None:
        """Build the model and its optimizer. The weights must be loaded afterwards."""
        self.spec, self.ranks = spec, ranks
        self._sequence_parallel = config.parallel.sequence_parallel
        modules = choose_modules(config, on_cuda=ranks.device.type == "cuda")
        self.parts: MegatronParts = build_policy(
            spec, config.parallel, config.precision, optimizer, ranks, modules, model
        )
        self._overlaps_gather, self._gather_pending = self.parts.ddps[0].ddp_config.overlap_param_gather, False
        self.dp_group = parallel_state.get_data_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        self._fp8 = config.precision.fp8
        self._fp8_histories: Fp8Histories | None = None
        self._memory = PolicyMemory(self.parts.buffers, self.parts.optimizer)
        self._copy_threads = host_threads(ranks)
        self._host_threads = self._copy_threads if optimizer.host_fraction > 0 else None
        self._work = WorkClock(ranks.device)
        reduce_gradients = self.parts.config.finalize_model_grads_func

        def reduce_after_work(*args: Any, **kwargs: Any) -> None:
            self._work.stop()
            reduce_gradients(*args, **kwargs)

        self.parts.config.finalize_model_grads_func = reduce_after_work

    def full_gradients(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole float32 gradient) of every HF tensor in checkpoint order on every rank.

        Call it after `backward`.
        """
        self._require("full_gradients", "training", "params", "grads")
        for buffer in self.parts.buffers:
            gather_gradients(buffer)
        return self.weights.mirrored(gradient_of).full_tensors(bucket_bytes)

    def take_work_seconds(self) -> float:
        """Return the seconds of passes since the last call in which this rank waited for no other model copy."""
        return self._work.take()

    def offload(self, *parts: LearnerState) -> None:
        """Move these parts to host memory and free their device memory, also for other allocators."""
        self._settle()
        if "params" in parts:
            forget_copies(self.parts.models)
        self._memory.offload(*parts)
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self, *parts: LearnerState) -> None:
        """Move these parts back to the device."""
        self._memory.reload(*parts)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of `params`, `grads` and `optimizer` (master weights, moments) of this rank."""
        return self._memory.num_bytes()

    def resident_bytes(self) -> dict[str, int]:
        """Return the bytes of `params`, `grads` and `optimizer` that are on the device of this rank now."""
        return self._memory.resident_bytes()

    def save(self, folder: Path, extra: dict[str, Any], files: FileSink | None = None) -> StateRecords:
        """Save weights, optimizer state and `extra` into an existing, empty folder, or pass them to `files`.

        Collective. Return the records of the live state.

        Raises:
            RuntimeError: weights and optimizer state are not on the device.
        """
        self._require("save", "checkpointing", "params", "optimizer")
        self._settle()
        with intra_op_threads(self._copy_threads), writing_to(files):
            return {".": save_state(self.parts, folder, extra, self.spec.vocab_size)}

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what `save` wrote, in any layout, and return `extra`. Collective.

        Raises:
            RuntimeError: weights and optimizer state are not on the device.
        """
        self._require("load", "checkpointing", "params", "optimizer")
        self._settle()
        self._memory.changed()
        with intra_op_threads(self._copy_threads):
            return load_state(self.parts, folder)

    def live_records(self, *, with_optimizer: bool) -> StateRecords:
        """Return the records of the weights and, if asked for, of master weights and moments. Collective.

        Raises:
            RuntimeError: they are not on the device.
        """
        if with_optimizer:
            self._require("live_records", "checkpointing", "params", "optimizer")
        self._require("live_records", "checkpointing", "params", reference=True)
        self._settle()
        with intra_op_threads(self._copy_threads):
            return {".": live_records(self.parts, self.spec.vocab_size, with_optimizer=with_optimizer)}

    def _require(self, reader: str, phase: str, *parts: LearnerState, reference: bool = False) -> None:
        """Check that these parts are on the device; see `PolicyMemory.require`."""
        self._memory.require(f"{type(self).__name__}.{reader}", phase, *parts, reference=reference)

    def _readable_weights(self) -> None:
        """Prepare a read of the weights by a sync or an export: check that they are on the device, and settle them."""
        self._require("weights", "reading_weights or syncing", "params", reference=True)
        self._settle()

    def _run_inference(
        self, microbatches: Sequence[Microbatch], compute: Callable[[Tensor, Microbatch], Tensor]
    ) -> list[Tensor] | None:
        """Return `compute(output, microbatch)` of each microbatch without gradient.

        The values are on every rank of the last pipeline stage; other ranks return None.

        Raises:
            RuntimeError: the parameters are not on the device.
        """
        self._require("log_probs, logits or values", "training or valuing", "params", reference=True)

        def keep(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            values = compute(output, microbatch)
            return values.new_zeros(()), _NO_TOKENS, values

        with torch.no_grad():
            outputs = self._run_schedule(microbatches, keep, forward_only=True)
        return outputs if self.ranks.is_last_stage else None

    def _gradient(
        self, microbatches: Sequence[Microbatch], token_losses: TokenLosses, owner: str = ""
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        """Compute the gradient and the statistics of an update, whose learning rate is still 0.

        Also returns the last values of `token_losses`. `owner` names the model in messages, such as "critic's ". If the
        loss or the gradient is not finite, the statistics have a `fault` (with rank and microbatch).

        Raises:
            RuntimeError: parameters and gradients are not on the device.
        """
        self._require("update or backward", "training or valuing", "params", "grads")
        report = UpdateReport(self.ranks, owner)

        def last_stage(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            token_loss, metrics, kept = token_losses(output, microbatch)
            total = (token_loss * microbatch.token_weights).sum()
            report.add(microbatch, total, token_loss, metrics)
            return total, _NO_TOKENS, kept

        for ddp in self.parts.ddps:
            ddp.zero_grad_buffer()
        self.parts.optimizer.zero_grad()
        if self._fp8 is not None and self._fp8.recipe == "delayed":
            self._fp8_histories = Fp8Histories(self.parts.models)
        outputs = self._run_schedule(microbatches, last_stage, forward_only=False)
        sums, maxima, fault = report.reduce(self.dp_group, parallel_state.get_pipeline_model_parallel_group())
        if self._fp8 is not None:
            means, largest = reported_scales(self.parts.models, self._fp8, len(microbatches), self.ranks.device)
            sums, maxima = sums | means, maxima | largest
        self.parts.optimizer.prepare_grads()
        grad_norm = float(self.parts.optimizer.get_grad_norm())
        if fault is None and not math.isfinite(grad_norm):
            fault = f"the {owner}gradient norm is {grad_norm} although every loss is finite"
        rows = tuple(report.non_finite_rows)
        stats = UpdateStats(grad_norm, 0.0, sums, maxima, fault, True, rows, report.ratio_counts)
        return stats, outputs if self.ranks.is_last_stage else None

    def _step_if_allowed(self, stats: UpdateStats, learning_rate: float, allows: AllowsUpdate) -> UpdateStats:
        """Run the optimizer step after `_gradient`, unless `allows` returns False for its statistics."""
        if not allows(stats):
            if self._fp8_histories is not None:
                self._fp8_histories.restore()
            return replace(stats, is_made=False)
        assert stats.fault is None, f"an update with {stats.fault} must not be made"
        self._require("update", "training or valuing", "params", "grads", "optimizer")
        self._memory.changed()
        for group in self.parts.optimizer.param_groups:
            group["lr"] = learning_rate
        with intra_op_threads(self._host_threads):
            self.parts.optimizer.step()
        self._gather_pending = self._overlaps_gather
        return replace(stats, learning_rate=learning_rate)

    def _settle(self) -> None:
        """Finish a parameter gather that overlaps with the next forward pass, so that parameters can be read."""
        if self._gather_pending:
            for ddp in self.parts.ddps:
                ddp.start_param_sync(force_sync=True)
            self._gather_pending = False

    def _context_parallel_part(self, values: Tensor, microbatch: Microbatch) -> Tensor:
        """Return the values of the tokens of this context-parallel rank, from those of a whole row [T]."""
        cp = self.ranks.topology.cp
        if cp == 1:
            return values
        return values[rank_index(microbatch.cu_seqlens, cp, self.ranks.at.cp_rank, values.size(0))]

    def _expert_choices(self, microbatch: Microbatch) -> Tensor | None:
        """Return the expert choices of the tokens that this rank routes, from those of a whole row [T, L, K]."""
        if microbatch.expert_choices is None:
            return None
        return self._routed_part(microbatch.expert_choices, microbatch)

    def _routed_part(self, values: Tensor, microbatch: Microbatch) -> Tensor:
        """Return the values of the tokens that this rank routes, from those of a whole row [T, ...]."""
        part = self._context_parallel_part(values, microbatch)
        return part.chunk(self.ranks.topology.tp)[self.ranks.at.tp_rank] if self._sequence_parallel else part

    def _row_params(self, microbatch: Microbatch) -> RowParams:
        longest = int(microbatch.cu_seqlens.diff().max())
        return RowParams(
            qkv_format="thd",
            cu_seqlens_q=microbatch.cu_seqlens,
            cu_seqlens_kv=microbatch.cu_seqlens,
            cu_seqlens_q_padded=microbatch.cu_seqlens,  # padding belongs to the sequence before it
            cu_seqlens_kv_padded=microbatch.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            expert_choices=self._expert_choices(microbatch),
            token_mask=None if microbatch.token_mask is None else self._routed_part(microbatch.token_mask, microbatch),
        )

    def _run_schedule(
        self,
        microbatches: Sequence[Microbatch],
        last_stage: LastStage,
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron's pipeline schedule."""

        def forward(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            microbatch = next(iterator)
            assert len(microbatch.token_ids) == row_tokens, "pipeline messages have one shape"
            output = model(
                self._context_parallel_part(microbatch.token_ids, microbatch)[None],
                self._context_parallel_part(microbatch.position_ids, microbatch)[None],
                None,
                packed_seq_params=self._row_params(microbatch),
            )
            return output, lambda last: last_stage(last, microbatch)

        row_tokens = len(microbatches[0].token_ids)
        rows: Sequence[Microbatch] = microbatches  # on the host a row is packed when it is its turn
        if self.ranks.device.type != "cpu":
            rows = [_to_device(m, self.ranks.device) for m in microbatches]
        chunks = self.parts.ddps
        self._work.start()
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=row_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        self._work.stop()
        return outputs


def require_finite(stats: UpdateStats) -> bool:
    """Return True, for an update whose loss and gradient are finite.

    Raises:
        RuntimeError: they are not (names rank and microbatch).
    """
    if stats.fault is not None:
        raise RuntimeError(f"{stats.fault}; no update was made")
    return True


_NO_TOKENS = torch.zeros((), dtype=torch.int, device="cpu")  # Megatron would divide by it; this program does not


def _to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(microbatch).items() if isinstance(v, Tensor)}
    return replace(microbatch, **tensors)
