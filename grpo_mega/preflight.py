"""Rules that need the model's own config, checked before a process group, a teaching or a read of weights."""

from __future__ import annotations

import json
from pathlib import Path

from grpo_mega.config.schema import ArchitectureConfig, Config
from grpo_mega.convert.spec import ModelSpec, read_spec
from grpo_mega.parallel.stages import stage_layers
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError


def check_model(config: Config, topology: Topology) -> None:
    """Does the layout divide the model, and does a rollout fit its positions?

    Raises:
        UserError: names the key, the model's number and what would do.
    """
    where = "model.base.architecture" if config.model.base else str(config.model.path)
    shape = _Shape.of(config)
    for key, ranks in (("parallel.tp", topology.tp), ("engine.tp", topology.engine_tp)):
        for name, number in (("attention heads", shape.num_heads), ("feed-forward size", shape.ffn_size)):
            if number % ranks:
                raise UserError(f"{key}={ranks} does not divide the {number} {name} of {where}; {_divisors(number)}")
    if shape.num_kv_heads % topology.tp:
        raise UserError(
            f"parallel.tp={topology.tp} does not divide the {shape.num_kv_heads} key-value heads of {where}; "
            f"{_divisors(shape.num_kv_heads)}"
        )
    for key, ranks in (("parallel.ep", topology.ep), ("parallel.etp", topology.etp)):
        if ranks > 1:
            raise UserError(f"{key}={ranks} does nothing: {where} has no experts; leave it out")
    for module, needed in (("mla_up_proj", "latent attention"), ("moe", "experts")):
        if module in (config.parallel.recompute_modules or ()):
            raise UserError(f"parallel.recompute_modules: {module} does nothing: {where} has no {needed}; leave it out")
    stage_layers(shape.num_layers, config.parallel, where)
    longest = config.data.max_prompt_tokens + max(config.sampling.max_tokens, config.evaluation.max_tokens or 0)
    if longest > shape.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + the largest max_tokens = {longest} is more than the {shape.max_positions} "
            f"positions of {where}; lower one of them"
        )


class _Shape:
    """The few sizes that matter here, from a checkpoint or from a recipe."""

    def __init__(self, source: ModelSpec | ArchitectureConfig) -> None:
        self.num_heads, self.num_kv_heads = source.num_heads, source.num_kv_heads
        self.ffn_size, self.num_layers, self.max_positions = source.ffn_size, source.num_layers, source.max_positions

    @classmethod
    def of(cls, config: Config) -> _Shape:
        if config.model.base is not None:
            return cls(config.model.base.architecture)
        folder = Path(str(config.model.path))
        if not folder.is_dir():
            raise UserError(f"model.path={folder} is not a folder; give a Hugging Face model folder")
        spec = read_spec(folder)
        if json.loads((folder / "config.json").read_text()).get("quantization_config") is not None:
            raise UserError(
                f"model.path={folder} has a quantization_config, and the engine would quantise what the sync brings; "
                "give an unquantised checkpoint"
            )
        return cls(spec)


def _divisors(number: int) -> str:
    return f"use one of {', '.join(str(d) for d in range(1, min(number, 64) + 1) if number % d == 0)}"
