"""The policy on this rank: log-probabilities, updates, the reference, and the source of weight syncs.

It never decides which rollouts are sampled or how they are scored. learner.py splits rows over context-parallel ranks;
log-probabilities are gathered before the loss, so a loss sees whole rollouts in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.interfaces import TokenLoss
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.context_parallel import whole_row
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.build import init_groups
from grpo_mega.policy.learner import MegatronLearner, require_finite
from grpo_mega.policy.megatron_patches.checkpoint_writing import writing_to
from grpo_mega.policy.modules.policy_model import PolicyModel
from grpo_mega.policy.modules.router_aux_loss import RouterBalance, segments_of
from grpo_mega.policy.modules.router_bias import correction_biases, move_biases_with_load
from grpo_mega.policy.modules.routing_replay import RowParams, replay_routing
from grpo_mega.policy.reference import Reference
from grpo_mega.policy.sharded_state import load_weights, save_weights
from grpo_mega.policy.weight_source import MegatronWeights, weight_copy_group
from grpo_mega.types import AllowsUpdate, FileSink, Microbatch, StateRecords, UpdateStats


class MegatronPolicy(MegatronLearner):
    """Megatron policy. Construction is collective: every rank passes the same arguments."""

    def __init__(self, config: Config, spec: ModelSpec, folder: Path, ranks: Ranks, *, with_reference: bool) -> None:
        """Load the weights of `folder` or `model.checkpoint`. With `with_reference` they also become the reference."""
        init_groups(ranks, config.guard.timeout_seconds)
        super().__init__(config, spec, ranks, config.optimizer, PolicyModel)
        replay_routing(self.parts.models, config.parallel.recompute_modules or ())
        move_biases_with_load(self.parts.config, self.parts.models, config.algorithm.router_bias_update_rate)
        self._balance: RouterBalance | None = None
        if config.algorithm.aux_loss_coef > 0 and spec.moe is not None:
            self._balance = RouterBalance(self.parts.models, config.algorithm.aux_loss_coef, sum(spec.moe.layers))
        self.temperature = config.sampling.temperature
        self.model_parallel_group = group = weight_copy_group(ranks)
        self.weights = MegatronWeights(self.parts.models, spec, ranks, group, self._readable_weights)
        self.weights.load_start(config, folder)
        self.parts.optimizer.reload_model_params()  # the optimizer's master weights were copied before the load
        biases = [*correction_biases(self.parts.models)]
        self._reference = Reference(self.parts.buffers, self._memory, biases) if with_reference else None
        self._reference_is_updated = config.algorithm.ref_update_every > 0

    @property
    def source(self) -> MegatronWeights:
        """The policy side of a weight sync."""
        return self.weights

    def full_tensors(self, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) in checkpoint order on every rank. At most one bucket is in memory."""
        return self.weights.full_tensors(bucket_bytes)

    def reference(self) -> AbstractContextManager[None]:
        """Return a context in which `log_probs` returns the log-probabilities of the reference."""
        assert self._reference is not None, "no reference was built: the loss does not need one"
        self._require("reference", "training or checkpointing", "params")
        self._settle()
        return self._reference.active()

    def log_probs(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """Return [T] per microbatch without gradient on every rank of the last pipeline stage, None on other ranks."""
        return self._run_inference(microbatches, lambda hidden, microbatch: self._head(hidden, microbatch)[0])

    def logits(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """Return [T, V] float32 per microbatch on every rank of the last pipeline stage, None on other ranks.

        For comparisons of small models only: a row of logits of a large model does not fit on a device.
        """

        def whole_logits(hidden: Tensor, microbatch: Microbatch) -> Tensor:
            values: Tensor = self.parts.models[-1].head_logits(hidden, vocab_size=self.spec.vocab_size)
            return values if self.ranks.topology.cp == 1 else whole_row(values, microbatch.cu_seqlens, self.cp_group)

        return self._run_inference(microbatches, whole_logits)

    def update(
        self,
        microbatches: Sequence[Microbatch],
        loss: TokenLoss,
        rate: float,
        allows: AllowsUpdate = require_finite,
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        """Run one optimizer step; also return the log-probabilities before the step, as `log_probs` does.

        `allows` gets the statistics before the step. If it returns False, the step is not made, and the weights and the
        routers' correction biases stay as they are.

        Raises:
            RuntimeError: by default, if loss or gradient is not finite (names rank and microbatch); the weights are
                unchanged.
        """
        biases = [(bias, bias.clone()) for bias in correction_biases(self.parts.models)]
        stats, outputs = self._with_balance(microbatches, loss)
        stats = self._step_if_allowed(stats, rate, allows)
        if not stats.is_made:
            for bias, before in biases:  # the backward pass has moved them
                bias.copy_(before)
        return stats, outputs

    def backward(self, microbatches: Sequence[Microbatch], loss: TokenLoss) -> tuple[UpdateStats, list[Tensor] | None]:
        """Compute the gradient and statistics of an update without the optimizer step. The learning rate in them is 0.

        Raises:
            RuntimeError: as `update`.
        """
        stats, outputs = self._with_balance(microbatches, loss)
        require_finite(stats)
        return stats, outputs

    def _with_balance(
        self, microbatches: Sequence[Microbatch], loss: TokenLoss
    ) -> tuple[UpdateStats, list[Tensor] | None]:
        """Compute the gradient, with the balance loss of the routers if there is one."""

        def token_losses(hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
            values, entropy = self._head(hidden, microbatch)
            token_loss, metrics = loss(values, entropy, microbatch)
            return token_loss, metrics, values.detach()

        if self._balance is None:
            return self._gradient(microbatches, token_losses)
        self._balance.begin(microbatches, self.dp_group, self.ranks.device)
        stats, outputs = self._gradient(microbatches, token_losses)
        return replace(stats, sums=stats.sums | {"aux_loss": self._balance.mean(self.ranks.device)}), outputs

    def update_reference(self) -> None:
        """Make the current weights the reference. Collective."""
        assert self._reference is not None, "no reference was built: the loss does not need one"
        self._require("update_reference", "training or checkpointing", "params")
        self._settle()
        self._reference.update()

    def save(self, folder: Path, extra: dict[str, Any], files: FileSink | None = None) -> StateRecords:
        """Save weights, optimizer state and `extra` into an existing, empty folder, or pass them to `files`.

        Collective. The reference is saved as well if `algorithm.ref_update_every` is set. Return the records of the
        live state.
        """
        records = super().save(folder, extra, files)
        if self._reference_is_updated:
            with self.reference(), writing_to(files):
                saved = save_weights(
                    self.parts, folder / _REFERENCE, self.spec.vocab_size, is_first=self.ranks.is_first
                )
            records = {**records, _REFERENCE: saved}
        return records

    def load(self, folder: Path) -> dict[str, Any]:
        """Load what `save` wrote, in any layout, and return `extra`. Collective. A frozen reference is unchanged."""
        if self._reference_is_updated:
            self._require("load", "checkpointing", "params")
            self._settle()
            self._memory.changed()
            load_weights(self.parts, folder / _REFERENCE)
            self.update_reference()
        return super().load(folder)

    def live_records(self, *, with_optimizer: bool) -> StateRecords:
        """Return the records of the weights, of master weights and moments if asked for, and of the reference.

        Collective. The reference is included if it is part of a checkpoint.
        """
        records = super().live_records(with_optimizer=with_optimizer)
        if self._reference_is_updated:
            with self.reference():
                records = {**records, _REFERENCE: super().live_records(with_optimizer=False)["."]}
        return records

    def _row_params(self, microbatch: Microbatch) -> RowParams:
        row = super()._row_params(microbatch)
        if self._balance is not None:
            row.segments = self._routed_part(segments_of(microbatch.cu_seqlens), microbatch)
        return row

    def _head(self, hidden: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies [T] of the whole row on every rank of the last pipeline stage."""
        found = self.parts.models[-1].head_log_probs(
            hidden, self._context_parallel_part(microbatch.labels, microbatch), temperature=self.temperature,
            vocab_size=self.spec.vocab_size,
        )  # fmt: skip
        if self.ranks.topology.cp == 1:
            return found
        log_probs, entropy = whole_row(torch.stack(found, 1), microbatch.cu_seqlens, self.cp_group).unbind(1)
        return log_probs, entropy


_REFERENCE = "reference"  # folder in a checkpoint
