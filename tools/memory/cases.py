"""Tiny models and layouts for comparing the planner with real runs; measured and predicted bytes.

Every row is full of sequences of the longest length, as the planner assumes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grpo_mega.config.schema import Config
from grpo_mega.formats.stored_head import checkpoint_spec

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_mega.interfaces import Engine
    from grpo_mega.parallel.ranks import Ranks
    from grpo_mega.planner.phase_memory import RankMemory
    from grpo_mega.types import Microbatch

PROMPT, COMPLETION = 16, 48
ROW = 2 * (PROMPT + COMPLETION)
_COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 40, "q_lora_rank": 48, "qk_nope_head_dim": 32,
           "qk_rope_head_dim": 16, "v_head_dim": 32, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "head_dim": 32} | _COMMON,
    "dense-bias": {"model_type": "qwen2"} | _COMMON,
    "moe": {"model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64, "norm_topk_prob": True, "mlp_only_layers": [0]} | _COMMON,
    "mla": {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    | _COMMON | _LATENT,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One layout of one model; `parallel` and `optimizer` are keys of these config sections."""

    name: str
    model: str
    world: int
    microbatches: int = 2
    dtype: str = "fp32"
    parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: Path) -> Config:
        """Return the config of the run."""
        rows = self.microbatches * (ROW // (PROMPT + COMPLETION)) * self._dp
        raw = {
            "run": {"world_size": self.world},
            "model": {"path": str(folder)},
            "parallel": self.parallel,
            "optimizer": self.optimizer,
            "sampling": {"group_size": 2, "max_tokens": COMPLETION},
            "data": {"train": "unused", "prompts_per_step": rows // 2, "max_prompt_tokens": PROMPT},
            "reward": {"terms": [{"name": "exact"}]},
            "algorithm": {"kl_coef": 0.0},
            "train": {"steps": 1, "max_tokens_per_microbatch": ROW},
            "precision": {"dtype": self.dtype},
        }
        return Config.model_validate_json(json.dumps(raw))

    @property
    def _dp(self) -> int:
        tp, pp, cp = (int(self.parallel.get(axis, 1)) for axis in ("tp", "pp", "cp"))
        return self.world // (tp * pp * cp)


TP2 = {"tp": 2, "sequence_parallel": True}
CASES = (
    Case("dense tp2 sp", "dense", 2, parallel=TP2),
    Case("dense pp2 dp2 bf16", "dense", 4, dtype="bf16", microbatches=4, parallel={"pp": 2}),
    Case("dense pp2 vpp2", "dense-bias", 2, microbatches=4, parallel={"pp": 2, "vpp": 2}),
    Case("dense cp2 bf16", "dense-bias", 2, dtype="bf16", parallel={"cp": 2}),
    Case("dense tp2 pp2 full recompute", "dense", 4, parallel={**TP2, "pp": 2, "recompute": "full"}),
    Case("MoE ep2 bf16", "moe", 2, dtype="bf16", parallel={"ep": 2}),
    Case("MoE tp2 ep2 sp", "moe", 2, parallel={**TP2, "ep": 2}),
    Case("MLA tp2 pp2 sp", "mla", 4, parallel={**TP2, "pp": 2}),
    Case("MLA ep2 dp2 bf16", "mla", 2, dtype="bf16", parallel={"ep": 2}),
)
# every model, both precisions, every kind of recomputation; CASES has several ranks
ONE_RANK_CASES = tuple(
    Case(f"{model} {dtype} recompute={recompute}", model, 1, 1, dtype, {"recompute": recompute})
    for model in MODELS
    for dtype in ("fp32", "bf16")
    for recompute in ("none", "selective", "full")
)


@dataclass(frozen=True)
class Bytes:
    """Bytes on one rank, or the mean over the ranks of one pipeline rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float


def make_model(folder: Path, model: str) -> None:
    """Write a random model of MODELS as a Hugging Face folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = dict(MODELS[model])
    AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).save_pretrained(
        folder
    )


def resident(case: Case, folder: Path, ranks: Ranks) -> dict[str, dict[str, int]]:
    """Return phase of the planner -> part -> bytes on the device of this rank, after an update. Collective."""
    from grpo_mega.policy.policy import MegatronPolicy
    from grpo_mega.trainer.phases import Phases

    spec = checkpoint_spec(folder)
    policy = MegatronPolicy(case.config(folder), spec, folder, ranks, with_reference=False)
    phases, found = Phases(policy), {}
    phases.start_engine(lambda: cast("Engine", _NoEngine()))
    with phases.training():
        policy.update([_row(spec.vocab_size, seed) for seed in range(case.microbatches)], _Loss(), 1e-4)
        found["train"] = policy.resident_bytes()
    with phases.syncing():
        found["sync"] = policy.resident_bytes()
    with phases.sampling():
        found["rollout"] = policy.resident_bytes()
    with phases.training():
        found["log_probs"] = policy.resident_bytes()
    return found


def measured(case: Case, folder: Path, ranks: Ranks) -> Bytes:
    """Return the bytes on this rank after an update, and the peak of activations during the next one. Collective."""
    from grpo_mega.policy.inspect.memory_use import held_bytes, saved_for_backward
    from grpo_mega.policy.policy import MegatronPolicy

    spec = checkpoint_spec(folder)
    policy = MegatronPolicy(case.config(folder), spec, folder, ranks, with_reference=False)
    rows = [_row(spec.vocab_size, seed) for seed in range(case.microbatches)]
    policy.update(rows, _Loss(), 1e-4)  # the moments appear with the first one
    held = held_bytes(policy.parts)
    with saved_for_backward(policy.parts.parameters) as saved:
        policy.update(rows, _Loss(), 1e-4)
    return Bytes(held.weights, held.gradients, held.optimizer, saved.peak)


def predicted(case: Case, folder: Path) -> list[Bytes]:
    """Return the planner's bytes of each pipeline rank."""
    return [
        Bytes(rank.static.weights, rank.static.gradients, rank.static.optimizer, rank.activations)
        for rank in planned_ranks(case, folder)
    ]


def planned_ranks(case: Case, folder: Path) -> list[RankMemory]:
    """Return the planner's memory of each pipeline rank."""
    from grpo_mega.planner.hardware import cluster_of, gpu_named
    from grpo_mega.planner.plan import plan_resources
    from grpo_mega.policy.inspect.module_sizes import module_counter

    spec = checkpoint_spec(folder)
    plan = plan_resources(
        case.config(folder), spec, module_counter(spec), cluster_of(gpu_named("cpu"), case.world), str(folder)
    )
    return plan.memory.ranks


def _row(vocab_size: int, seed: int) -> Microbatch:
    import torch

    from grpo_mega.types import Microbatch

    length = PROMPT + COMPLETION
    ids = torch.randint(0, vocab_size, (ROW,), generator=torch.Generator().manual_seed(seed))
    return Microbatch(
        rollout_ids=tuple(range(ROW // length)),
        token_ids=ids,
        position_ids=torch.arange(length).repeat(ROW // length),
        labels=ids.roll(-1),
        loss_mask=torch.ones(ROW, dtype=torch.bool),
        cu_seqlens=torch.arange(0, ROW + 1, length, dtype=torch.int32),
        advantages=torch.ones(ROW),
        token_weights=torch.full((ROW,), 1 / ROW),
        sampler_log_probs=torch.zeros(ROW),
    )


class _Loss:
    """A simple loss; its values do not matter."""

    needs_reference = False

    def __call__(self, log_probs: Tensor, entropy: Tensor, microbatch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return -log_probs * microbatch.advantages, {}


class _NoEngine:
    """An engine without memory."""

    def sleep(self) -> None:
        """Release nothing."""

    def wake(self, what: str) -> None:
        """Allocate nothing."""
