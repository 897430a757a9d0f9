"""Rules that an engine imposes on model families, FP8, routers, server addresses and `engine.args`."""

from __future__ import annotations

import json
from pathlib import Path

from grpo_mega.config.schema import Config
from grpo_mega.engines.pass_through import check_engine_args
from grpo_mega.engines.server.protocol import configured_servers, read_token, require_token
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.devices import has_cuda_driver, num_usable_gpus
from grpo_mega.quantization.fp8_layout_rules import EngineGrid, check_fp8_layout, check_policy_blocks
from grpo_mega.types import UserError

# Families in which SGLang was compared with transformers (docs/measurements/weight_sync.md). vLLM was in all families.
SGLANG_FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "glm4_moe")


# vLLM reads these fields and defaults to another router (models/deepseek_v2.py); transformers has only this one.
_ROUTER_FIELDS = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}


def check_engine_fp8_device(config: Config) -> None:
    """Check that this machine can compute with FP8 blocks. Engine servers check their own machine.

    Raises:
        UserError: it has no CUDA devices.
    """
    if config.engine.placement == "server":
        return
    if config.engine.fp8 is not None and not has_cuda_driver():
        raise UserError(
            f"engine.fp8={config.engine.fp8} needs CUDA devices, and this machine has none",
            remedy="remove engine.fp8",
        )


def check_memory_share_device(config: Config) -> None:
    """Check that `engine.memory_share` is set for GPUs only.

    Raises:
        UserError: it is set, and this machine has no CUDA devices.
    """
    share = config.engine.memory_share
    if share != type(config.engine).model_fields["memory_share"].default and not has_cuda_driver():
        raise UserError(
            f"engine.memory_share={share:g} does nothing without CUDA devices, and this machine has none",
            remedy="set engine.kv_cache_tokens",
        )


def check_engine_fp8(spec: ModelSpec, config: Config, where: str, *, latent_split: bool = False) -> None:
    """Check that neither policy nor engine splits FP8 blocks, if they are used or `weight_sync.fp8_report` is set.

    Raises:
        UserError: see `check_fp8_layout`.
    """
    if config.engine.fp8 is not None:
        check_fp8_layout(
            spec,
            config.parallel,
            EngineGrid(config.engine.tp, config.engine.dp, experts_spread=config.engine.ep > 1),
            latent_split=latent_split,
            where=where,
        )
    elif config.weight_sync.fp8_report:
        check_policy_blocks(spec, config.parallel.tp, config.parallel.etp, latent_split=latent_split)


def check_engine_model(spec: ModelSpec, config: Config) -> None:
    """Check that the engine supports this model and computes it as the policy does.

    Raises:
        UserError: it does not.
    """
    check_engine_args(config)
    if config.engine.kind == "sglang":
        _check_sglang_on_this_machine(config)
    if config.model.base is not None:
        return
    folder = config.model.folder
    if config.engine.kind == "sglang":
        _check_sglang(spec, folder)
    if spec.moe is not None and config.engine.ep > spec.moe.num_experts:
        raise UserError(
            f"engine.ep={config.engine.ep}: {folder} has only {spec.moe.num_experts} experts, and every rank needs one",
            remedy="use fewer ranks, or engine.ep=1",
        )
    if config.engine.ep > 1 and spec.moe is None:
        raise UserError(f"engine.ep={config.engine.ep}: {folder} has no experts", remedy="use engine.ep=1")
    raw = json.loads((folder / "config.json").read_text())
    missing = [f"{key}={value}" for key, value in _ROUTER_FIELDS.get(spec.family, {}).items() if raw.get(key) != value]
    if missing:
        raise UserError(
            f"model.path={folder}: its config.json does not set {', '.join(missing)}, and vLLM would use another "
            f"router than {spec.family}",
            remedy="add it to config.json",
        )
    if spec.family == "gpt_oss":
        _check_gpt_oss(spec, folder)
    if raw.get("quantization_config") is not None and config.engine.fp8 is None:
        raise UserError(
            f"model.path={folder} has a quantization_config, and the engine would quantize the weights of a sync",
            remedy="use an unquantized checkpoint, or set engine.fp8=scales_fp32",
        )


def check_server_addresses(config: Config) -> None:
    """Check the addresses in `engine.urls` and `engine.spare_urls`.

    Raises:
        UserError: one is not an address, or it is on another machine and no secret is set.
    """
    for server in configured_servers(config.engine):
        require_token(server.address.host, read_token(), server.name)


