"""The critic's loss per token. Pure.

Invariant: a position with `loss_mask` False has loss 0, gradient 0 and metrics 0 for all inputs.
Asserted by tests/unit/algorithm/test_value_loss.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mega.types import Microbatch


@dataclass(frozen=True)
class ValueLoss:
    """L = max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2 per token; without a clip (V - R)^2 / 2.

    R is the return, V_old the value before the update. Means over tokens are in `token_weights`. `clip` is the largest
    difference of V and V_old, in units of the reward; None: no clip.

    Source: PPO, arXiv:1707.06347, equation 9 (the squared error); the clip: Engstrom et al., "Implementation Matters in
        Deep Policy Gradients", arXiv:2005.12729. Differs: the larger of the two errors, as in the code that the paper
        studies (the paper prints the smaller one); a factor 1/2.
    """

    clip: float | None

    def __call__(self, values: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss per token and its metrics.

        Args:
            values: [T] float32, values of the critic, with gradient.
            microbatch: `returns` and `old_values`, both [T].

        Returns:
            Loss [T], and a detached tensor [T]: `clip_fraction` (1 where the clip removes the gradient).

        Raises:
            ValueError: `returns` or `old_values` is None.
        """
        if microbatch.returns is None or microbatch.old_values is None:
            raise ValueError("the critic's loss requires returns and old_values in the microbatch; got None")
        mask = microbatch.loss_mask
        values, returns, old = (torch.where(mask, v, 0.0) for v in (values, microbatch.returns, microbatch.old_values))
        squared = (values - returns) ** 2
        clipped = torch.zeros_like(mask)
        if self.clip is not None:
            bounded = torch.maximum(torch.minimum(values, old + self.clip), old - self.clip)
            other = (bounded - returns) ** 2
            clipped = (other > squared).detach()
            squared = torch.where(clipped, other, squared)
        return squared / 2, {"clip_fraction": clipped.to(values.dtype)}
