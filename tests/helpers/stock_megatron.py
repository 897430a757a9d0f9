"""A stock Megatron-Core GPTModel on CPU: saves a random checkpoint, or loads one and writes its logits.

    python stock_megatron.py save|load CONFIG.json CHECKPOINT OUT [TP PP [EP]]

Imports nothing of grpo_mega: it represents an unmodified Megatron. CONFIG.json is the `config.json` of a Hugging Face
model, which is dense or has experts or latent attention. `save` writes CHECKPOINT with random weights; `load`
loads CHECKPOINT by `dist_checkpointing.load` and saves it again as OUT.again. Both write OUT, the float32 logits
[B, S, V] of `token_ids`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import types
from pathlib import Path
from typing import Any

import torch

BATCH, LENGTH = 2, 12


def token_ids(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))


class _Null:
    """Stub of a CUDA stream or event."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Null:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Null)

    def __hash__(self) -> int:
        return 0

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: self


def _shims() -> Any:
    """Replace the CUDA calls that Megatron makes while it builds and runs by calls for the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    torch.cuda.manual_seed = lambda *_: None  # type: ignore[assignment]
    torch.cuda.Stream = torch.cuda.Event = _Null  # type: ignore[misc, assignment]
    torch.cuda.stream = lambda *_: _Null()  # type: ignore[assignment]
    torch.cuda.current_stream = lambda *_: _Null()  # type: ignore[assignment]
    factory = torch.tensor, torch.empty, torch.zeros, torch.ones, torch.arange

    def on_cpu(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return call

    torch.tensor, torch.empty, torch.zeros, torch.ones, torch.arange = map(on_cpu, factory)
    torch.compile = lambda f=None, **_: f if f is not None else (lambda g: g)  # type: ignore[assignment]
    kernels = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")  # imports triton, for CUDA only
    kernels.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
    kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = None  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = lambda t, as_numpy=False, **_: (
        t.numpy() if as_numpy and torch.is_tensor(t) else t
    )


class LatentCoreAttention(torch.nn.Module):
    """Causal attention [S, B, n, d] whose values are narrower than its keys; Megatron's does not support this."""

    def __init__(self, config: Any, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        heads = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


def settings_of(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of TransformerConfig."""
    heads, family = raw["num_attention_heads"], raw["model_type"]
    settings = {
        "num_layers": raw["num_hidden_layers"],
        "hidden_size": raw["hidden_size"],
        "ffn_hidden_size": raw["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": raw["num_key_value_heads"],
        "kv_channels": raw.get("head_dim") or raw["hidden_size"] // heads,
        "layernorm_epsilon": raw["rms_norm_eps"],
        "transformer_impl": "local",
        "qk_layernorm": family in ("qwen3", "qwen3_moe") or raw.get("use_qk_norm", False),
        "add_qkv_bias": family == "qwen2" or (family == "glm4_moe" and raw["attention_bias"]),
    }
    experts = next((raw[k] for k in ("n_routed_experts", "num_local_experts", "num_experts") if raw.get(k)), None)
    if experts is not None:
        dense = range(raw.get("first_k_dense_replace", 0)), raw.get("mlp_only_layers") or ()
        freq = [int(all(layer not in those for those in dense)) for layer in range(raw["num_hidden_layers"])]
        sigmoid = family in ("deepseek_v3", "glm4_moe")
        width = raw.get("moe_intermediate_size") or raw["intermediate_size"]
        settings |= {
            "num_moe_experts": experts,
            "moe_layer_freq": 1 if all(freq) else freq,
            "moe_ffn_hidden_size": width,
            "moe_shared_expert_intermediate_size": width * (raw.get("n_shared_experts") or 0) or None,
            "moe_router_topk": raw["num_experts_per_tok"],
            "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
            "moe_router_pre_softmax": family == "deepseek_v2",
            "moe_router_num_groups": raw.get("n_group"),
            "moe_router_group_topk": raw.get("topk_group"),
            "moe_router_topk_scaling_factor": raw.get("routed_scaling_factor"),
            "moe_router_enable_expert_bias": sigmoid,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    if "kv_lora_rank" in raw:
        settings |= {
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "q_lora_rank": raw["q_lora_rank"],
            "kv_lora_rank": raw["kv_lora_rank"],
            "qk_head_dim": raw["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": raw["qk_rope_head_dim"],
            "v_head_dim": raw["v_head_dim"],
            "rope_type": "rope",
            "mscale_all_dim": 0.0,
        }
    return settings


def build_model(raw: dict[str, Any], tp: int, pp: int, ep: int, vocab: int) -> Any:
    """Build the model of a `config.json` with Megatron's local spec."""
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    latent, rope = "kv_lora_rank" in raw, raw.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta", 10000.0)
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **settings_of(raw),
        **({"rotary_base": theta} if latent else {}),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    gpt_layer_specs.LNImpl = WrappedTorchNorm
    if latent:
        LocalSpecProvider.core_attention = lambda _: LatentCoreAttention
    return GPTModel(
        config,
        gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab,
        raw["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=raw["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        rotary_base=theta,
    ).eval()


def logits_of(model: Any, ids: torch.Tensor, hidden_size: int) -> torch.Tensor | None:
    """Return logits [B, S, V] on the last stage; each stage sends its hidden states to the next."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not parallel_state.is_pipeline_first_stage():
        received = torch.empty(ids.size(1), ids.size(0), hidden_size)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    mask = ~torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()[None, None]
    out: torch.Tensor = model(ids, torch.arange(ids.size(1)).expand_as(ids), mask)
    if parallel_state.is_pipeline_last_stage():
        return out
    dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def run_rank(rank: int, arguments: list[str]) -> None:
    action, config, checkpoint, out = arguments[:4]
    tp, pp, ep = map(int, arguments[4:7])
    torch.set_num_threads(1)
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    raw = json.loads(Path(config).read_text())
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=tp * pp * ep)
    parallel_state.initialize_model_parallel(
        tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = build_model(raw, tp, pp, ep, -(-raw["vocab_size"] // tp) * tp)
    if action == "save":
        for number, (name, parameter) in enumerate(model.named_parameters()):
            split = getattr(
                parameter, "tensor_model_parallel", False
            )  # tensors that are not split are the same on every rank
            generator = torch.Generator().manual_seed(100 * number + (rank if split else 0))
            parameter.data.normal_(float("norm" in name), 0.15, generator=generator)
        written = Path(checkpoint)
    else:
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, checkpoint)
        assert loaded["args"].hidden_size == raw["hidden_size"]
        model.load_state_dict(loaded["model"])
        written = Path(out + ".again")
    written.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(written))
    with torch.no_grad():
        logits = logits_of(model, token_ids(raw["vocab_size"]), raw["hidden_size"])
    if logits is not None and rank == (pp - 1) * tp * ep:
        torch.save(logits[..., : raw["vocab_size"]].clone(), out)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    _shims()
    arguments = [*sys.argv[1:], *("1" * (8 - len(sys.argv)))]
    from megatron.core.tensor_parallel import random  # imported before the ranks are forked

    random._get_cuda_rng_state = lambda *_, **__: torch.zeros(1, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(r, arguments)) for r in range(math.prod(map(int, arguments[4:7])))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(rank.exitcode or 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
