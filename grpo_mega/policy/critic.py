"""The critic on this rank: values of rows, updates and state.

It has the layout of the policy and its own optimizer. Its weights start as those of the policy with a zero head
(modules/value_head.py). Asserted by
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
from grpo_mega.policy.learner import MegatronLearner, require_finite
from grpo_mega.policy.modules.value_head import HEAD, ValueModel
from grpo_mega.policy.weight_source import MegatronWeights, weight_copy_group
from grpo_mega.types import AllowsUpdate, Microbatch, UpdateStats


class MegatronCritic(MegatronLearner):
    """Megatron critic. Construction is collective and comes after the policy, whose process groups it uses."""

    def __init__(self, config: Config, spec: ModelSpec, folder: Path, ranks: Ranks) -> None:
        super().__init__(config, spec, ranks, config.optimizer, ValueModel)
        weights = MegatronWeights(self.parts.models, spec, ranks, weight_copy_group(ranks), self._readable_weights)
        self.weights = weights.without(HEAD)
        self.weights.load_start(config, folder)
        self.parts.optimizer.reload_model_params()  # the optimizer's master weights were copied before the load

    def values(self, microbatches: Sequence[Microbatch]) -> list[Tensor] | None:
        """Return values [T] per microbatch without gradient on every rank of the last stage, None on other ranks."""
        return self._run_inference(microbatches, self._whole_row_values)

    def update(
        self,
        microbatches: Sequence[Microbatch],
        loss: TokenValueLoss,
        rate: float,
        allows: AllowsUpdate = require_finite,
    ) -> UpdateStats:
        """Run one optimizer step, unless `allows` returns False for the statistics before it.

        Raises:
            RuntimeError: by default, if loss or gradient is not finite (names rank and microbatch); the weights are
                unchanged.
        """
        return self._step_if_allowed(self._value_gradient(microbatches, loss), rate, allows)

    def backward(self, microbatches: Sequence[Microbatch], loss: TokenValueLoss) -> UpdateStats:
        """Compute the gradient and statistics of an update without the optimizer step. The learning rate in them is 0.

        Raises:
            RuntimeError: as `update`.
        """
        stats = self._value_gradient(microbatches, loss)
        require_finite(stats)
        return stats

    def _value_gradient(self, microbatches: Sequence[Microbatch], loss: TokenValueLoss) -> UpdateStats:
        def token_losses(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
            values = self._whole_row_values(output, microbatch)
            token_loss, metrics = loss(values, microbatch)
            return token_loss, metrics, values.detach()

        return self._gradient(microbatches, token_losses, "critic's ")[0]

    def _whole_row_values(self, output: Tensor, microbatch: Microbatch) -> Tensor:
        """Gather the values of a row [T] from those of the tokens of each context-parallel rank."""
        return output if self.ranks.topology.cp == 1 else whole_row(output, microbatch.cu_seqlens, self.cp_group)
