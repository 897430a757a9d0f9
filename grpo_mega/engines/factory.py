"""Construction of the engine that the config selects."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from grpo_mega.config.schema import Config
from grpo_mega.engines.server.engine import ServerEngine
from grpo_mega.engines.server.messages import serving_facts
from grpo_mega.engines.sglang.arguments import SglangSettings
from grpo_mega.engines.sglang.engine import SglangEngine
from grpo_mega.engines.vllm.arguments import VllmSettings
from grpo_mega.engines.vllm.engine import VllmEngine
from grpo_mega.formats.stored_head import checkpoint_spec
from grpo_mega.interfaces import Engine


def make_engine(config: Config, model_folder: Path, logs: Path | None = None) -> Engine:
    """Construct the engine of `engine.kind` and `engine.placement` on this rank. Collective over all ranks.

    Args:
        config: the run's config.
        model_folder: Hugging Face folder with config.json and the tokenizer.
        logs: folder for the output of engines that run in processes of their own; None: a temporary file.
    """
    if config.engine.placement == "server":
        return ServerEngine(
            config.engine.urls,
            spare_urls=config.engine.spare_urls,
            tp=config.engine.tp,
            facts=serving_facts(config, model_folder),
            max_model_len=config.longest_rollout,
            vocab_size=checkpoint_spec(model_folder).vocab_size,
            tell_experts=config.algorithm.routing_replay,
            timeout_seconds=config.guard.timeout_seconds,
        )
    if config.engine.kind == "sglang":
        log = None if logs is None else logs / f"sglang_{dist.get_rank():05d}.log"
        return SglangEngine(SglangSettings.from_config(config, model_folder), log)
    return make_vllm_engine(config, model_folder)


def make_vllm_engine(config: Config, model_folder: Path) -> VllmEngine:
    """Construct a vLLM engine in this process, which is a rank of the job or a rank of an engine server."""
    return VllmEngine(VllmSettings.from_config(config, model_folder))
