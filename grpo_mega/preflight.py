"""Rules that need the model's own config, checked before a process group, a teaching or a read of weights."""

from __future__ import annotations

import json
from pathlib import Path

from grpo_mega.config.schema import ArchitectureConfig, Config, ParallelConfig
from grpo_mega.convert.fp8_layout import EngineGrid, check_fp8_layout, check_policy_blocks
from grpo_mega.convert.spec import ModelSpec, read_spec
from grpo_mega.engines.server.wire import Address, read_token, require_token
from grpo_mega.parallel.stages import stage_layers
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError

# Families that SGLang was compared with transformers in (docs/measurements/weight_sync.md); vLLM was in all.
SGLANG_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "glm4_moe")

_DRIVER = Path("/proc/driver/nvidia/gpus")  # there where CUDA is

# vLLM reads these from config.json and defaults to another router (models/deepseek_v2.py); transformers has one.
_ROUTER_FIELDS = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}


def check_model(config: Config, topology: Topology, *, with_engine: bool = True) -> None:
    """Does the layout divide the model, does a rollout fit its positions, and can the engine be given its weights?

    Args:
        config: the run's.
        topology: its ranks.
        with_engine: False where no engine takes part: its rules are left out.

    Raises:
        UserError: names the key, the model's number and what would do.
    """
    where = "model.base.architecture" if config.model.base else str(config.model.path)
    _check_host_optimizer(config)
    _check_fp8(config)
    if with_engine:
        _check_fp8_engine(config)
    spec = _spec(config)
    if with_engine:
        _check_sync(spec, config)
        _check_servers(config)
    if config.algorithm.routing_replay and spec.moe is None:
        raise UserError(f"algorithm.routing_replay=true does nothing: {where} has no experts; leave it out")
    check_layout(spec, config.parallel, topology, where)
    _check_fp8_layers(spec, config, where)
    if with_engine:
        check_engine_fp8(spec, config, where, latent_split=not _DRIVER.is_dir())
    longest = config.data.max_prompt_tokens + max(config.sampling.max_tokens, config.evaluation.max_tokens or 0)
    if longest > spec.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + the largest max_tokens = {longest} is more than the {spec.max_positions} "
            f"positions of {where}; lower one of them"
        )
    rope = spec.rope
    if with_engine and rope is not None and rope.kind == "yarn" and longest > rope.original_max_positions * rope.factor:
        # engines compute that many positions at their start, and read behind the last one without a word
        raise UserError(
            f"data.max_prompt_tokens + the largest max_tokens = {longest} is more than "
            f"original_max_position_embeddings x factor = {rope.original_max_positions} x {rope.factor:g} of {where}, "
            "and engines know no positions behind them; lower one of the keys"
        )


def _check_host_optimizer(config: Config) -> None:
    """Raises UserError: there is no device that the host could relieve."""
    if config.optimizer.host_fraction > 0 and not _DRIVER.is_dir():
        raise UserError(
            f"optimizer.host_fraction={config.optimizer.host_fraction} needs CUDA devices, and this machine has none; "
            "leave it out"
        )


