"""The formulas of models/flops.py against torch's FlopCounterMode on the real modules of every family, within 1 %.

The counter sees operations inside custom autograd functions too, but has no formula for a product that is added in
place (`addmm_`, the gradient of the head) and for torch's fused attention on CPU. The test gives it both; for attention
2 B n L L (d + e) for q [B, n, L, d] and values of size e. The kernel computes, or masks, the whole square of L x L; the
model's work is its causal half, L (L + 1) / 2 pairs. Rows have sequences of equal length and no padding, so that known
factors are the only difference (`square_of_the_kernel`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_mega.models.config_readers import read_spec
from grpo_mega.models.flops import attention_flops, weights_per_token
from grpo_mega.models.spec import ModelSpec
from grpo_mega.types import Microbatch
from tests.helpers.family_updates import FAMILY_MODELS, VARIANTS
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import LOSS, ONE, Recorded, open_policy, sample_groups
from tests.helpers.tiny_models import make_family_model

LENGTH, SEQUENCES = 32, 3
LONG = (*VARIANTS, "llama3-rope", "qwen2-yarn")  # "qwen3-tied" has the same operations, but for scaled positions
aten = torch.ops.aten


def row(vocab: int) -> Microbatch:
    """Return one row of three sequences of 32 random tokens, all of them trained on."""
    generator = torch.Generator().manual_seed(0)
    total = LENGTH * SEQUENCES
    tokens = torch.randint(2, vocab, (total,), generator=generator)
    return Microbatch(
        rollout_ids=tuple(range(SEQUENCES)),
        token_ids=tokens,
        position_ids=torch.arange(LENGTH).repeat(SEQUENCES),
        labels=tokens.roll(-1),
        loss_mask=torch.ones(total, dtype=torch.bool),
        cu_seqlens=torch.arange(SEQUENCES + 1, dtype=torch.int32) * LENGTH,
        advantages=torch.ones(total),
        token_weights=torch.full((total,), 1 / total),
        sampler_log_probs=torch.full((total,), -3.0),
        old_log_probs=torch.full((total,), -3.0),
        ref_log_probs=torch.full((total,), -3.0),
    )


def count(rank: int, recorded: Recorded) -> dict[str, dict[str, int]]:
    """Return the operations of a forward pass and of an update, in attention and outside of it."""
    spec = read_spec(recorded.model)
    policy = open_policy(rank, recorded, ONE)
    found: dict[str, dict[str, int]] = {}

    def fused(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        batch, heads, length, width = q
        return 2 * batch * heads * length * k[2] * (width + v[3])

    def fused_backward(_grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * fused(q, k, v)

    def added_product(_total: Any, left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    formulas = {
        aten.addmm_: added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: fused,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: fused_backward,
    }
    for name, run in (
        ("forward", lambda: policy.log_probs([row(spec.vocab_size)])),
        ("update", lambda: policy.backward([row(spec.vocab_size)], LOSS)),
    ):
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with counter:
            run()
        by_operation = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        attention = sum(
            n for op, n in by_operation.items() if "attention" in op or (spec.attention_sinks and "bmm" in op)
        )
        found[name] = {"attention": attention, "rest": sum(by_operation.values()) - attention}
    return found


def square_of_the_kernel(spec: ModelSpec) -> int:
    """Return the operations of the kernel: whole squares, values of latent attention padded to the size of keys, and a
    column for sinks."""
    key = spec.head_dim if spec.mla is None else spec.mla.nope_dim + spec.mla.rope_dim
    sink = int(spec.attention_sinks)
    return 2 * spec.num_layers * SEQUENCES * spec.num_heads * LENGTH * (LENGTH + sink) * (2 * key + sink)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in FAMILY_MODELS],
)
def test_the_formulas_count_what_the_modules_compute(name: str, rank_pool: RankPool, tmp_path: Path) -> None:
    config = FAMILY_MODELS[name] | {"vocab_size": 64}
    model = make_family_model(tmp_path / name, config, seed=1)
    groups, rewards = sample_groups(1, 2, 0, vocab=64)
    recorded = Recorded(model, groups, rewards, [], [], max_tokens=LENGTH * SEQUENCES)
    (counted,) = rank_pool.call(1, count, recorded)
    spec, lengths = read_spec(model), [LENGTH] * SEQUENCES
    tokens = LENGTH * SEQUENCES
    weights = weights_per_token(spec)
    assert counted["forward"]["rest"] == pytest.approx(2 * tokens * weights.total, rel=0.01)
    # the head computes its logits again in the backward pass
    assert counted["update"]["rest"] == pytest.approx(2 * tokens * (3 * weights.total + weights.head), rel=0.01)
    square = square_of_the_kernel(spec)
    assert counted["forward"]["attention"] == pytest.approx(square, rel=0.01)
    assert counted["update"]["attention"] == pytest.approx(3 * square, rel=0.01)
    if not spec.attention_sinks and spec.mla is None:
        assert attention_flops(spec, lengths) == pytest.approx(square * (LENGTH + 1) / (2 * LENGTH), rel=0.01)
