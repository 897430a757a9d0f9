"""Random models of every family, and random layouts that divide them."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.models.layout_rules import check_layout
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config

MAX_WORLD = 8


def random_config(rng: random.Random, family: str) -> dict[str, Any]:
    """Return random fields of a config.json: sizes, heads, experts, biases, norms, rotary scaling, tied embeddings."""
    layers, heads = rng.randint(1, 4), rng.choice((2, 4, 6, 8))
    kv = rng.choice([n for n in (1, 2, 3, 4, 6, 8) if heads % n == 0])
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "hidden_size": heads * rng.choice((8, 12, 16)),
        "intermediate_size": 8 * rng.randint(3, 12),
        "vocab_size": rng.randint(12, 40),
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": rng.choice((1e-5, 1e-6)),
        "rope_parameters": _rope(rng, latent=family.startswith("deepseek")),
    }
    if family not in ("qwen2", "deepseek_v2", "deepseek_v3"):
        changes["head_dim"] = rng.choice((8, 16, 24))
    if family == "qwen3_moe":
        changes |= {
            "num_experts": rng.choice((2, 4, 6, 8)),
            "norm_topk_prob": rng.random() < 0.5,
            "decoder_sparse_step": rng.choice((1, 1, 2)),
            "mlp_only_layers": rng.choice(([], [0])),
            "moe_intermediate_size": 8 * rng.randint(1, 6),
        }
        changes["num_experts_per_tok"] = rng.randint(1 + changes["norm_topk_prob"], changes["num_experts"])
    if family == "gpt_oss":
        kinds = ("sliding_attention", "full_attention")
        changes |= {
            "layer_types": [rng.choice(kinds) for _ in range(layers)],
            "sliding_window": rng.choice((2, 5, 100)),
            "swiglu_limit": rng.choice((0.3, 7.0)),
        }
    if family in ("mixtral", "gpt_oss"):
        changes["num_local_experts"] = rng.choice((2, 4, 6))
        changes["num_experts_per_tok"] = rng.randint(2, changes["num_local_experts"])
    if family in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        changes |= _groups(rng, family, layers)
    if family.startswith("deepseek"):
        changes |= _latent(rng, heads)
    if family == "glm4_moe":
        changes |= {"attention_bias": rng.random() < 0.5, "use_qk_norm": rng.random() < 0.5}
    return raw_family_config(family, **changes)


def _rope(rng: random.Random, *, latent: bool) -> dict[str, Any]:
    theta = rng.choice((1000.0, 10000.0))
    kind = rng.choice(("default", "yarn") if latent else ("default", "linear", "llama3", "yarn"))
    if kind == "default":
        return {"rope_type": "default", "rope_theta": theta}
    found = {"rope_type": kind, "rope_theta": theta, "factor": rng.choice((2.0, 4.0, 8.0))}
    if kind != "linear":
        found["original_max_position_embeddings"] = rng.choice((16, 64))
    if kind == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice((2.0, 4.0))}
    if kind == "yarn":
        found |= {"beta_fast": rng.choice((4.0, 32.0)), "beta_slow": 1.0}
        if latent:
            found |= {"mscale": rng.choice((0.7, 1.0)), "mscale_all_dim": rng.choice((0.5, 1.0))}
    return found


def _groups(rng: random.Random, family: str, layers: int) -> dict[str, Any]:
    """Return the fields of a group-limited router and its number of experts per token."""
    groups = rng.choice((1, 2, 4))
    size = rng.choice((2, 3, 4))
    best = rng.randint(1, groups)
    found: dict[str, Any] = {
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": best,
        "num_experts_per_tok": rng.randint(2, best * size),
        "moe_intermediate_size": 8 * rng.randint(1, 4),
        "first_k_dense_replace": rng.randint(0, layers),
        "n_shared_experts": rng.randint(1, 2),
        "routed_scaling_factor": rng.choice((1.0, 1.5, 2.5)),
    }
    if family == "deepseek_v2" and rng.random() < 0.5:
        found |= {"topk_method": "greedy", "n_group": None, "topk_group": None}
    return found


def _latent(rng: random.Random, heads: int) -> dict[str, Any]:
    return {
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice((None, 12, 16, 24)),
        "kv_lora_rank": 8 * rng.randint(1, 4),
        "qk_nope_head_dim": 4 * rng.randint(1, 4),
        "qk_rope_head_dim": rng.choice((4, 8)),
        "v_head_dim": 4 * rng.randint(1, 5),
    }


def random_layout(rng: random.Random, spec: ModelSpec) -> tuple[int, ParallelConfig]:
    """Return a number of ranks and a layout that divides the model."""
    while True:
        tp, pp, cp = rng.choice((1, 2, 2, 4)), rng.choice((1, 2, 2, 3)), rng.choice((1, 1, 2))
        ep, etp = (1, 1) if spec.moe is None else (rng.choice((1, 2, 2, 4)), rng.choice((1, 1, 2)))
        world = math.lcm(tp * cp * pp, etp * ep * pp) * rng.choice((1, 1, 2))
        if world > MAX_WORLD:
            continue
        sequence_parallel = tp > 1 and (spec.moe is not None or rng.random() < 0.5)
        settings: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp}
        settings |= {"sequence_parallel": sequence_parallel, "recompute": rng.choice(("none", "none", "full"))}
        if pp > 1 and rng.random() < 0.4:
            settings |= {"vpp": 2, "pipeline_layout": _spread(rng, 2 * pp, spec.num_layers)}
        if rng.random() < 0.3:
            settings |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
        try:
            parallel = ParallelConfig(**settings)
            topology = Topology(world, tp, pp, cp=cp, ep=ep, etp=etp, vpp=settings.get("vpp", 1))
            check_layout(spec, parallel, topology, "the model")
        except (UserError, ValueError):
            continue
        return world, parallel


def _spread(rng: random.Random, stages: int, layers: int) -> str:
    """Return a `parallel.pipeline_layout` with the layers spread randomly over the stages."""
    cuts = sorted(rng.randint(0, layers) for _ in range(stages - 1))
    bounds = [0, *cuts, layers]
    parts = ["t" * (end - begin) for begin, end in pairwise(bounds)]
    parts[0], parts[-1] = "E" + parts[0], parts[-1] + "L"
    return "|".join(parts)


def random_case(seed: int) -> tuple[dict[str, Any], int, ParallelConfig]:
    """Return a random config.json, a number of ranks and a layout."""
    rng = random.Random(seed)
    raw = random_config(rng, list(FAMILY_CONFIGS)[seed % len(FAMILY_CONFIGS)])
    return raw, *random_layout(rng, spec_from_config(raw, f"seed {seed}"))
