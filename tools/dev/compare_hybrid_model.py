"""Build a tiny Qwen3 as Megatron's GPTModel and as its HybridModel with the same weights, and compare the logits.

    python tools/dev/compare_hybrid_model.py [--layers 3] [--tokens 24]

Shows what docs/decisions/hybrid-model.md says about moving to HybridModel. One process, CPU, float32.
Prints the largest difference as JSON. Exit code 0: at most 1e-5; 1: more.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.config.policy_sections import ParallelConfig, PrecisionConfig
from grpo_mega.models.config_readers import spec_from_config
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.policy.megatron_patches import cpu, fixes
from grpo_mega.policy.module_choice import ModuleChoice

cpu.prepare_import()

from megatron.core import parallel_state  # noqa: E402 - only after prepare_import
from megatron.core.models.gpt import GPTModel, gpt_layer_specs  # noqa: E402
from megatron.core.models.hybrid import hybrid_block  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.ssm.mlp_layer import MLPLayer  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules  # noqa: E402

from grpo_mega.policy.build import init_groups  # noqa: E402
from grpo_mega.policy.modules.packed_attention import PackedSpecProvider, RMSNorm  # noqa: E402
from grpo_mega.policy.transformer_config import transformer_config  # noqa: E402

_TOLERANCE = 1e-5
_MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 128, "hidden_size": 64,
    "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def build_both(layers: int) -> tuple[Any, Any]:
    """Return a GPTModel with random weights and a HybridModel with the same weights."""
    spec = spec_from_config(_MODEL | {"num_hidden_layers": layers}, "config.json")
    gpt_layer_specs.LocalSpecProvider, gpt_layer_specs.LNImpl = PackedSpecProvider, RMSNorm
    settings: dict[str, Any] = {
        "vocab_size": spec.vocab_size, "max_sequence_length": spec.max_positions, "position_embedding_type": "rope",
        "rotary_base": int(spec.rope_theta), "parallel_output": False,
    }  # fmt: skip
    modules = ModuleChoice(transformer_engine=False, device="cpu")
    config = transformer_config(spec, ParallelConfig(), PrecisionConfig(dtype="fp32"), modules)
    block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    gpt = GPTModel(config, block, **settings)
    hybrid_block.TENorm = RMSNorm  # the class of the final norm is hard-coded
    hybrid_config = transformer_config(spec, ParallelConfig(), PrecisionConfig(dtype="fp32"), modules)
    hybrid_config.num_layers = 2 * layers  # attention and MLP are layers of their own
    hybrid = HybridModel(hybrid_config, _stack(block.layer_specs[0].submodules), hybrid_layer_pattern="*-" * layers,
                         **settings)  # fmt: skip
    hybrid.load_state_dict({_hybrid_name(name): value for name, value in gpt.state_dict().items()})
    return gpt.eval(), hybrid.eval()


def _stack(layer: Any) -> ModuleSpec:
    """Return the parts of a GPTModel layer as two kinds of layers of a hybrid stack."""
    attention = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm, self_attention=layer.self_attention, self_attn_bda=layer.self_attn_bda
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
    return ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def _hybrid_name(name: str) -> str:
    """Return the name in HybridModel of a tensor of GPTModel."""
    if name.startswith("decoder.final_layernorm."):
        return name.replace("final_layernorm", "final_norm")
    if not name.startswith("decoder.layers."):
        return name
    _, _, layer, part, rest = name.split(".", 4)
    is_mlp = part in ("mlp", "pre_mlp_layernorm")
    return f"decoder.layers.{2 * int(layer) + is_mlp}.{part}.{rest}"


def largest_difference(layers: int, tokens: int) -> float:
    """Return the largest difference of the logits [T, V] of one packed row with two sequences."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        topology = Topology(1)
        init_groups(Ranks(topology, topology.coordinates(0), torch.device("cpu")), 60.0)
        cpu.install()
        fixes.install()
        torch.manual_seed(0)
        gpt, hybrid = build_both(layers)
        cpu.install()  # for modules that were imported while the models were built
        ids = torch.randint(0, _MODEL["vocab_size"], (1, tokens))  # type: ignore[call-overload]
        bounds = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
        lengths = int(bounds.diff().max())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=lengths, max_seqlen_kv=lengths
        )
        with torch.no_grad():
            outputs = [
                model(ids, torch.arange(tokens)[None], None, packed_seq_params=packed).float()
                for model in (gpt, hybrid)
            ]
        return float((outputs[0] - outputs[1]).abs().max())
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def main() -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    difference = largest_difference(arguments.layers, arguments.tokens)
    print(json.dumps({"layers": arguments.layers, "tokens": arguments.tokens, "largest_difference": difference}))
    return int(difference > _TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
