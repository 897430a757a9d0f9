"""Keys of a model's parameters in Megatron's distributed checkpoints.

A key names the whole tensor. Tensor-parallel shards are slices of the parameter that a single rank would have. If all
layers of a model are of one kind, they are slices of one tensor with a leading dimension ("decoder.layers.mlp...").
Otherwise the key contains the number of the layer. Experts add a dimension in the same way, in every module.
A norm before a projection has the name of Transformer Engine's fused module or its own name, which depends on the layer
and on the layer spec. If a loader can request both names, the checkpoint has both, for the same bytes.
Asserted by tests/e2e/test_convert_tools.py and test_convert_families.py against Megatron itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from grpo_mega.formats.byte_ranges import Shape
from grpo_mega.models.parameter_tables import parameter_names, parameter_placements, placements_aside
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import Placement

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.linear_fc[12]\.weight\d+$")
_INPUT, _FUSED_INPUT = "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"
_PRE_MLP, _FUSED_PRE_MLP = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"


@dataclass(frozen=True)
class MegatronTensor:
    """One parameter: the slice at `leading` of the tensor `key`, which has shape `leading_sizes + shape`.

    `placements` are its pieces in the parameter of a single rank. `also` are other keys of the same values. `aside` is
    True for a parameter that the model does not need.
    """

    key: str
    leading: Shape
    leading_sizes: Shape
    shape: Shape
    placements: tuple[Placement, ...]
    also: tuple[str, ...] = ()
    aside: bool = False


def megatron_tensors(spec: ModelSpec) -> list[MegatronTensor]:
    """Return the parameters of a checkpoint, with every Hugging Face tensor once (a tied head is the embedding)."""
    names = (n for n in parameter_names(spec) if not (spec.tie_embeddings and n == "output_layer.weight"))
    alone = Topology(1)
    at = alone.coordinates(0)
    named = [(name, parameter_placements(spec, name, alone, at)) for name in names if not _GROUPED_EXPERT.search(name)]
    aside = [(name, placed) for name, placed in placements_aside(spec) if not _GROUPED_EXPERT.search(name)]
    alike = len({spec.is_moe_layer(layer) for layer in range(spec.num_layers)}) == 1
    found: dict[tuple[Placement, ...], list[str]] = {}
    for name, placed in (*named, *aside):
        same = tuple(Placement(p.hf, type(p.local)("", p.local.offsets, p.local.shape)) for p in placed)
        found.setdefault(same, []).append(name)
    return [_tensor_of(spec, _requested_names(spec, group), pieces, alike) for pieces, group in found.items()]


def extra_state_keys(spec: ModelSpec, tensors: list[MegatronTensor]) -> list[str]:
    """Return the keys of the empty objects that Megatron's linear and attention modules load."""
    keys = {"decoder.final_layernorm._extra_state/shard_0_1"}
    for tensor in tensors:
        module = tensor.key.removesuffix(".weight")
        if module == tensor.key or ".layers." not in tensor.key:
            continue
        where = ".".join(map(str, tensor.leading or (0,)))
        sizes = ".".join(map(str, tensor.leading_sizes or (1,)))
        if module.rpartition(".")[2].startswith("linear_"):
            attention = re.sub(r"\.self_attention\..*", ".self_attention.core_attention", module)
            keys |= {f"{m}._extra_state/shard_{where}_{sizes}" for m in (module, attention)}
        if module.endswith(".eh_proj"):
            keys.add(f"{module}._extra_state/shard_{where}_{sizes}")
    return sorted(keys)


def _requested_names(spec: ModelSpec, names: list[str]) -> list[str]:
    """Remove the names of norms that no layer spec of Megatron uses for such a layer.

    Transformer Engine fuses a norm with the projection after it if there is one projection: not before latent
    attention, and not before experts. Local modules do not fuse them. They save under the fused names nevertheless,
    except for latent attention (gpt_layer_specs.py:417).
    """
    found = _LAYER.match(names[0])
    moe = spec.is_moe_layer(int(found[1])) if found else spec.moe is not None
    latent = spec.mla is not None
    unknown = [_FUSED_INPUT if latent else _INPUT]
    unknown += [_FUSED_PRE_MLP] if latent and moe else []
    unknown += [_PRE_MLP] if not latent and not moe else []
    return [name for name in names if not name.endswith(tuple(f".{other}" for other in unknown))]


def _tensor_of(spec: ModelSpec, group: list[str], pieces: tuple[Placement, ...], alike: bool) -> MegatronTensor:
    shape = tuple(max(p.local.offsets[d] + p.local.shape[d] for p in pieces) for d in range(len(pieces[0].local.shape)))
    keys: list[str] = []
    leading: Shape = ()
    sizes: Shape = ()
    for name in group:
        key, leading, sizes = _key_of(spec, name, alike)
        keys.append(key)
    return MegatronTensor(
        keys[0], leading, sizes, shape, pieces, tuple(keys[1:]), aside=group[0].startswith("mtp.layers.")
    )


def _key_of(spec: ModelSpec, name: str, alike: bool) -> tuple[str, Shape, Shape]:
    leading: Shape = ()
    sizes: Shape = ()
    layer, expert = _LAYER.match(name), _EXPERT.search(name)
    if layer and alike:
        name = _LAYER.sub("decoder.layers.", name)
        leading, sizes = (int(layer[1]),), (spec.num_layers,)
    if expert:
        assert spec.moe is not None, name
        name = _EXPERT.sub(".experts.", name)
        leading, sizes = (*leading, int(expert[1])), (*sizes, spec.moe.num_experts)
    return name, leading, sizes
