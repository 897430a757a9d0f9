"""Memory of an engine's KV cache: block size, bytes per token, number of blocks and of tokens.

The planner, the vLLM adapter and the SGLang adapter all take these numbers from here, so a plan and an engine agree.
This module imports no engine and allocates nothing.

Asserted by tests/unit/models/test_kv_cache_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_mega.config.schema import Config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import UserError

EngineKind = Literal["vllm", "sglang"]

BATCHED_TOKENS = 8192
"""Prompt tokens that an engine computes in one step; see `KvCacheSize.batched_tokens` for long rollouts."""


@dataclass(frozen=True)
class CacheFormat:
    """The way one engine divides its KV cache."""

    block_tokens: int
    """Tokens of one block; SGLang calls it a page."""
    spare_tokens: int
    """Positions that the engine reserves for each rollout beside its tokens."""
    padding_blocks: int = 1
    """Allocated blocks that never hold a token of a rollout."""


CACHE_FORMATS: dict[EngineKind, CacheFormat] = {
    # The CPU kernels of vLLM need multiples of 32. Larger blocks waste cache on short rollouts, so CUDA uses 32 too.
    # vLLM keeps one block as a null block.
    "vllm": CacheFormat(block_tokens=32, spare_tokens=0),
    # The adapter leaves SGLang's page size at its default, 1. SGLang keeps six positions of the context and its limits
    # are exclusive (srt/managers/scheduler.py). Its pools hold one page more than asked for (mem_cache/memory_pool.py).
    "sglang": CacheFormat(block_tokens=1, spare_tokens=8),
}


@dataclass(frozen=True)
class KvCacheSize:
    """The KV cache of one engine replica, or of each of its data-parallel copies.

    `max_tokens` is `engine.kv_cache_tokens`; None means room for `max_num_seqs` rollouts of `max_model_len` tokens.
    """

    kind: EngineKind
    max_model_len: int
    max_num_seqs: int
    max_tokens: int | None

    @classmethod
    def from_config(cls, config: Config) -> KvCacheSize:
        """Return the size that the engine of this config requests."""
        engine = config.engine
        return cls(engine.kind, config.longest_rollout, engine.max_num_seqs, engine.kv_cache_tokens)

    @property
    def format(self) -> CacheFormat:
        """The block size and the reserved positions of this engine."""
        return CACHE_FORMATS[self.kind]

    @property
    def blocks_per_rollout(self) -> int:
        """Blocks that one rollout of full length takes."""
        return -(-(self.max_model_len + self.format.spare_tokens) // self.format.block_tokens)

    @property
    def tokens_per_rollout(self) -> int:
        """Tokens of the blocks that one rollout of full length takes."""
        return self.blocks_per_rollout * self.format.block_tokens

    def check(self) -> None:
        """Check that the cache holds one rollout of full length.

        Raises:
            UserError: `engine.kv_cache_tokens` is too small.
        """
        if self.max_tokens is None or self.max_tokens // self.format.block_tokens >= self.blocks_per_rollout:
            return
        spare = f" and the {self.format.spare_tokens} that the engine reserves" if self.format.spare_tokens else ""
        raise UserError(
            f"engine.kv_cache_tokens={self.max_tokens} does not hold one rollout of {self.max_model_len} tokens{spare}",
            remedy=f"use at least {self.tokens_per_rollout}",
        )

    @property
    def num_blocks(self) -> int:
        """Blocks that hold rollouts.

        Raises:
            UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
        """
        self.check()
        if self.max_tokens is None:
            return self.max_num_seqs * self.blocks_per_rollout
        return self.max_tokens // self.format.block_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the blocks that hold rollouts.

        Raises:
            UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
        """
        return self.num_blocks * self.format.block_tokens

    def num_bytes(self, spec: ModelSpec, tp: int, itemsize: int) -> int:
        """Return the bytes that one rank allocates: (blocks + padding blocks) * tokens per block * bytes per token.

        Raises:
            UserError: `engine.kv_cache_tokens` does not hold one rollout of full length.
        """
        blocks = self.num_blocks + self.format.padding_blocks
        return blocks * self.format.block_tokens * kv_bytes_per_token(spec, tp, itemsize)

    @property
    def batched_tokens(self) -> int:
        """Most prompt tokens that the engine computes in one step.

        vLLM must take a whole prompt, and one token of every rollout, in one step; SGLang cuts prompts into chunks.
        """
        if self.kind == "sglang":
            return BATCHED_TOKENS
        return max(BATCHED_TOKENS, self.max_model_len, self.max_num_seqs)


def cached_elements(spec: ModelSpec, tp: int) -> int:
    """Return the cached elements of one token in one layer on one rank.

    They are the keys and values of the rank's KV heads. With latent attention (MLA) every rank holds the whole latent
    vector and the rotary key instead.
    """
    if spec.mla is not None:
        return spec.mla.kv_rank + spec.mla.rope_dim
    return 2 * local_kv_heads(spec, tp) * spec.head_dim


def local_kv_heads(spec: ModelSpec, tp: int) -> int:
    """Return the number of KV heads on each rank of an engine; heads are repeated where there are fewer than ranks."""
    return max(1, spec.num_kv_heads // tp)


def kv_bytes_per_token(spec: ModelSpec, tp: int, itemsize: int) -> int:
    """Return the bytes that one token takes in the KV cache of one rank: layers * cached elements * itemsize."""
    return spec.num_layers * cached_elements(spec, tp) * itemsize
