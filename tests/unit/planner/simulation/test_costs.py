"""Costs of simulated steps: the closed form of decode steps, and agreement with the planner where it can be exact."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_mega.models.flops import forward_flops
from grpo_mega.planner.engine_memory import EngineMemory
from grpo_mega.planner.plan import plan_time
from grpo_mega.planner.rollout_time import rollout_seconds
from grpo_mega.planner.simulation.costs import EngineCost, PolicyCost
from grpo_mega.planner.simulation.lengths import AnswerLengths
from grpo_mega.planner.simulation.synchronous import simulate_synchronous
from grpo_mega.planner.simulation.workload import SimulatedJob
from grpo_mega.planner.step_time import token_cost
from tests.helpers.planner_cases import config_of, inputs_of, memory_of, spec_of
from tests.helpers.token_simulation import cost_of, step_seconds

SAMPLING = {"max_tokens": 1000, "group_size": 16}
CONFIG = config_of(
    sampling=SAMPLING,
    data={"train": "unused", "max_prompt_tokens": 200, "prompts_per_step": 32},
    train={"steps": 1, "max_tokens_per_microbatch": 4096},
)


@pytest.mark.parametrize("cached", [0, 100, 130, 1000])
def test_decode_steps_are_bound_by_computing_first_and_then_by_reading(cached: int) -> None:
    cost = cost_of(9)
    for steps in (0, 1, 2, 40):
        by_hand = sum(step_seconds(cost, 9, cached + 9 * i) for i in range(steps))
        assert cost.decode(9, cached, steps) == pytest.approx(by_hand)
        assert cost.steps_until(9, cached, by_hand - 1e-9, 1000) == steps
    assert cost.steps_until(9, cached, 1e9, 7) == 7


@pytest.mark.parametrize(("prompts", "within"), [(16, 0.02), (64, 0.1)])
def test_uniform_lengths_take_the_seconds_that_the_planner_predicts(prompts: int, within: float) -> None:
    """The planner's formula (planner/rollout_time.py) is for uniform lengths from 0 to `max_tokens`.

    It is an estimate if rollouts wait for a place (1024 of them, 256 at once).
    """
    sections = {"sampling": SAMPLING, "data": {"max_prompt_tokens": 200, "prompts_per_step": prompts}}
    inputs = inputs_of(config_of(**sections, train={"max_tokens_per_microbatch": 4096}))
    engine = EngineMemory(20e9, 300 * 600 * 1e5, 1e5, 0.0)  # 300 rollouts of 600 tokens fit
    lengths = AnswerLengths("uniform", 1000, (np.arange(1, 1001),))
    cost = token_cost(inputs.spec, 600.0)
    job = SimulatedJob(lengths, 100, prompts, 16, 1, 1, EngineCost.planned(inputs, engine, 600.0), PolicyCost(0.0, 0.0))
    assert job.engine.max_running == 256  # engine.max_num_seqs
    found = np.mean([step.seconds for step in simulate_synchronous(job, 20, seed=0)])
    assert found == pytest.approx(rollout_seconds(inputs, engine, cost.forward, cost.active), rel=within)


def test_the_policy_takes_the_planned_seconds_for_the_planned_lengths() -> None:
    inputs = inputs_of(CONFIG)
    time = plan_time(inputs, memory_of(CONFIG, spec_of(), 1))
    cost, work = PolicyCost.planned(inputs, time), inputs.workload
    planned = time.seconds - time.phases["rollout"]
    assert cost.seconds(work.rollouts * work.mean, work.rollouts * work.mean**2) == pytest.approx(planned)
    assert cost.sync == time.phases["sync"]
    # twice as long rollouts: training grows with the operations, the rest does not
    operations = [forward_flops(inputs.spec, [n * work.mean]) for n in (1, 2)]
    scaled = time.phases["train"] + time.phases["log_probs"]
    longer = cost.seconds(2 * work.rollouts * work.mean, 4 * work.rollouts * work.mean**2)
    assert longer == pytest.approx(planned - scaled + scaled * operations[1] / operations[0], rel=1e-3)
