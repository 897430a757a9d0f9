"""Plans of supervised fine-tuning: no phase that the run does not have, and no engine without an evaluation."""

from __future__ import annotations

from typing import Any

from grpo_mega.config.schema import Config
from grpo_mega.planner.hardware import cluster_of, gpu_named
from grpo_mega.planner.plan import ResourcePlan, plan_resources
from grpo_mega.planner.report import plan_text
from grpo_mega.planner.search import search
from tests.helpers.planner_cases import SIZES, config_of, spec_of

SFT: dict[str, Any] = {
    "data": {"max_example_tokens": 128},
    "sampling": {"group_size": 8, "temperature": 1.0},
    "train": {"objective": "sft"},
}


def plan_of(config: Config, world: int = 2) -> ResourcePlan:
    return plan_resources(config, spec_of(), lambda **_: SIZES, cluster_of(gpu_named("h100-80g"), world), "x")


def test_a_plan_without_an_evaluation_has_only_the_train_phase_and_no_engine() -> None:
    plan, rl = plan_of(config_of(**SFT)), plan_of(config_of())
    assert plan.memory.phases == ["train"]
    assert list(plan.time.phases) == ["train", "optimizer", "checkpoint"]
    assert "engine asleep" not in plan.memory.fullest("train").phases["train"]
    assert plan.sync_bytes == 0
    assert (plan.memory.host["offloaded optimizer"], plan.memory.host["reference"]) == (0.0, 0.0)
    assert rl.memory.host["reference"] > 0
    assert plan.inputs.workload.rollouts == 8, "one example for each of prompts_per_step"
    assert plan.inputs.workload.longest == 128
    assert plan.fits
    assert plan.disk.rollouts == 0
    assert "rollouts" not in plan_text(plan, None)
    assert plan.as_json()["phase_seconds"] == plan.time.phases


def test_an_evaluation_adds_the_memory_of_the_engine() -> None:
    plan = plan_of(config_of(**SFT | {"data": SFT["data"] | {"eval": "held_out.jsonl"}}))
    assert plan.memory.phases == ["rollout", "train", "sync"]
    assert plan.sync_bytes > 0
    assert list(plan.time.phases) == ["train", "optimizer", "checkpoint"], "evaluations are not part of a step"


def test_a_search_without_an_engine_changes_only_the_layout_of_the_policy() -> None:
    config = config_of(**SFT)
    found = search(config, spec_of(), lambda each: plan_of(each, each.run.world_size or 1), 2, 8, 3)
    assert found
    assert not any(key.startswith("engine.") for layout in found for key in layout.change)
