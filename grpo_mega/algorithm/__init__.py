"""The objective: advantages, loss per token, KL penalty and aggregation. Pure functions of tensors.

Imports only torch, `types` and `interfaces`: no config and no process group. `surrogates/` and `advantages/` hold one
function for each value of `algorithm.surrogate` and `algorithm.advantage`. The decorators below declare another one
(docs/algorithms.md, "Your own surrogate or advantage estimator").
"""

from grpo_mega.algorithm.base import Estimates, StepRewards, advantage, surrogate
from grpo_mega.algorithm.rollout_sums import Segments

__all__ = ["Estimates", "Segments", "StepRewards", "advantage", "surrogate"]
