"""Rules between layout and model: the sizes that the parallel degrees must divide."""

from __future__ import annotations

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.pipeline_split import stage_layers
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError


def check_layout(spec: ModelSpec, parallel: ParallelConfig, topology: Topology, where: str) -> None:
    """Check that the layout divides the model. Error messages call the model `where`.

    Raises:
        UserError: it does not; the message names the key and the model's number, the remedy the possible values.
    """
    numbers = {"attention heads": spec.num_heads}
    if spec.moe is None or not all(spec.moe.layers):
        numbers["feed-forward size"] = spec.ffn_size
    for key, ranks in (("parallel.tp", topology.tp), ("engine.tp", topology.engine_tp)):
        for name, number in numbers.items():
            _require_divisor(key, ranks, number, name, where)
    _require_divisor("parallel.tp", topology.tp, spec.num_kv_heads, "key-value heads", where)
    if spec.mla is not None:
        _require_divisor("parallel.tp", topology.tp, spec.mla.q_rank or topology.tp, "q_lora_rank", where)
        latent = spec.mla.kv_rank + spec.mla.rope_dim
        _require_divisor("parallel.tp", topology.tp, latent, "kv_lora_rank + qk_rope_head_dim", where)
    if topology.engine_dp > 1 and spec.moe is None:
        raise UserError(
            f"engine.dp={topology.engine_dp} is not supported without experts to share, and {where} has none",
            remedy="leave it out: then every engine.tp ranks are one replica",
        )
    _check_experts(spec, parallel, topology, where)
    parts = (("mla_up_proj", "latent attention", spec.mla), ("moe", "experts", spec.moe))
    for module, needed, part in parts:
        if module in (parallel.recompute_modules or ()) and part is None:
            raise UserError(
                f"parallel.recompute_modules: {module} has no effect: {where} has no {needed}", remedy="leave it out"
            )
    stage_layers(spec.num_layers, parallel, where)


def _check_experts(spec: ModelSpec, parallel: ParallelConfig, topology: Topology, where: str) -> None:
    moe = spec.moe
    if moe is None:
        for key, ranks in (("parallel.ep", topology.ep), ("parallel.etp", topology.etp)):
            if ranks > 1:
                raise UserError(f"{key}={ranks} has no effect: {where} has no experts", remedy="leave it out")
        return
    _require_divisor("parallel.ep", topology.ep, moe.num_experts, "experts", where)
    _require_divisor("parallel.etp", topology.etp, moe.expert_ffn_size, "feed-forward size of each expert", where)
    if moe.gate is not None and topology.etp > 1:
        raise UserError(
            f"parallel.etp={topology.etp} is not supported with the experts of {where}, which have biases",
            remedy="set parallel.etp=1 and use parallel.ep",
        )
    _require_divisor(
        "parallel.tp", topology.tp, moe.shared_ffn_size or topology.tp, "feed-forward size of the shared expert", where
    )
    if topology.tp > 1 and any(moe.layers) and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tp={topology.tp} with the experts of {where} needs sequence parallelism",
            remedy="set parallel.sequence_parallel=true",
        )


def _require_divisor(key: str, ranks: int, number: int, name: str, where: str) -> None:
    if number % ranks:
        raise UserError(f"{key}={ranks} does not divide the {number} {name} of {where}", remedy=_divisors(number))


def _divisors(number: int) -> str:
    return f"use one of {', '.join(str(d) for d in range(1, min(number, 64) + 1) if number % d == 0)}"
