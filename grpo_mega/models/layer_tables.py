"""Tables of the parts of a layer: Megatron parameter -> rule, for every kind of attention and feed-forward.

Keys are names inside `decoder.layers.{layer}.`. Names ending in `layer_norm_weight` belong to Transformer Engine's
fused modules, and `weight{expert}` to its grouped experts. The other names belong to Megatron's local modules. Both
names of a parameter have the same Hugging Face tensors.
"""

from __future__ import annotations

from grpo_mega.models.placement_rules import Copy, Interleaved, Rule, Stacked
from grpo_mega.models.spec import ModelSpec, MoeSpec

LAYER = "model.layers.{layer}."
Table = dict[str, Rule]


def norms(spec: ModelSpec) -> Table:
    """Return the norms before the attention and before the feed-forward."""
    input_norm = Copy(LAYER + "input_layernorm.weight", (spec.hidden_size,), None)
    post_norm = Copy(LAYER + "post_attention_layernorm.weight", (spec.hidden_size,), None)
    return {
        "input_layernorm.weight": input_norm,
        "self_attention.linear_qkv.layer_norm_weight": input_norm,
        "pre_mlp_layernorm.weight": post_norm,
        "mlp.linear_fc1.layer_norm_weight": post_norm,
    }


def grouped_query_attention(spec: ModelSpec) -> Table:
    """Return the attention of Llama, Qwen, Mixtral, GLM and gpt-oss, with the biases and norms that the model has."""
    attention = LAYER + "self_attn."
    query, key, value = (f"{attention}{x}_proj." for x in "qkv")
    table: Table = {
        "self_attention.linear_qkv.weight": Interleaved(query + "weight", key + "weight", value + "weight", bias=False),
        "self_attention.linear_proj.weight": Copy(
            attention + "o_proj.weight", (spec.hidden_size, spec.num_heads * spec.head_dim), 1
        ),
    }
    if spec.qkv_bias:
        table["self_attention.linear_qkv.bias"] = Interleaved(query + "bias", key + "bias", value + "bias", bias=True)
    if spec.output_bias:
        table["self_attention.linear_proj.bias"] = Copy(attention + "o_proj.bias", (spec.hidden_size,), None)
    if spec.attention_sinks:
        table["self_attention.core_attention.softmax_offset"] = Copy(attention + "sinks", (spec.num_heads,), 0)
    if spec.qk_norm:
        for x in "qk":
            table[f"self_attention.{x}_layernorm.weight"] = Copy(f"{attention}{x}_norm.weight", (spec.head_dim,), None)
    return table


def latent_attention(spec: ModelSpec, *, latent_split: bool) -> Table:
    """Return the latent attention of DeepSeek.

    With `latent_split` the projections to the latent vectors are divided by rows (Megatron's local modules). Without it
    every rank holds them whole (Transformer Engine).
    """
    assert spec.mla is not None, "called for latent attention only"
    mla, hidden, attention = spec.mla, spec.hidden_size, LAYER + "self_attn."
    axis = 0 if latent_split else None
    query_rows = spec.num_heads * (mla.nope_dim + mla.rope_dim)
    kv_norm = Copy(attention + "kv_a_layernorm.weight", (mla.kv_rank,), None)
    table: Table = {
        "self_attention.linear_kv_down_proj.weight": Copy(
            attention + "kv_a_proj_with_mqa.weight", (mla.kv_rank + mla.rope_dim, hidden), axis
        ),
        "self_attention.kv_layernorm.weight": kv_norm,
        "self_attention.linear_kv_up_proj.layer_norm_weight": kv_norm,
        "self_attention.linear_kv_up_proj.weight": Copy(
            attention + "kv_b_proj.weight", (spec.num_heads * (mla.nope_dim + mla.v_dim), mla.kv_rank), 0
        ),
        "self_attention.linear_proj.weight": Copy(attention + "o_proj.weight", (hidden, spec.num_heads * mla.v_dim), 1),
    }
    if mla.q_rank is None:
        table["self_attention.linear_q_proj.weight"] = Copy(attention + "q_proj.weight", (query_rows, hidden), 0)
        return table
    q_norm = Copy(attention + "q_a_layernorm.weight", (mla.q_rank,), None)
    return table | {
        "self_attention.linear_q_down_proj.weight": Copy(attention + "q_a_proj.weight", (mla.q_rank, hidden), axis),
        "self_attention.q_layernorm.weight": q_norm,
        "self_attention.linear_q_up_proj.layer_norm_weight": q_norm,
        "self_attention.linear_q_up_proj.weight": Copy(attention + "q_b_proj.weight", (query_rows, mla.q_rank), 0),
    }


def dense_mlp(spec: ModelSpec) -> Table:
    """Return gate, up and down projection."""
    return {f"mlp.{name}": rule for name, rule in _gated(LAYER + "mlp.", spec.ffn_size, spec.hidden_size).items()}


def experts(spec: ModelSpec) -> Table:
    """Return the router, the routed experts and the shared expert."""
    assert spec.moe is not None, "called for layers with experts only"
    moe, hidden = spec.moe, spec.hidden_size
    if moe.gate is not None:
        return _stacked_experts(moe, hidden)
    mixtral = spec.family == "mixtral"
    block = LAYER + ("block_sparse_moe." if mixtral else "mlp.")
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    one = _gated(block + "experts.{expert}.", moe.expert_ffn_size, hidden, names)
    table: Table = {"mlp.router.weight": Copy(block + "gate.weight", (moe.num_experts, hidden), None)}
    if moe.correction_bias:
        table["mlp.router.expert_bias"] = Copy(block + "gate.e_score_correction_bias", (moe.num_experts,), None)
    for name, rule in one.items():
        table[f"mlp.experts.local_experts.{{expert}}.{name}"] = rule
        table[f"mlp.experts.{name}{{expert}}"] = rule
    if moe.shared_ffn_size:
        for name, rule in _gated(block + "shared_experts.", moe.shared_ffn_size, hidden).items():
            table[f"mlp.shared_experts.{name}"] = rule
    return table


def _stacked_experts(moe: MoeSpec, hidden: int) -> Table:
    """Return the experts of gpt-oss; their tensors are divided by expert (policy/modules/clamped_experts.py)."""
    block, count, width = LAYER + "mlp.", moe.num_experts, moe.expert_ffn_size
    return {
        "mlp.router.weight": Copy(block + "router.weight", (count, hidden), None),
        "mlp.router.bias": Copy(block + "router.bias", (count,), None),
        "mlp.experts.gate_up.weight": Copy(block + "experts.gate_up_proj", (count, hidden, 2 * width), 0),
        "mlp.experts.gate_up.bias": Copy(block + "experts.gate_up_proj_bias", (count, 2 * width), 0),
        "mlp.experts.down.weight": Copy(block + "experts.down_proj", (count, width, hidden), 0),
        "mlp.experts.down.bias": Copy(block + "experts.down_proj_bias", (count, hidden), 0),
    }


def _gated(
    prefix: str, width: int, hidden: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Table:
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {
        "linear_fc1.weight": Stacked((gate, up), width, hidden),
        "linear_fc2.weight": Copy(down, (hidden, width), 1),
    }