def _check_sglang_on_this_machine(config: Config) -> None:
    """Check that SGLang supports the layout and the dtype on this machine.

    Raises:
        UserError: it does not.
    """
    if config.engine.ep > 1 and not has_cuda_driver():
        raise UserError(
            f"engine.ep={config.engine.ep} with engine.kind=sglang: SGLang supports expert parallelism only with CUDA",
            remedy="use engine.ep=1",
        )
    if config.precision.dtype == "fp32" and has_cuda_driver():
        raise UserError(
            "precision.dtype=fp32 with engine.kind=sglang: SGLang's attention kernels for CUDA compute in 16 bits",
            remedy="use precision.dtype=bf16, or engine.kind=vllm",
        )
    if config.engine.placement == "colocated" and has_cuda_driver():
        check_replica_gpus(config.engine.tp, num_usable_gpus())


def check_replica_gpus(tp: int, num_usable: int | None) -> None:
    """Check that a process that starts SGLang can use the GPUs of all ranks of its replica.

    SGLang starts one process per GPU from the first rank of a replica and numbers the GPUs from 0 to tp - 1
    (entrypoints/engine.py:935). With fewer GPUs it fails in torch.cuda.set_device (model_executor/model_runner.py:455).

    Args:
        tp: number of ranks of a replica.
        num_usable: GPUs that the process can use; None: not known.

    Raises:
        UserError: it can use fewer.
    """
    if num_usable is None or num_usable >= tp:
        return
    raise UserError(
        f"engine.tp={tp} with engine.kind=sglang: one process starts SGLang on the GPUs of the {tp} ranks of a "
        f"replica, and this process can use {num_usable} GPU(s). Slurm's --gpus-per-task and containers hide others",
        remedy="start one task per node that sees all of its GPUs (launch/slurm.sbatch), or use engine.kind=vllm or "
        "engine.tp=1",
    )


def _check_sglang(spec: ModelSpec, folder: Path) -> None:
    """Check that a sync to SGLang was verified for the family, and that SGLang reads the fields of config.json.

    SGLang 0.5.23 ignores some fields (models/*.py).

    Raises:
        UserError: the family was not verified, or SGLang would build another model.
    """
    if spec.family not in SGLANG_FAMILIES:
        raise UserError(
            f"engine.kind=sglang: a sync of the family {spec.family} ({folder}) to this engine was not verified",
            remedy=f"use engine.kind=vllm, or a model of {', '.join(SGLANG_FAMILIES)}",
        )
    if spec.family == "qwen3_moe" and spec.moe is not None and not all(spec.moe.layers):
        raise UserError(
            f"engine.kind=sglang: SGLang builds every layer of {folder} with experts and ignores mlp_only_layers and "
            "decoder_sparse_step of its config.json",
            remedy="use engine.kind=vllm",
        )
    if spec.family == "mixtral" and spec.head_dim * spec.num_heads != spec.hidden_size:
        raise UserError(
            f"engine.kind=sglang: {folder} has {spec.num_heads} heads of head_dim={spec.head_dim}, and SGLang builds "
            f"Mixtral with heads of {spec.hidden_size // spec.num_heads}",
            remedy="use engine.kind=vllm",
        )


def _check_gpt_oss(spec: ModelSpec, folder: Path) -> None:
    """Check the values that vLLM hard-codes in its gpt_oss model (models/gpt_oss.py, cpu_fused_moe.cpp).

    Raises:
        UserError: config.json has another value.
    """
    assert spec.moe is not None, "read_gpt_oss sets moe"
    assert spec.moe.gate is not None, "read_gpt_oss sets moe.gate"
    hard_coded = {
        "rms_norm_eps": (spec.norm_eps, 1e-5),
        "swiglu_alpha": (spec.moe.gate.alpha, 1.702),
        "swiglu_limit": (spec.moe.gate.limit, 7.0),
        "layers with a window": ([i for i, w in enumerate(spec.windowed) if w], list(range(0, spec.num_layers, 2))),
    }
    for what, (got, fixed) in hard_coded.items():
        if got != fixed:
            raise UserError(
                f"model.path={folder}: its config.json says {what}={got}, and vLLM always computes gpt_oss "
                f"with {fixed}",
                remedy="use a model with this value",
            )
