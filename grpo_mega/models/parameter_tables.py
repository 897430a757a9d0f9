"""Tables of Megatron parameter -> rule for every model family, used by loading, saving, weight sync and planning.

A family is supported when its logits equal those of `transformers` in every layout (tests/parallel/test_update.py and
test_families.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from grpo_mega.models.layer_tables import (
    LAYER,
    Table,
    dense_mlp,
    experts,
    grouped_query_attention,
    latent_attention,
    norms,
)
from grpo_mega.models.placement_rules import Copy, Rule, Shape, Vocabulary, placements
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Coordinates, Topology
from grpo_mega.types import Placement

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\.experts\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")
_STACKED = re.compile(r"\.experts\.(gate_up|down)\.(weight|bias)$")


def parameter_placements(
    spec: ModelSpec,
    parameter: str,
    topology: Topology,
    at: Coordinates,
    *,
    latent_split: bool = True,
) -> list[Placement]:
    """Return the pieces of `parameter` on a rank; layers and experts are numbered through the whole model.

    Args:
        spec: the model.
        parameter: Megatron's name; the router's `expert_bias`, which is a buffer, counts as a parameter.
        topology: tp divides a dense layer, etp an expert, ep the experts that are stacked in one parameter.
        at: the coordinates of the rank.
        latent_split: see `latent_attention`.

    Raises:
        KeyError: the parameter is not in the table of the family.
    """
    found = _LAYER.match(parameter)
    if found is None:
        return placements(_outer_table(spec)[parameter], spec, parameter, topology.tp, at.tp_rank)
    layer, name = int(found[1]), parameter[found.end() :]
    table = _layer_table(spec, spec.is_moe_layer(layer), latent_split)
    numbered = _EXPERT.search("." + name)
    if numbered is None:
        shared = (topology.ep, at.ep_rank) if _STACKED.search(parameter) else (topology.tp, at.tp_rank)
        return placements(table[name], spec, parameter, *shared, layer=layer)
    rule = table[_EXPERT.sub("{expert}", "." + name)[1:]]
    return placements(rule, spec, parameter, topology.etp, at.etp_rank, layer=layer, expert=int(numbered[0]))


def parameter_names(spec: ModelSpec) -> Iterator[str]:
    """Yield all names, with layers and experts numbered through the model; several names can be the same tensor."""
    yield from _outer_table(spec)
    for layer in range(spec.num_layers):
        for name in _layer_table(spec, spec.is_moe_layer(layer), True):
            count = spec.moe.num_experts if spec.moe is not None and "{expert}" in name else 1
            for expert in range(count):
                yield f"decoder.layers.{layer}.{name.format(expert=expert)}"


def hf_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the shape of every tensor that is used: embedding, layers in order, final norm, head."""
    return dict(_shapes(spec))  # a copy, because some callers add to it


@functools.lru_cache(maxsize=4)
def _shapes(spec: ModelSpec) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, rule in _outer_table(spec).items():
        if name == "decoder.final_layernorm.weight":
            for layer in range(spec.num_layers):
                shapes |= _layer_shapes(spec, layer, moe=spec.is_moe_layer(layer))
        shapes |= rule.hf_shapes(spec)
    return shapes


def hf_shapes_aside(spec: ModelSpec) -> dict[str, Shape]:
    """Return the shapes of the multi-token-prediction layers, which a checkpoint can hold beside `hf_shapes`."""
    shapes: dict[str, Shape] = {}
    for layer in range(spec.num_layers, spec.num_layers + spec.num_mtp_layers):
        first, last = _mtp_tables(spec)
        for rule in first.values():
            shapes |= _filled(rule, spec, layer, 0)
        shapes |= _layer_shapes(spec, layer, moe=spec.moe is not None)
        for rule in last.values():
            shapes |= _filled(rule, spec, layer, 0)
    return shapes


