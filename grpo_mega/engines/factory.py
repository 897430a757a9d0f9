"""The engine that a config asks for."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from grpo_mega.config.schema import Config
from grpo_mega.engines.server.engine import ServerEngine
from grpo_mega.engines.server.messages import serving_facts
from grpo_mega.engines.sglang.engine import STAGING_BYTES, SglangEngine
from grpo_mega.engines.vllm.engine import VllmEngine
from grpo_mega.interfaces import Engine


def make_engine(config: Config, model_folder: Path, logs: Path | None = None) -> Engine:
    """The engine of `engine.kind` and `engine.placement` on this rank. Collective.

    `logs`: the folder for what engines in processes of their own print.
    """
    if config.engine.placement == "server":
        return ServerEngine(
            config.engine.urls,
            tp=config.engine.tp,
            facts=serving_facts(config, model_folder),
            max_model_len=config.longest_rollout,
            tell_experts=config.algorithm.routing_replay,
            timeout_seconds=config.guard.timeout_seconds,
        )
    if config.engine.kind == "sglang":
        return SglangEngine(
            model_folder,
            dtype=config.precision.dtype,
            tp=config.engine.tp,
            ep=config.engine.ep,
            max_model_len=config.longest_rollout,
            max_num_seqs=config.engine.max_num_seqs,
            kv_cache_tokens=config.engine.kv_cache_tokens,
            seed=config.run.seed,
            stops_at_texts=config.environment is not None,
            tell_experts=config.algorithm.routing_replay,
            timeout_seconds=config.guard.timeout_seconds,
            staging_bytes=min(config.weight_sync.bucket_bytes, STAGING_BYTES),
            log=None if logs is None else logs / f"sglang_{dist.get_rank():05d}.log",
        )
    return make_vllm_engine(config, model_folder)


def make_vllm_engine(config: Config, model_folder: Path) -> VllmEngine:
    """A vLLM in this process: of a rank of the job, or of a rank of a server."""
    return VllmEngine(
        model_folder,
        dtype=config.precision.dtype,
        tp=config.engine.tp,
        dp=config.engine.dp,
        ep=config.engine.ep,
        max_model_len=config.longest_rollout,
        max_num_seqs=config.engine.max_num_seqs,
        kv_cache_tokens=config.engine.kv_cache_tokens,
        seed=config.run.seed,
        tell_experts=config.algorithm.routing_replay,
        fp8=config.engine.fp8_weights,
    )
