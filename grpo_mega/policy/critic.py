"""The critic on this rank: values of rows, its updates, its state. The policy's layout, an optimizer of its own.

Its weights start as those of the policy's base with a head of zeros (value_model.py). Asserted by
tests/parallel/test_critic.py: values and the gradient of every tensor equal autograd in float64 in every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from grpo_mega.config.schema import Config
from grpo_mega.interfaces import TokenValueLoss
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.context_parallel import whole_row
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.policy.learner import MegatronLearner
from grpo_mega.policy.modules.value_head import HEAD, ValueModel
from grpo_mega.policy.weight_source import MegatronWeights, weight_copy_group
from grpo_mega.types import Microbatch, UpdateStats


class MegatronCritic(MegatronLearner):
    """Built collectively, after the policy: it uses the policy's process groups."""

    def __init__(self, config: Config, spec: ModelSpec, folder: Path, ranks: Ranks) -> None:
        super().__init__(config, spec, ranks, config.optimizer, ValueModel)
        weights = MegatronWeights(self.parts.models, spec, ranks, weight_copy_group(ranks), self._settle)
        self.weights = weights.without(HEAD)
        self.weights.load_from_hf(folder)
        self.parts.optimizer.reload_model_params()  # the optimizer's master weights were copied before the load

    def values(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """[T] per microbatch, without gradient, on every rank of the last stage; None elsewhere."""
        return self._inferred(microbatches, self._whole)

    def update(self, microbatches: Sequence[Microbatch], loss: TokenValueLoss, learning_rate: float) -> UpdateStats:
        """One optimizer step.

        Raises:
            RuntimeError: loss or gradient is not finite (names rank and microbatch); the weights are unchanged.
        """
        return self._step(self.backward(microbatches, loss), learning_rate)

    def backward(self, microbatches: Sequence[Microbatch], loss: TokenValueLoss) -> UpdateStats:
        """The gradient of an update and what the update reports, without its step (and with learning rate 0).

        Raises:
            RuntimeError: as `update`.
        """

        def token_losses(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
            values = self._whole(output, microbatch)
            token_loss, metrics = loss(values, microbatch)
            return token_loss, metrics, values.detach()

        return self._gradient(microbatches, token_losses, "critic's ")[0]

    def _whole(self, output: Tensor, microbatch: Microbatch) -> Tensor:
        """The values of this rank's tokens -> of the whole row [T]."""
        return output if self.ranks.topology.cp == 1 else whole_row(output, microbatch.cu_seqlens, self.cp_group)
