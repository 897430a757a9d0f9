"""The loss of supervised fine-tuning: minus the log-likelihood of the given tokens. Pure.

Asserted by tests/unit/algorithm/test_likelihood.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.types import Microbatch


@dataclass(frozen=True)
class LikelihoodLoss:
    """L = -log_probs per trained token. With weights 1 / (trained tokens of the update), the update's loss is
    the cross-entropy, the mean over all its trained tokens."""

    @property
    def needs_reference(self) -> bool:
        """False: microbatches need no `ref_log_probs`."""
        return False

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss per token and its metrics.

        Args:
            log_probs: [T] float32, nats, with gradient.
            entropy: [T] float32, nats.
            microbatch: loss mask [T]. A position with mask False has loss 0 and gradient 0 for all inputs.

        Returns:
            Loss [T], and the detached tensor `entropy` [T], 0 where nothing is trained.
        """
        mask = microbatch.loss_mask
        return torch.where(mask, -log_probs, 0.0), {"entropy": torch.where(mask, entropy.detach(), 0.0)}
