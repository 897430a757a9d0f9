"""One number per rollout that holds for each of its loss tokens, without memory per token.

It takes the place of `TokenValues` where all loss tokens of a rollout have the same number, as their advantages mostly
have. Asserted by tests/unit/data/test_rollout_values.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_mega.data.rollout_tokens import means_per_rollout, ragged_index
from grpo_mega.types import TokenValues


@dataclass(frozen=True)
class RolloutValues:
    """One number per rollout, for each of its loss tokens.

    The loss tokens of rollout `ids[i]` (a row of the step's table) are `offsets[i]` to `offsets[i + 1] - 1` among all
    loss tokens of these rollouts, and each of them has the number `per_rollout[i]`. The ids [N] ascend.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    per_rollout: NDArray[Any]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Loss tokens of each rollout, [N]."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def values(self) -> NDArray[Any]:
        """The number of each loss token; a new array."""
        return np.repeat(self.per_rollout, self.counts)


LossTokenValues = TokenValues | RolloutValues
"""One number per loss token of several rollouts."""


def values_of(values: LossTokenValues, ids: NDArray[np.int64]) -> NDArray[Any]:
    """Return the numbers of the loss tokens of the rollouts `ids`, in their order; `values` may have others too."""
    places = np.searchsorted(values.ids, ids)
    assert np.array_equal(values.ids[places], ids), "every rollout has values"
    if isinstance(values, RolloutValues):
        return np.repeat(values.per_rollout[places], values.counts[places])
    chosen = ragged_index(values.offsets[:-1][places], values.counts[places])
    return np.asarray(values.values[chosen])


def mean_values(values: LossTokenValues) -> NDArray[np.float64]:
    """Return the mean over the loss tokens of each rollout, [N] float64; 0 for a rollout without loss tokens."""
    if isinstance(values, RolloutValues):
        return np.where(values.counts > 0, values.per_rollout.astype(np.float64), 0.0)
    return means_per_rollout(values)
