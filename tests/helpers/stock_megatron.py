"""A stock Megatron-Core GPTModel on CPU: saves a random checkpoint, or loads one and writes its logits.

    python stock_megatron.py save|load CONFIG.json CHECKPOINT OUT [TP PP]

Imports nothing of grpo_mega: it stands for somebody else's Megatron. CONFIG.json is the `config.json` of a Hugging Face
folder of a dense model. `save` writes CHECKPOINT with random weights; `load` loads CHECKPOINT by
`dist_checkpointing.load` and saves it again as OUT.again. Both write OUT, the float32 logits [B, S, V] of `token_ids`.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch

BATCH, LENGTH = 2, 12


def token_ids(vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))


def _shims() -> Any:
    """Megatron asks for the current CUDA device while it builds and runs; everything is on the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    torch.cuda.manual_seed = lambda *_: None  # type: ignore[assignment]
    factory = torch.tensor, torch.empty, torch.zeros

    def on_cpu(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return make(*args, **kwargs)

        return call

    torch.tensor, torch.empty, torch.zeros = map(on_cpu, factory)
    torch.compile = lambda f=None, **_: f if f is not None else (lambda g: g)  # type: ignore[assignment]


def build(raw: dict[str, Any], tp: int, pp: int, vocab: int) -> Any:
    """The model of a dense `config.json` in Megatron's local spec."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    heads = raw["num_attention_heads"]
    config = TransformerConfig(
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=raw["num_key_value_heads"],
        kv_channels=raw.get("head_dim") or raw["hidden_size"] // heads,
        normalization="RMSNorm",
        layernorm_epsilon=raw["rms_norm_eps"],
        qk_layernorm=raw["model_type"] == "qwen3",
        add_qkv_bias=raw["model_type"] == "qwen2",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
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
    rope = raw.get("rope_parameters") or {}
    return GPTModel(
        config,
        gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm"),
        vocab,
        raw["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=raw["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
    )


def logits_of(model: Any, ids: torch.Tensor, hidden_size: int) -> torch.Tensor | None:
    """[B, S, V] on the last stage: stages hand over their hidden states by plain sends."""
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


def work(rank: int, arguments: list[str]) -> None:
    action, config, checkpoint, out, tp, pp = (*arguments[:4], int(arguments[4]), int(arguments[5]))
    torch.set_num_threads(1)
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    raw = json.loads(Path(config).read_text())
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=tp * pp)
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = build(raw, tp, pp, -(-raw["vocab_size"] // tp) * tp)
    if action == "save":
        for number, (name, parameter) in enumerate(model.named_parameters()):
            split = getattr(parameter, "tensor_model_parallel", False)  # what is not split is the same on every rank
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
    if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save(logits[..., : raw["vocab_size"]].clone(), out)
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    _shims()
    arguments = [*sys.argv[1:5], *(sys.argv[5:7] or ["1", "1"])]
    from megatron.core.tensor_parallel import random  # here, before the ranks are forked

    random._get_cuda_rng_state = lambda *_, **__: torch.zeros(1, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(r, arguments)) for r in range(int(arguments[4]) * int(arguments[5]))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(rank.exitcode or 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
