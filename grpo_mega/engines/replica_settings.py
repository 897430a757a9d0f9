"""Settings that replicas of every engine have in common. Asserted by tests/unit/engines/test_replica_settings.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from grpo_mega.config.schema import Config


@dataclass(frozen=True)
class ReplicaSettings:
    """Settings of one replica: ranks with one set of weights. Sizes are per copy of the attention."""

    config_dir: Path
    """Hugging Face folder with config.json and the tokenizer; its weights are not read."""
    dtype: Literal["fp32", "bf16"]
    tp: int
    """Ranks that split one copy of the attention."""
    max_model_len: int
    """Longest prompt plus completion, in tokens."""
    max_num_seqs: int
    """Rollouts that are sampled at the same time."""
    kv_cache_tokens: int | None
    """Capacity of the KV cache; None: `max_num_seqs` rollouts of `max_model_len` tokens (on CUDA: what is left of
    `memory_share`)."""
    seed: int
    """Seed of the engine's dummy weights; each request has its own seed."""
    memory_share: float = 0.85
    """Fraction of a GPU's memory for weights, workspace and KV cache."""
    ep: int = 1
    """1: every expert is split over the ranks of the replica; else their number: each expert is whole on one rank."""
    return_experts: bool = False
    """Record which experts each token is routed to, for requests with `expert_choices`."""
    args: dict[str, Any] = field(default_factory=dict)
    """`engine.args`: further arguments of the engine's own argument class, checked by engines/pass_through.py."""

    @classmethod
    def from_parts(cls, config: Config, model_folder: Path, **own: Any) -> Self:
        """Return the settings that the config asks for. `own` are the fields that only this engine has."""
        return cls(
            model_folder,
            dtype=config.precision.dtype,
            tp=config.engine.tp,
            max_model_len=config.longest_rollout,
            max_num_seqs=config.engine.max_num_seqs,
            kv_cache_tokens=config.engine.kv_cache_tokens,
            seed=config.run.seed,
            memory_share=config.engine.memory_share,
            ep=config.engine.ep,
            return_experts=config.algorithm.routing_replay,
            args=config.engine.args,
            **own,
        )