def check_layout(spec: ModelSpec, parallel: ParallelConfig, topology: Topology, where: str) -> None:
    """Does the layout divide the model? `where` names the model in messages.

    Raises:
        UserError: names the key, the model's number and what would do.
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
            f"engine.dp={topology.engine_dp}: {where} has no experts for the copies to share; leave it out, and every "
            "engine.tp ranks are a replica of their own"
        )
    _check_experts(spec, parallel, topology, where)
    parts = (("mla_up_proj", "latent attention", spec.mla), ("moe", "experts", spec.moe))
    for module, needed, part in parts:
        if module in (parallel.recompute_modules or ()) and part is None:
            raise UserError(f"parallel.recompute_modules: {module} does nothing: {where} has no {needed}; leave it out")
    stage_layers(spec.num_layers, parallel, where)


def _check_fp8(config: Config) -> None:
    """Raises UserError: there is no device that has FP8."""
    if config.precision.fp8 is not None and not _DRIVER.is_dir():
        raise UserError(
            f"precision.fp8.recipe={config.precision.fp8.recipe} needs CUDA devices, and this machine has none; leave "
            "precision.fp8 out"
        )


def _check_fp8_engine(config: Config) -> None:
    """Raises UserError: there is no device on which vLLM computes with FP8 blocks. Servers look at their own."""
    if config.engine.placement == "server":
        return
    if config.engine.fp8 is not None and not _DRIVER.is_dir():
        raise UserError(
            f"engine.fp8={config.engine.fp8} needs CUDA devices, and this machine has none; leave engine.fp8 out"
        )


def check_engine_fp8(spec: ModelSpec, config: Config, where: str, *, latent_split: bool = False) -> None:
    """Do policy and engine leave FP8 blocks whole, where the engine has them or they are reported of? See
    `check_fp8_layout`."""
    if config.engine.fp8 == "own_loader" and spec.moe is not None and spec.moe.gate is not None:
        raise UserError(f"engine.fp8=own_loader: the experts of {where} are stacks with biases; leave engine.fp8 out")
    if config.engine.fp8_weights == "codes":
        check_fp8_layout(
            spec,
            config.parallel,
            EngineGrid(config.engine.tp, config.engine.dp, experts_spread=config.engine.ep > 1),
            latent_split=latent_split,
            where=where,
        )
    elif config.weight_sync.fp8_report:
        check_policy_blocks(spec, config.parallel.tp, config.parallel.etp, latent_split=latent_split)


def _check_fp8_layers(spec: ModelSpec, config: Config, where: str) -> None:
    """Megatron counts the layers that stay in bf16 within the first and the last stage."""
    fp8, stage = config.precision.fp8, spec.num_layers // config.parallel.pp
    if fp8 is None:
        return
    for key, number in (("first_layers_bf16", fp8.first_layers_bf16), ("last_layers_bf16", fp8.last_layers_bf16)):
        if number > stage:
            raise UserError(
                f"precision.fp8.{key}={number} is more than the {stage} layers of a pipeline stage of {where}; use at "
                f"most {stage}"
            )


def _check_experts(spec: ModelSpec, parallel: ParallelConfig, topology: Topology, where: str) -> None:
    moe = spec.moe
    if moe is None:
        for key, ranks in (("parallel.ep", topology.ep), ("parallel.etp", topology.etp)):
            if ranks > 1:
                raise UserError(f"{key}={ranks} does nothing: {where} has no experts; leave it out")
        return
    _require_divisor("parallel.ep", topology.ep, moe.num_experts, "experts", where)
    _require_divisor("parallel.etp", topology.etp, moe.expert_ffn_size, "feed-forward size of each expert", where)
    if moe.gate is not None and topology.etp > 1:
        raise UserError(
            f"parallel.etp={topology.etp}: the experts of {where} have biases, and such experts are not cut; "
            "set parallel.etp=1 and use parallel.ep"
        )
    _require_divisor(
        "parallel.tp", topology.tp, moe.shared_ffn_size or topology.tp, "feed-forward size of the shared expert", where
    )
    if topology.tp > 1 and any(moe.layers) and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tp={topology.tp} with the experts of {where} needs sequence parallelism; "
            "set parallel.sequence_parallel=true"
        )


def _check_sync(spec: ModelSpec, config: Config) -> None:
    if config.engine.kind == "sglang":
        _check_sglang_here(config)
    if config.model.base is not None:
        return
    folder = Path(str(config.model.path))
    if config.engine.kind == "sglang":
        _check_sglang(spec, folder)
    if spec.moe is not None and config.engine.ep > spec.moe.num_experts:
        raise UserError(
            f"engine.ep={config.engine.ep}: {folder} has {spec.moe.num_experts} experts, and every rank needs one; use "
            "fewer ranks, or engine.ep=1"
        )
    if config.engine.ep > 1 and spec.moe is None:
        raise UserError(f"engine.ep={config.engine.ep}: {folder} has no experts to spread; leave it out")
    raw = json.loads((folder / "config.json").read_text())
    missing = [f"{key}={value}" for key, value in _ROUTER_FIELDS.get(spec.family, {}).items() if raw.get(key) != value]
    if missing:
        raise UserError(
            f"model.path={folder}: its config.json does not say {', '.join(missing)}, and vLLM would route otherwise "
            f"than {spec.family} does; add it"
        )
    if spec.family == "gpt_oss":
        _check_gpt_oss(spec, folder)
    if raw.get("quantization_config") is not None and config.engine.fp8_weights != "codes":
        raise UserError(
            f"model.path={folder} has a quantization_config, and the engine would quantise what the sync brings; "
            "give an unquantised checkpoint, or set engine.fp8=scales_fp32"
        )


def _check_servers(config: Config) -> None:
    """Raises UserError: an address is none, or a server of another machine is to be trusted without a secret."""
    urls = config.engine.urls if config.engine.placement == "server" else ()
    for i, url in enumerate(urls):
        require_token(Address.parse(url, f"engine.urls[{i}]").host, read_token(), f"engine.urls[{i}]={url}")


def _check_sglang_here(config: Config) -> None:
    """Raises UserError: SGLang computes otherwise on this machine."""
    if config.engine.ep > 1 and not _DRIVER.is_dir():
        raise UserError(
            f"engine.ep={config.engine.ep} with engine.kind=sglang: SGLang does not spread experts without CUDA; use "
            "engine.ep=1"
        )
    if config.precision.dtype == "fp32" and _DRIVER.is_dir():
        raise UserError(
            "precision.dtype=fp32 with engine.kind=sglang: SGLang's attention on CUDA computes in 16 bits; use "
            "precision.dtype=bf16, or engine.kind=vllm"
        )


def _check_sglang(spec: ModelSpec, folder: Path) -> None:
    """What SGLang 0.5.23 was compared in, and what of config.json its models do not read (models/*.py)."""
    if spec.family not in SGLANG_FAMILIES:
        raise UserError(
            f"engine.kind=sglang: a sync of the family {spec.family} ({folder}) to this engine is not proven; use "
            f"engine.kind=vllm, or a model of {', '.join(SGLANG_FAMILIES)}"
        )
    if spec.family == "qwen3_moe" and spec.moe is not None and not all(spec.moe.layers):
        raise UserError(
            f"engine.kind=sglang: SGLang gives every layer of {folder} experts, whatever mlp_only_layers and "
            "decoder_sparse_step of its config.json say; use engine.kind=vllm"
        )
    if spec.family == "mixtral" and spec.head_dim * spec.num_heads != spec.hidden_size:
        raise UserError(
            f"engine.kind=sglang: {folder} has {spec.num_heads} heads of head_dim={spec.head_dim}, and SGLang builds "
            f"Mixtral with heads of {spec.hidden_size // spec.num_heads}; use engine.kind=vllm"
        )


def _check_gpt_oss(spec: ModelSpec, folder: Path) -> None:
    """What vLLM has written into its model, whatever config.json says (models/gpt_oss.py, cpu_fused_moe.cpp)."""
    assert spec.moe is not None, "read_gpt_oss gives experts"
    assert spec.moe.gate is not None, "read_gpt_oss gives their gate"
    written = {
        "rms_norm_eps": (spec.norm_eps, 1e-5),
        "swiglu_alpha": (spec.moe.gate.alpha, 1.702),
        "swiglu_limit": (spec.moe.gate.limit, 7.0),
        "layers with a window": ([i for i, w in enumerate(spec.windowed) if w], list(range(0, spec.num_layers, 2))),
    }
    for what, (got, fixed) in written.items():
        if got != fixed:
            raise UserError(
                f"model.path={folder}: its config.json says {what}={got}, and vLLM computes gpt_oss with {fixed} "
                "whatever it says; use a model that has this"
            )


def _require_divisor(key: str, ranks: int, number: int, name: str, where: str) -> None:
    if number % ranks:
        raise UserError(f"{key}={ranks} does not divide the {number} {name} of {where}; {_divisors(number)}")


def _spec(config: Config) -> ModelSpec:
    """Of the checkpoint, or of the recipe."""
    if config.model.base is not None:
        return recipe_spec(config.model.base.architecture)
    folder = Path(str(config.model.path))
    if not folder.is_dir():
        raise UserError(f"model.path={folder} is not a folder; give a Hugging Face model folder")
    return read_spec(folder)


def recipe_spec(recipe: ArchitectureConfig, vocab_size: int = 1) -> ModelSpec:
    """Of a base model that is yet to be made; the vocabulary is its tokenizer's, which rules do not look at."""
    return ModelSpec(
        family="qwen3",
        num_layers=recipe.num_layers,
        hidden_size=recipe.hidden_size,
        ffn_size=recipe.ffn_size,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        vocab_size=vocab_size,
        max_positions=recipe.max_positions,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tie_embeddings=recipe.tie_embeddings,
        qkv_bias=False,
        qk_norm=True,
    )


def _divisors(number: int) -> str:
    return f"use one of {', '.join(str(d) for d in range(1, min(number, 64) + 1) if number % d == 0)}"