def placements_aside(spec: ModelSpec) -> Iterator[tuple[str, list[Placement]]]:
    """Yield each parameter of the multi-token-prediction layers with its pieces, for a single rank.

    Several names can be the same tensor. Megatron has these names except `embed_tokens` and `shared_head`, because its
    layers share those of the model.
    """
    for depth in range(spec.num_mtp_layers):
        layer, prefix = spec.num_layers + depth, f"mtp.layers.{depth}."
        for table in _mtp_tables(spec):
            for name, rule in table.items():
                yield prefix + name, placements(rule, spec, prefix + name, 1, 0, layer=layer)
        for name, rule in _layer_table(spec, spec.moe is not None, True).items():
            for expert in range(spec.moe.num_experts if spec.moe is not None and "{expert}" in name else 1):
                parameter = f"{prefix}transformer_layer.{name.format(expert=expert)}"
                yield parameter, placements(rule, spec, parameter, 1, 0, layer=layer, expert=expert)


def keeps_float32(hf_name: str) -> bool:
    """Return True if this tensor is float32 in every checkpoint."""
    return hf_name.endswith(".e_score_correction_bias")


def is_expert_parameter(parameter: str) -> bool:
    """Return True if this Megatron parameter belongs to a routed expert."""
    return _EXPERT.search(parameter) is not None or _STACKED.search(parameter) is not None


def number_expert(parameter: str, first: int) -> str:
    """Return the name with its expert number increased by `first`, so that it counts through the whole model.

    Megatron numbers the experts of a rank from 0. Names without an expert are not changed.
    """
    return _EXPERT.sub(lambda found: str(int(found[0]) + first), parameter)


@functools.lru_cache(maxsize=8)
def _outer_table(spec: ModelSpec) -> Table:
    return {
        "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": Copy("model.norm.weight", (spec.hidden_size,), None),
        # a tied head is a parameter of its own on the last of several pipeline stages
        "output_layer.weight": Vocabulary("model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight"),
    }


@functools.lru_cache(maxsize=32)
def _layer_table(spec: ModelSpec, moe: bool, latent_split: bool) -> Table:
    attention = grouped_query_attention(spec) if spec.mla is None else latent_attention(spec, latent_split=latent_split)
    return norms(spec) | attention | (experts(spec) if moe else dense_mlp(spec))


def _mtp_tables(spec: ModelSpec) -> tuple[Table, Table]:
    """Return the parameters before the transformer layer and after it.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2.
    """
    hidden = (spec.hidden_size,)
    return (
        {
            "embed_tokens.weight": Vocabulary(LAYER + "embed_tokens.weight"),
            "enorm.weight": Copy(LAYER + "enorm.weight", hidden, None),
            "hnorm.weight": Copy(LAYER + "hnorm.weight", hidden, None),
            "eh_proj.weight": Copy(LAYER + "eh_proj.weight", (spec.hidden_size, 2 * spec.hidden_size), 0),
        },
        {
            "final_layernorm.weight": Copy(LAYER + "shared_head.norm.weight", hidden, None),
            "shared_head.weight": Vocabulary(LAYER + "shared_head.head.weight"),
        },
    )


def _layer_shapes(spec: ModelSpec, layer: int, *, moe: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, rule in _layer_table(spec, moe, True).items():
        if "{expert}" not in name:
            shapes |= _filled(rule, spec, layer, 0)
        elif "local_experts" in name and "linear_fc1" in name:  # once per expert, so that its tensors are adjacent
            down = _layer_table(spec, moe, True)[name.replace("linear_fc1", "linear_fc2")]
            for expert in range(spec.moe.num_experts if spec.moe is not None else 0):
                shapes |= _filled(rule, spec, layer, expert) | _filled(down, spec, layer, expert)
    return shapes


def _filled(rule: Rule, spec: ModelSpec, layer: int, expert: int) -> dict[str, Shape]:
    return {name.format(layer=layer, expert=expert): shape for name, shape in rule.hf_shapes(spec).items()}
