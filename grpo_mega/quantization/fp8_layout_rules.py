"""Rules of layouts for FP8 engines: no rank of policy or engine may hold a part of a 128 x 128 block of a weight.

They are checked by arithmetic before a run starts. The engine's rules are those of vLLM 0.32
(quantization/utils/fp8_utils.py, `validate_fp8_block_shape` and `validate_fp8_block_shape_moe`). If a matrix is divided
over ranks, each part must be whole blocks. If matrices are fused on one rank, all but the last must be whole blocks.
Asserted by tests/unit/quantization/test_fp8_layout_rules.py, against vLLM itself by tests/engine/test_vllm_fp8.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from grpo_mega.config.policy_sections import ParallelConfig
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.rank_slices import policy_slices
from grpo_mega.models.spec import ModelSpec
from grpo_mega.parallel.topology import Topology
from grpo_mega.quantization.fp8_checkpoint import BLOCK, scale_slices
from grpo_mega.types import UserError


@dataclass(frozen=True)
class EngineGrid:
    """The ranks of one engine: `dp` copies of the attention, each divided over `tp` ranks.

    With `experts_spread` each expert is whole on one rank; without it every expert is divided over all ranks.
    """

    tp: int
    dp: int = 1
    experts_spread: bool = False


def check_fp8_layout(
    spec: ModelSpec, parallel: ParallelConfig, engine: EngineGrid, *, latent_split: bool, where: str
) -> None:
    """Check the layout of a run with engine.fp8.

    Args:
        spec: the model.
        parallel: the policy's layout, which divides the model.
        engine: the ranks of the engine, which divide the model.
        latent_split: see `latent_attention` in models/layer_tables.py.
        where: what messages call the model.

    Raises:
        UserError: a block would not be whole; the message names the key and the model's number.
    """
    if spec.moe is not None and spec.moe.gate is not None:
        raise UserError(
            f"engine.fp8 is not supported with the experts of {where}, which are stacked and have biases",
            remedy="leave it out",
        )
    for name, rows, is_expert in _engine_rows(spec, engine):
        if rows % BLOCK:
            remedy = "use a smaller engine.tp" if engine.tp > 1 else "leave engine.fp8 out"
            ranks = f"engine.tp={engine.tp}" + (f" and engine.dp={engine.dp}" if engine.dp > 1 else "")
            if is_expert and not engine.experts_spread and engine.tp * engine.dp > 1:
                remedy += f", or engine.ep={engine.tp * engine.dp}"
            raise UserError(
                f"engine.fp8 with {ranks}: the {name} of {where} {'are' if name[-1] == 's' else 'is'} "
                f"{rows} on a rank of the engine, which must be a multiple of {BLOCK}",
                remedy=f"{remedy}",
            )
    check_policy_blocks(spec, parallel.tp, parallel.etp, latent_split=latent_split)


def _engine_rows(spec: ModelSpec, engine: EngineGrid) -> Iterator[tuple[str, int, bool]]:
    """Yield (name, size on a rank, belongs to experts) of every size that must be whole blocks."""
    tp = engine.tp
    heads = spec.num_heads // tp
    if spec.mla is not None:
        if spec.mla.q_rank is not None:  # fused with the latent of keys and values
            yield "q_lora_rank", spec.mla.q_rank, False
        if tp > 1:
            yield "query heads", heads * (spec.mla.nope_dim + spec.mla.rope_dim), False
            yield "key and value heads", heads * (spec.mla.nope_dim + spec.mla.v_dim), False
            yield "value heads", heads * spec.mla.v_dim, False
    else:
        yield "query heads", heads * spec.head_dim, False
        yield "key-value heads", max(1, spec.num_kv_heads // tp) * spec.head_dim, False
    if spec.moe is None or not all(spec.moe.layers):
        yield "feed-forward size", spec.ffn_size // tp, False
    if spec.moe is not None:
        ways = 1 if engine.experts_spread else tp * engine.dp
        yield "feed-forward size of each expert", spec.moe.expert_ffn_size // ways, True
        if spec.moe.shared_ffn_size:  # not divided if copies with latent attention share the experts
            whole = spec.mla is not None and engine.dp > 1 and engine.experts_spread
            yield "feed-forward size of the shared expert", spec.moe.shared_ffn_size // (1 if whole else tp), False


@functools.lru_cache(maxsize=64)
def check_policy_blocks(spec: ModelSpec, tp: int, etp: int, *, latent_split: bool) -> None:
    """Check that no rank of the policy holds a part of an FP8 block; `latent_split` as in `check_fp8_layout`.

    Stages differ only in the numbers of layers and experts, so one stage with one expert per rank is checked.

    Raises:
        UserError: a rank would hold a part of a block (names tensor and block).
    """
    experts = spec.moe.num_experts if spec.moe is not None else 1
    one_stage = ParallelConfig(tp=tp, etp=etp, ep=experts)
    ranks = Topology(tp * etp * experts, tp=tp, etp=etp, ep=experts)
    shapes = hf_shapes(spec)
    for rank in range(max(tp, etp)):
        slices = policy_slices(spec, one_stage, ranks, ranks.coordinates(rank), latent_split=latent_split)
        for _ in scale_slices(shapes, slices):
            pass
