"""Under which keys Megatron's distributed checkpoints hold the parameters of a model.

A key names the whole tensor: tensor-parallel shards are boxes of the parameter that one rank would have, and the layers
of a model whose layers are all alike are slices of one tensor with a leading dimension ("decoder.layers.mlp..."). A
model of unlike layers has the layer's number in the key. Experts add a dimension in the same way. The norms before
attention and feed-forward go by the names of Transformer Engine's fused modules in both of Megatron's layer specs.
Asserted by tests/unit/test_megatron_keys.py and by tests/e2e/test_convert_tools.py against Megatron itself.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from grpo_mega.convert.families import parameter_names, parameter_placements
from grpo_mega.convert.ranges import Shape
from grpo_mega.convert.spec import ModelSpec
from grpo_mega.types import Placement

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
# Megatron's local layers save these under the names of Transformer Engine's fused ones (gpt_layer_specs.py:417)
_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True)
class MegatronTensor:
    """One parameter: box `leading` + all of `shape` of the tensor `key`, which is of shape `leading_sizes + shape`.

    `placements` are its pieces in the parameter of a single rank. `also` are other keys for the same numbers.
    """

    key: str
    leading: Shape
    leading_sizes: Shape
    shape: Shape
    placements: tuple[Placement, ...]
    also: tuple[str, ...] = ()


def megatron_tensors(spec: ModelSpec) -> list[MegatronTensor]:
    """What a checkpoint of `spec` holds: every Hugging Face tensor exactly once (a tied head is the embedding)."""
    names = [n for n in parameter_names(spec) if not (spec.tie_embeddings and n == "output_layer.weight")]
    counts = Counter(_LAYER.sub("decoder.layers.", name) for name in names if _LAYER.match(name))
    alike = all(count == spec.num_layers for count in counts.values())
    found: dict[tuple[Placement, ...], list[str]] = {}
    for name in names:
        placed = parameter_placements(spec, name, 1, 0)
        same = tuple(Placement(p.hf, type(p.local)("", p.local.offsets, p.local.shape)) for p in placed)
        found.setdefault(same, []).append(name)
    return [_tensor_of(spec, group, pieces, alike) for pieces, group in found.items()]


def extra_state_keys(spec: ModelSpec, tensors: list[MegatronTensor]) -> list[str]:
    """Empty objects that Megatron's linear and attention modules ask for when they load."""
    keys = {"decoder.final_layernorm._extra_state/shard_0_1"}
    for tensor in tensors:
        module = tensor.key.removesuffix(".weight")
        if module == tensor.key or not tensor.key.startswith("decoder.layers.") or ".experts." in module:
            continue
        if module.rpartition(".")[2].startswith("linear_"):
            where, size = (tensor.leading or (0,))[0], (tensor.leading_sizes or (1,))[0]
            attention = re.sub(r"\.self_attention\..*", ".self_attention.core_attention", module)
            keys |= {f"{m}._extra_state/shard_{where}_{size}" for m in (module, attention)}
    return sorted(keys)


def _tensor_of(spec: ModelSpec, group: list[str], pieces: tuple[Placement, ...], alike: bool) -> MegatronTensor:
    shape = tuple(max(p.local.offsets[d] + p.local.shape[d] for p in pieces) for d in range(len(pieces[0].local.shape)))
    keys: list[str] = []
    leading: Shape = ()
    sizes: Shape = ()
    for name in group:
        key, leading, sizes = _key_of(spec, name, alike)
        keys.append(key)
    fused = {k.replace(plain, known) for k in keys for plain, known in _FUSED.items() if plain in k}
    if alike and not any(".experts." in n or "_down_proj" in n for n in group):
        keys = [k for k in keys if not any(plain in k for plain in _FUSED)] or sorted(fused)
    return MegatronTensor(keys[0], leading, sizes, shape, pieces, tuple(sorted({*keys[1:], *fused} - {keys[0]})))


def _key_of(spec: ModelSpec, name: str, alike: bool) -> tuple[str, Shape, Shape]:
    leading: Shape = ()
    sizes: Shape = ()
    layer, expert = _LAYER.match(name), _EXPERT.search(name)
    if layer and alike:
        name = _LAYER.sub("decoder.layers.", name)
        leading, sizes = (int(layer[1]),), (spec.num_layers,)
    if expert:
        name = _EXPERT.sub(".experts.", name)
        leading, sizes = (*leading, int(expert[1])), (*sizes, int(getattr(spec, "num_experts", 0)))
    return name, leading, sizes
