"""tools/step_sides/simulated_servers.py: the factor of the engine's costs, and steps that one side limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tools.step_sides.compared_runs import CountedSteps
from tools.step_sides.simulated_servers import MEAN_PROMPT, engine_cost, sampling_seconds, simulate_steps

ARGUMENTS = (
    "configs/quickstart.yaml",
    "data.prompts_per_step=4",
    "sampling.group_size=2",
    "sampling.max_tokens=400",
    "train.minibatches_per_epoch=1",
)
FACTOR, SYNC = 1.7, 0.1


def steps_of(train_seconds: float) -> CountedSteps:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(20, 300, (4, 2)) for _ in range(5)]
    lines: list[dict[str, Any]] = []
    for groups in lengths:
        sampling = sampling_seconds(groups, engine_cost(FACTOR, 256))
        whole = sampling + SYNC + train_seconds
        lines.append({"time/rollout_seconds": sampling, "time/sync_seconds": SYNC, "time/step_seconds": whole})
    return CountedSteps(lines, lengths)


def test_the_factor_makes_the_sampling_of_synchronous_steps_as_long_as_measured() -> None:
    found = simulate_steps(steps_of(1.0), 2, ARGUMENTS)
    assert found["engine_factor"] == pytest.approx(FACTOR)


def test_a_slow_policy_decides_and_tokens_are_two_updates_old_then() -> None:
    steps = steps_of(100.0)
    found = simulate_steps(steps, 2, ARGUMENTS)
    tokens = np.mean([groups.sum() for groups in steps.lengths])
    wanted = SYNC + 100.0 * (found["tokens_per_update"] + 8 * MEAN_PROMPT) / (tokens + 8 * MEAN_PROMPT)
    assert found["step_seconds"] == pytest.approx(wanted, rel=1e-3)
    assert found["policy_seconds"] == pytest.approx(wanted, rel=1e-3)
    assert 1 < found["staleness_mean"] <= 2


def test_a_fast_policy_waits_for_the_server() -> None:
    steps = steps_of(0.01)
    found = simulate_steps(steps, 2, ARGUMENTS)
    assert found["step_seconds"] > 2 * found["policy_seconds"]
    # the server runs rollouts of up to three steps at a time
    sampling = np.mean([line["time/rollout_seconds"] for line in steps.lines])
    assert 1 / 3 < found["step_seconds"] / sampling < 1
