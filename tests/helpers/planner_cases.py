"""Small models and configs with known sizes for the tests of the planner."""

from __future__ import annotations

from typing import Any

from grpo_mega.config.schema import Config
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.module_sizes import ModuleSizes, ParameterSize
from grpo_mega.models.spec import ModelSpec
from grpo_mega.planner.hardware import cluster_of, gpu_named
from grpo_mega.planner.inputs import PlanInputs
from grpo_mega.planner.phase_memory import MemoryPlan, plan_memory
from tests.helpers.family_configs import raw_family_config


def config_of(**sections: dict[str, Any]) -> Config:
    raw: dict[str, Any] = {
        "model": {"path": "unused"},
        "data": {"train": "unused", "prompts_per_step": 8, "max_prompt_tokens": 64},
        "sampling": {"group_size": 4, "max_tokens": 64},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1, "max_tokens_per_microbatch": 256},
    }
    for name, keys in sections.items():
        raw[name] = raw.get(name, {}) | keys
    return Config.model_validate(raw)


def spec_of(family: str = "llama", **changes: Any) -> ModelSpec:
    return spec_from_config(raw_family_config(family, **changes), "config.json")


def parameter_size(name: str, *shape: int, is_expert: bool = False) -> ParameterSize:
    return ParameterSize(name, shape, is_expert)


SIZES = ModuleSizes(
    embedding=(parameter_size("embedding", 10, 10),),
    dense_layer=(parameter_size("norm", 10), parameter_size("matrix", 10, 20)),
    moe_layer=(parameter_size("router", 10), parameter_size("expert", 10, 30, is_expert=True)),
    final_norm=(parameter_size("final", 10),),
    head=(parameter_size("head", 10, 10),),
)


def inputs_of(
    config: Config | None = None, spec: ModelSpec | None = None, world: int = 1, gpu: str = "h100-80g"
) -> PlanInputs:
    return PlanInputs.from_config(config or config_of(), spec or spec_of(), cluster_of(gpu_named(gpu), world))


def memory_of(config: Config, spec: ModelSpec, world: int, gpu: str = "h100-80g") -> MemoryPlan:
    return plan_memory(inputs_of(config, spec, world, gpu), SIZES, total_parameters=1000, where="config.json")
