"""A Megatron model that is trained: its schedules, updates, memory and state. What its last stage computes of a row is
the business of policy.py (log-probs) and critic.py (values).

The loss of an update is the sum over all tokens of all microbatches on all ranks of token_loss * token_weights
(types.Microbatch): nothing else divides it. Rows are cut over context-parallel ranks on their way into the model.
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
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.context_parallel import rank_index
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.build import MegatronParts, build_policy
from grpo_mega.policy.fp8 import forget_copies
from grpo_mega.policy.fp8_scales import reported_scales
from grpo_mega.policy.inspect.full_gradients import gather_gradients, gradient_of
from grpo_mega.policy.modules.policy_model import PolicyModel
from grpo_mega.policy.modules.routing_replay import RowParams
from grpo_mega.policy.offload import Part, PolicyMemory
from grpo_mega.policy.sharded_state import load_state, save_state
from grpo_mega.policy.update_metrics import UpdateReport
from grpo_mega.policy.weight_source import MegatronWeights
from grpo_mega.types import Microbatch, UpdateStats

from megatron.core import parallel_state  # isort: skip - after policy.build, which prepares the import
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

LastStage = Callable[[Tensor, Microbatch], tuple[Tensor, Tensor, Tensor]]
"""(output, microbatch) -> (loss, an int tensor, what to return)."""
TokenLosses = Callable[[Tensor, Microbatch], tuple[Tensor, dict[str, Tensor], Tensor]]
"""(output, microbatch) -> (loss per token [T], its metrics [T], what to return)."""


class MegatronLearner:
    """Built collectively, after Megatron's groups: every rank constructs it with the same arguments."""

    weights: MegatronWeights

    def __init__(
        self, config: Config, spec: ModelSpec, ranks: Ranks, optimizer: OptimizerConfig, model: type[PolicyModel]
    ) -> None:
        """The weights are yet to be loaded."""
        self.spec, self.ranks = spec, ranks
        self._cuts_sequences = config.parallel.sequence_parallel
        self._gathers_later, self._gather_pending = config.parallel.overlap_param_gather, False
        self.parts: MegatronParts = build_policy(spec, config.parallel, config.precision, optimizer, ranks, model)
        self.dp_group = parallel_state.get_data_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        self._fp8 = config.precision.fp8
        self._memory = PolicyMemory(self.parts.buffers, self.parts.optimizer)

    def full_gradients(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """After `backward`: the gradient of every HF tensor, float32, whole, in checkpoint order, on every rank."""
        for buffer in self.parts.buffers:
            gather_gradients(buffer)
        return self.weights.mirrored(gradient_of).full_tensors(bucket_bytes)

    def offload(self, *parts: Part) -> None:
        """Free the device memory of these parts; without CUDA there is one memory and nothing to free."""
        if self.ranks.device.type == "cuda":
            self._settle()
            if "params" in parts:
                forget_copies(self.parts.models)
            self._memory.offload(*parts)

    def reload(self, *parts: Part) -> None:
        """Bring them back."""
        if self.ranks.device.type == "cuda":
            self._memory.reload(*parts)

    def state_bytes(self) -> dict[str, int]:
        """What this rank trains with: bytes of `params`, `grads` and `optimizer` (master weights, moments)."""
        return self._memory.num_bytes()

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Collective: weights, optimizer state and `extra` into an existing, empty folder."""
        self._settle()
        save_state(self.parts, folder, extra)

    def load(self, folder: Path) -> dict[str, Any]:
        """Collective: the reverse, at any layout; returns `extra`."""
        self._settle()
        return load_state(self.parts, folder)

    def _inferred(
        self, microbatches: Sequence[Microbatch], of: Callable[[Tensor, Microbatch], Tensor]
    ) -> list[Tensor] | None:
        """`of(output, microbatch)` of each, without gradient, on every rank of the last stage; None elsewhere."""

        def keep(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            values = of(output, microbatch)
            return values.new_zeros(()), _NO_TOKENS, values

        with torch.no_grad():
            outputs = self._run_schedule(microbatches, keep, forward_only=True)
        return outputs if self.ranks.is_last_stage else None

    def _gradient(
        self, microbatches: Sequence[Microbatch], token_losses: TokenLosses, whose: str = ""
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        """The gradient of an update and what the update reports (with learning rate 0), and what `token_losses`
        returns last. `whose` loss it is, for messages.

        Raises:
            RuntimeError: loss or gradient is not finite (names rank and microbatch).
        """
        report = UpdateReport(self.ranks, whose)

        def last_stage(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
            token_loss, metrics, kept = token_losses(output, microbatch)
            total = (token_loss * microbatch.token_weights).sum()
            report.add(microbatch, total, token_loss, metrics)
            return total, _NO_TOKENS, kept

        for ddp in self.parts.ddps:
            ddp.zero_grad_buffer()
        self.parts.optimizer.zero_grad()
        outputs = self._run_schedule(microbatches, last_stage, forward_only=False)
        sums, maxima = report.reduce(self.dp_group, parallel_state.get_pipeline_model_parallel_group())
        if self._fp8 is not None:
            means, largest = reported_scales(self.parts.models, self._fp8, len(microbatches), self.ranks.device)
            sums, maxima = sums | means, maxima | largest
        self.parts.optimizer.prepare_grads()
        grad_norm = float(self.parts.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise RuntimeError(
                f"the {whose}gradient norm is {grad_norm} although every loss is finite; no update was made"
            )
        return UpdateStats(grad_norm, 0.0, sums, maxima), outputs if self.ranks.is_last_stage else None

    def _step(self, stats: UpdateStats, learning_rate: float) -> UpdateStats:
        """The optimizer step after `_gradient`."""
        for group in self.parts.optimizer.param_groups:
            group["lr"] = learning_rate
        self.parts.optimizer.step()
        self._gather_pending = self._gathers_later
        return replace(stats, learning_rate=learning_rate)

    def _settle(self) -> None:
        """Collective: finish what the last update left to the next forward pass, so that parameters can be read."""
        if self._gather_pending:
            for ddp in self.parts.ddps:
                ddp.start_param_sync(force_sync=True)
            self._gather_pending = False

    def _share(self, values: Tensor, microbatch: Microbatch) -> Tensor:
        """[T] -> those of the tokens that this context-parallel rank computes."""
        cp = self.ranks.topology.cp
        if cp == 1:
            return values
        return values[rank_index(microbatch.cu_seqlens, cp, self.ranks.at.cp_rank).to(values.device)]

    def _expert_choices(self, microbatch: Microbatch) -> Tensor | None:
        """[T, L, K] -> those of the tokens whose experts this rank chooses."""
        if microbatch.expert_choices is None:
            return None
        choices = self._share(microbatch.expert_choices, microbatch)
        return choices.chunk(self.ranks.topology.tp)[self.ranks.at.tp_rank] if self._cuts_sequences else choices

    def _run_schedule(
        self,
        microbatches: Sequence[Microbatch],
        last_stage: LastStage,
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's pipeline schedule."""

        def forward(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            microbatch = next(iterator)
            output = model(
                self._share(microbatch.token_ids, microbatch)[None],
                self._share(microbatch.position_ids, microbatch)[None],
                None,
                packed_seq_params=_row_params(microbatch, self._expert_choices(microbatch)),
            )
            return output, lambda last: last_stage(last, microbatch)

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


_NO_TOKENS = torch.zeros((), dtype=torch.int)  # Megatron counts tokens to divide by them; we do not


def _row_params(microbatch: Microbatch, expert_choices: Tensor | None) -> RowParams:
    longest = int(microbatch.cu_seqlens.diff().max())
    return RowParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        cu_seqlens_q_padded=microbatch.cu_seqlens,  # padding belongs to the sequence before it
        cu_seqlens_kv_padded=microbatch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        expert_choices=expert_choices,
    )


def _to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    if device.type == "cpu":
        return microbatch
    tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(microbatch).items() if isinstance(v, Tensor)}
    return replace(microbatch, **tensors)
