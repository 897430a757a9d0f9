"""One number per rollout in place of one per loss token."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_mega.data.rollout_values import RolloutValues, mean_values, values_of
from tests.helpers.token_values import token_values


def test_the_numbers_are_those_of_one_number_per_token() -> None:
    of_tokens = token_values([[0.1, 0.1, 0.1], [], [-3.0], [2.5, 2.5]])
    of_rollouts = RolloutValues(of_tokens.ids, of_tokens.offsets, np.array([0.1, 7.0, -3.0, 2.5]))
    assert of_rollouts.values.tolist() == of_tokens.values.tolist()
    assert mean_values(of_rollouts).tolist() == mean_values(of_tokens).tolist() == [0.1, 0.0, -3.0, 2.5]
    for ids in ([3, 0], [1], [], [2, 1, 0]):
        chosen = np.array(ids, dtype=np.int64)
        assert values_of(of_rollouts, chosen).tolist() == values_of(of_tokens, chosen).tolist()
    assert values_of(of_rollouts, np.array([3, 2])).tolist() == [2.5, 2.5, -3.0]
    with pytest.raises(AssertionError, match="every rollout has values"):
        values_of(RolloutValues(np.array([4, 9]), np.array([0, 1, 2]), np.zeros(2)), np.array([5]))
