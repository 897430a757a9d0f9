"""One table per model family: Megatron parameter -> rule.

A family is supported when its logits equal those of `transformers` in every layout (tests/parallel/test_update.py).
Names ending in `layer_norm_weight` are those of Transformer Engine's fused modules, the others those of Megatron's
local ones; the checkpoint's side is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from grpo_mega.convert.rules import Copy, Interleaved, Rule, Shape, Stacked, Vocabulary, placements
from grpo_mega.convert.spec import ModelSpec
from grpo_mega.types import Placement

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def dense_table(spec: ModelSpec) -> dict[str, Rule]:
    """Llama, Qwen2 and Qwen3: pre-norm attention with grouped queries and a gated feed-forward."""
    layer, hidden = "model.layers.{layer}.", spec.hidden_size
    attention = layer + "self_attn."
    input_norm = Copy(layer + "input_layernorm.weight", (hidden,), None)
    post_norm = Copy(layer + "post_attention_layernorm.weight", (hidden,), None)
    query, key, value = (f"{attention}{x}_proj." for x in "qkv")
    table: dict[str, Rule] = {
        "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
        "decoder.layers.{layer}.input_layernorm.weight": input_norm,
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight": input_norm,
        "decoder.layers.{layer}.self_attention.linear_qkv.weight": Interleaved(
            query + "weight", key + "weight", value + "weight", bias=False
        ),
        "decoder.layers.{layer}.self_attention.linear_proj.weight": Copy(
            attention + "o_proj.weight", (hidden, spec.num_heads * spec.head_dim), 1
        ),
        "decoder.layers.{layer}.pre_mlp_layernorm.weight": post_norm,
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight": post_norm,
        "decoder.layers.{layer}.mlp.linear_fc1.weight": Stacked(
            (layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"), spec.ffn_size, hidden
        ),
        "decoder.layers.{layer}.mlp.linear_fc2.weight": Copy(
            layer + "mlp.down_proj.weight", (hidden, spec.ffn_size), 1
        ),
        "decoder.final_layernorm.weight": Copy("model.norm.weight", (hidden,), None),
    }
    if spec.qkv_bias:
        table["decoder.layers.{layer}.self_attention.linear_qkv.bias"] = Interleaved(
            query + "bias", key + "bias", value + "bias", bias=True
        )
    if spec.qk_norm:
        for x in "qk":
            table[f"decoder.layers.{{layer}}.self_attention.{x}_layernorm.weight"] = Copy(
                f"{attention}{x}_norm.weight", (spec.head_dim,), None
            )
    # a tied head is a parameter of its own on the last of several pipeline stages
    table["output_layer.weight"] = Vocabulary("model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight")
    return table


_TABLES = {"llama": dense_table, "qwen2": dense_table, "qwen3": dense_table}


def parameter_placements(spec: ModelSpec, parameter: str, tp: int, tp_rank: int) -> list[Placement]:
    """The pieces of `parameter`, whose layer numbers count from the model's first layer.

    Raises:
        KeyError: the family's table has no such parameter.
    """
    found = _LAYER.match(parameter)
    layer = int(found[1]) if found else 0
    template = _LAYER.sub("decoder.layers.{layer}.", parameter)
    rule = _TABLES[spec.family](spec)[template]
    return placements(rule, spec, parameter, layer, tp, tp_rank)


def parameter_names(spec: ModelSpec) -> Iterator[str]:
    """Every name in the table, layers numbered from the model's first; several may be the same tensor."""
    for name in _TABLES[spec.family](spec):
        if "{layer}" in name:
            yield from (name.format(layer=layer) for layer in range(spec.num_layers))
        else:
            yield name


def hf_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of the checkpoint: embedding, layers in order, final norm, head."""
    shapes: dict[str, Shape] = {}
    table = _TABLES[spec.family](spec)
    per_layer = [rule for name, rule in table.items() if "{layer}" in name]
    for name, rule in table.items():
        if name == "decoder.final_layernorm.weight":
            for layer in range(spec.num_layers):
                for each in per_layer:
                    shapes |= {k.format(layer=layer): v for k, v in each.hf_shapes(spec).items()}
        if "{layer}" not in name:
            shapes |= rule.hf_shapes(spec)
    return shapes
