"""An update is the same in every layout, and the same as plain autograd and AdamW on the transformers model.

The tests compare losses, gradient norms, log-probs, entropies and all weights over three updates. They also cover any
split of the batch, bf16, and losses that are not finite.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from grpo_mega.parallel.pipeline_split import stage_layers
from grpo_mega.types import Microbatch, UpdateStats
from tests.helpers.packing import pack
from tests.helpers.recorded_rollouts import (
    LOSS,
    ONE,
    OPTIMIZER,
    OVERLAP,
    TEMPERATURES,
    Layout,
    RankRecord,
    Recorded,
    as_array,
    as_row,
    make_rows,
    open_policy,
    optimizer_moments,
    shard_digests,
    torch_optimizers,
    with_recorded,
)
from tests.parallel.conftest import CASES, MODELS, Laboratory, every_case


def values_by_rollout(records: list[RankRecord], of: str, temperature: float = 1.0) -> list[dict[int, list[float]]]:
    """Return the values of each rank of the last stage: rollout -> entropies (`of="entropy"`) or log-probs."""
    return [r.entropy if of == "entropy" else r.log_probs[temperature] for r in records if r.is_last_stage]


def largest_difference(found: list[dict[int, list[float]]], expected: list[list[float]]) -> float:
    assert {i for rank in found for i in rank} == set(range(len(expected))), "every rollout is on some rank"
    return max(
        float(np.abs(np.array(values) - np.array(expected[i])).max()) for rank in found for i, values in rank.items()
    )


@every_case
def test_log_probs_equal_those_of_transformers(laboratory: Laboratory, model: str, layout: Layout) -> None:
    records, expected = laboratory.run(model, layout), laboratory.expected(model)
    for temperature in TEMPERATURES:
        found = values_by_rollout(records, "log_probs", temperature)
        assert largest_difference(found, expected.log_probs[temperature]) <= 2e-5
    cold, hot = (expected.log_probs[t][0] for t in (0.7, 1.0))
    assert abs(cold[0] - hot[0]) > 1e-3, "the log-probs do not depend on the temperature"


@every_case
def test_entropies_equal_those_of_transformers(laboratory: Laboratory, model: str, layout: Layout) -> None:
    records, expected = laboratory.run(model, layout), laboratory.expected(model)
    assert largest_difference(values_by_rollout(records, "entropy"), expected.entropy) <= 2e-5


@every_case
def test_losses_and_gradient_norms_equal_autograd_over_three_updates(
    laboratory: Laboratory, model: str, layout: Layout
) -> None:
    expected = laboratory.expected(model)
    for record in laboratory.run(model, layout):
        for update, stats in enumerate(record.stats):
            assert abs(stats.sums["loss"] - expected.losses[update]) <= 1e-5 * stats.sums["loss_magnitude"]
            assert stats.grad_norm == pytest.approx(expected.grad_norms[update], rel=1e-5)
            assert stats.grad_norm > OPTIMIZER.clip_grad, "the gradient is not clipped"
            assert stats.sums["clip_fraction"] == pytest.approx(expected.clip_fractions[update], abs=1e-5)
            assert stats.sums["kl"] == pytest.approx(expected.kls[update], rel=1e-5)
            assert stats.sums["clip_fraction"] > 0.01
            assert stats.sums["kl"] > 0.01
            assert stats.learning_rate == OPTIMIZER.lr
            assert sum(stats.ratio_counts) == sum(map(len, expected.log_probs[1.0]))  # one ratio per loss token
            assert np.count_nonzero(stats.ratio_counts) > 5


@every_case
def test_weights_equal_those_of_adamw_after_each_of_three_updates(
    laboratory: Laboratory, model: str, layout: Layout
) -> None:
    tensors, expected = laboratory.run(model, layout)[0].tensors, laboratory.expected(model).tensors
    one = laboratory.run(model, ONE)[0].tensors
    for update in range(len(expected)):
        assert tensors[update].keys() == expected[update].keys()
        for name, wanted in expected[update].items():
            # Weights are around 0.15 to 1, one rounding of which is 1e-8 to 6e-8; a step is up to 1e-2.
            assert np.abs(tensors[update][name] - wanted.numpy()).max() <= 1e-6, (update, name)
            assert np.abs(tensors[update][name] - one[update][name]).max() <= 1e-6, (update, name)
            if update:
                assert (expected[update][name] - expected[update - 1][name]).abs().max() > 1e-4, (update, name)


@every_case
def test_the_gradient_of_every_tensor_equals_autograd(laboratory: Laboratory, model: str, layout: Layout) -> None:
    found, expected = laboratory.run(model, layout)[0].gradients, laboratory.expected(model).gradients[0]
    assert list(found) == list(laboratory.run(model, layout)[0].tensors[0])
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert np.linalg.norm(found[name] - wanted.numpy()) <= 1e-5 * np.linalg.norm(wanted.numpy()), name


def test_all_ranks_report_the_same_update(laboratory: Laboratory) -> None:
    for model, layout in CASES:
        records = laboratory.run(model, layout)
        assert all(record.stats == records[0].stats for record in records), str(layout)
        assert len({record.num_microbatches for record in records}) == 1


def elements_of_rank(shapes: dict[str, torch.Size], model: str, layout: Layout, pp_rank: int) -> int:
    """Return the number of elements of a pipeline rank, counted from Hugging Face names and shapes."""
    tied, stages = MODELS[model].tied, stage_layers(MODELS[model].num_layers, layout.parallel, model)
    layers = set(chain.from_iterable(stages[pp_rank :: layout.pp]))
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    padded_rows = math.ceil(21 / layout.tp)
    total = 0
    for name, shape in shapes.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            here = first if name == "model.embed_tokens.weight" else last
            copies = 1 if here or (tied and last) else 0
            total += copies * padded_rows * shape[1]
        elif name == "model.norm.weight":
            total += shape.numel() if last else 0
        elif int(name.split(".")[2]) in layers:
            total += shape.numel() // (1 if "norm" in name else layout.tp)
    return total


@every_case
def test_a_rank_holds_its_part_of_the_model_and_of_the_optimizer(
    laboratory: Laboratory, model: str, layout: Layout
) -> None:
    shapes = {name: tensor.shape for name, tensor in laboratory.expected(model).tensors[0].items()}
    copies = layout.topology.dp * layout.cp  # copies of each weight, which share its optimizer state
    for rank, record in enumerate(laboratory.run(model, layout)):
        at = layout.topology.coordinates(rank)
        elements = elements_of_rank(shapes, model, layout, at.pp_rank)
        assert record.param_bytes == 4 * elements
        padding = 4 * 1024  # Megatron rounds its flat buffers up
        assert 4 * elements <= record.main_grad_bytes <= 4 * elements + padding
        assert record.moment_bytes <= 8 * elements / copies + padding
    moments_of_one_shard = sum(
        record.moment_bytes
        for rank, record in enumerate(laboratory.run(model, layout))
        if layout.topology.coordinates(rank).tp_rank == 0
    )
    stages = [elements_of_rank(shapes, model, layout, stage) for stage in range(layout.pp)]
    assert moments_of_one_shard == 8 * sum(stages), "each element has its two moments on exactly one data-parallel rank"


def run_one_update(rank: int, recorded: Recorded, layout: Layout) -> tuple[UpdateStats, dict[str, Any], int]:
    policy = open_policy(rank, recorded, layout)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    stats, _ = policy.update(batch.microbatches, LOSS, OPTIMIZER.lr)
    return stats, {name: as_array(t) for name, t in policy.full_tensors(1 << 28)}, len(batch.microbatches)


def assert_same_update(found: tuple[UpdateStats, dict[str, Any]], wanted: RankRecord) -> None:
    stats, tensors = found
    assert abs(stats.sums["loss"] - wanted.stats[0].sums["loss"]) <= 1e-5 * stats.sums["loss_magnitude"]
    assert stats.grad_norm == pytest.approx(wanted.stats[0].grad_norm, rel=1e-5)
    for name, tensor in tensors.items():
        assert np.abs(tensor - wanted.tensors[1][name]).max() <= 1e-6, name


@pytest.mark.parametrize("layout", [ONE, Layout(2), Layout(2, pp=2)], ids=str)
def test_the_token_budget_of_a_microbatch_does_not_change_the_gradient(laboratory: Laboratory, layout: Layout) -> None:
    recorded, wanted = laboratory.recorded("qwen3"), laboratory.run("qwen3", ONE)[0]
    counts = []
    for max_tokens in (20, 4096):
        stats, tensors, count = laboratory.pool.call(
            layout.world, run_one_update, replace(recorded, max_tokens=max_tokens), layout
        )[0]
        assert_same_update((stats, tensors), wanted)
        counts.append(count)
    assert counts[0] >= 4
    assert counts[1] == 1


def make_uneven_rows(rank: int, recorded: Recorded, layout: Layout, shares: list[list[list[int]]]) -> list[Microbatch]:
    """Return rows with the weights and advantages that `build_batch` gives the whole batch in one row.

    `shares[dp_rank]`: the rollouts of each microbatch of that rank.
    """
    (whole,) = make_rows(0, replace(recorded, max_tokens=4096), ONE).microbatches
    first = dict(zip(whole.rollout_ids, whole.cu_seqlens.tolist(), strict=False))
    prompts = {i: len(recorded.groups.rollouts[i].prompt.token_ids) for i in whole.rollout_ids}
    weight = {i: float(whole.token_weights[first[i] + prompts[i] - 1]) for i in whole.rollout_ids}
    advantage = {i: float(whole.advantages[first[i] + prompts[i] - 1]) for i in whole.rollout_ids}
    rows = []
    for ids in shares[layout.topology.coordinates(rank).dp_rank]:
        rollouts = [(i, recorded.groups.rollouts[i]) for i in ids]
        rows.append(
            pack(
                rollouts,
                row_tokens=len(whole.token_ids),
                advantages=[advantage[i] for i in ids],
                token_weights=[weight[i] for i in ids],
                pad_id=0,
            )
        )
    return rows


def run_uneven_update(
    rank: int, recorded: Recorded, layout: Layout, shares: list[list[list[int]]]
) -> tuple[UpdateStats, dict[str, Any], list[int]]:
    policy = open_policy(rank, recorded, layout)
    rows = [
        replace(m, old_log_probs=as_row(recorded.old, m), ref_log_probs=as_row(recorded.ref, m))
        for m in make_uneven_rows(rank, recorded, layout, shares)
    ]
    stats, _ = policy.update(rows, LOSS, OPTIMIZER.lr)
    tokens = [m.num_loss_tokens for m in rows]
    return stats, {name: as_array(t) for name, t in policy.full_tensors(1 << 28)}, tokens


@pytest.mark.parametrize("layout", [Layout(2), Layout(4, pp=2)], ids=str)
def test_ranks_with_five_and_two_microbatches_and_one_without_a_loss_token_give_the_same_update(
    laboratory: Laboratory, layout: Layout
) -> None:
    recorded, wanted = laboratory.recorded("qwen3"), laboratory.run("qwen3", ONE)[0]
    everything = list(range(16))
    five_and_two = [[[0], [1, 2], [3], [4, 5, 6], [7, 8]], [[9, 10, 11], [12, 13, 14, 15], [], [], []]]
    all_and_none = [[everything[:8], everything[8:]], [[], []]]
    empty_rows = []
    for shares in (five_and_two, all_and_none):
        answers = laboratory.pool.call(layout.world, run_uneven_update, recorded, layout, shares)
        for stats, tensors, _ in answers:
            assert_same_update((stats, tensors), wanted)
        empty_rows.append([tokens.count(0) for _, _, tokens in answers])
    assert sorted(set(empty_rows[0])) == [0, 3]
    assert sorted(set(empty_rows[1])) == [0, 2]


def run_update_with_nan(rank: int, recorded: Recorded, layout: Layout, bad_dp_rank: int) -> dict[str, Any]:
    policy = open_policy(rank, recorded, layout)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    good = batch.microbatches
    poisoned = good[1].advantages.clone()
    poisoned[good[1].loss_mask.nonzero()[0]] = math.nan
    is_bad = policy.ranks.at.dp_rank == bad_dp_rank
    bad = [good[0], replace(good[1], advantages=poisoned), *good[2:]] if is_bad else good
    before = shard_digests(policy)
    message = ""
    try:
        policy.update(bad, LOSS, OPTIMIZER.lr)
    except RuntimeError as error:
        message = str(error)
    skipped, _ = policy.update(bad, LOSS, OPTIMIZER.lr, lambda stats: stats.fault is None)
    unchanged = shard_digests(policy) == before
    stats, _ = policy.update(good, LOSS, OPTIMIZER.lr, lambda stats: stats.fault is None)
    return {"message": message, "unchanged": unchanged, "skipped": skipped, "stats": stats}


@pytest.mark.parametrize("layout", [Layout(2), Layout(8, tp=2, pp=2)], ids=str)
def test_a_nonfinite_loss_raises_on_all_ranks_with_rank_and_microbatch_and_keeps_the_weights(
    laboratory: Laboratory, layout: Layout
) -> None:
    answers = laboratory.pool.call(layout.world, run_update_with_nan, laboratory.recorded("qwen3"), layout, 1)
    failing_ranks = [
        rank
        for rank in range(layout.world)
        if (at := layout.topology.coordinates(rank)).dp_rank == 1 and at.pp_rank == layout.pp - 1
    ]
    allowed = {f"the loss of microbatch 1 on rank {rank} is not finite; no update was made" for rank in failing_ranks}
    messages = {answer["message"] for answer in answers}
    assert len(messages) <= layout.tp  # each tensor-parallel rank reports the error of its own replica
    assert messages <= allowed
    assert all(answer["unchanged"] for answer in answers)
    skipped = [answer["skipped"] for answer in answers]
    assert {(each.is_made, f"{each.fault}; no update was made") for each in skipped} <= {(False, m) for m in allowed}
    bad_rows = [(1,) if rank in failing_ranks else () for rank in range(layout.world)]
    assert [each.non_finite_rows for each in skipped] == bad_rows
    wanted = laboratory.run("qwen3", layout)[0].stats[0]
    assert all(answer["stats"] == wanted for answer in answers), (
        "the next update differs from an update without a failure"
    )


def run_in_bf16(rank: int, recorded: Recorded, layout: Layout) -> dict[str, Any]:
    policy = open_policy(rank, recorded, layout)
    rows = make_rows(rank, recorded, layout)
    values = policy.log_probs(rows.microbatches)
    stats, _ = policy.update(with_recorded(rows, recorded).microbatches, LOSS, OPTIMIZER.lr)
    masters = [p for adam in torch_optimizers(policy) for group in adam.param_groups for p in group["params"]]
    return {
        "log_probs": {} if values is None else rows.completion_values(values).by_rollout(),
        "stats": stats,
        "params": {p.dtype for p in policy.parts.parameters},
        "grads": {p.main_grad.dtype for p in policy.parts.parameters},
        "masters": {p.dtype for p in masters},
        "moments": {m.dtype for m in optimizer_moments(policy)},
    }


def test_bf16_keeps_gradients_masters_and_moments_in_fp32_and_agrees_between_layouts(laboratory: Laboratory) -> None:
    recorded, expected = replace(laboratory.recorded("qwen3"), dtype="bf16"), laboratory.expected("qwen3")
    losses = []
    for layout in (ONE, Layout(4, tp=2, pp=2)):
        answers = laboratory.pool.call(layout.world, run_in_bf16, recorded, layout)
        for answer in answers:
            assert answer["params"] == {torch.bfloat16}
            assert answer["grads"] == answer["masters"] == answer["moments"] == {torch.float32}
        losses.append(answers[0]["stats"].sums["loss"])
        found = [answer["log_probs"] for answer in answers]
        assert 1e-5 < largest_difference(found, expected.log_probs[1.0]) <= 0.1
    assert abs(losses[0] - losses[1]) <= 5e-3


def run_with_reference(rank: int, recorded: Recorded, layout: Layout) -> dict[str, Any]:
    policy = open_policy(rank, recorded, layout, with_reference=True)
    rows = make_rows(rank, recorded, layout)

    def reference_log_probs() -> list[torch.Tensor] | None:
        with policy.reference():
            return policy.log_probs(rows.microbatches)

    def state() -> tuple[dict[str, int], list[int]]:
        return shard_digests(policy), [p.data_ptr() for p in policy.parts.parameters]

    def update(old: list[torch.Tensor] | None) -> UpdateStats:
        return policy.update(rows.with_log_probs(old=old, ref=ref).microbatches, LOSS, OPTIMIZER.lr)[0]

    base, ref, old = policy.log_probs(rows.microbatches), reference_log_probs(), policy.log_probs(rows.microbatches)
    if base is None:  # ranks that are not on the last stage have no values that the loss reads
        ref = old = [torch.zeros_like(m.advantages) for m in rows.microbatches]
    stats = [update(old), update(old)]
    before = state()
    later = reference_log_probs()
    after = state()
    failed = False
    try:
        with policy.reference():
            inside = shard_digests(policy)
            raise KeyError("while the reference is in")
    except KeyError:
        failed = state() == before
    moved = policy.log_probs(rows.microbatches)
    return {
        "kl_max": [s.maxima["kl"] for s in stats],
        "stats": [*stats, update(old)],
        "exact": base is None or all(torch.equal(a, b) for a, b in zip(base, later, strict=True)),
        "moved": base is None or not any(torch.equal(a, b) for a, b in zip(base, moved, strict=True)),
        "swapped_in": inside != before[0],
        "restored": before == after,
        "restored_after_failure": failed,
    }


def run_without_swaps(rank: int, recorded: Recorded, layout: Layout) -> list[UpdateStats]:
    """Run the same three updates with reference log-probs that were recorded before the first update."""
    policy = open_policy(rank, recorded, layout)
    rows = make_rows(rank, recorded, layout)
    base = policy.log_probs(rows.microbatches) or [torch.zeros_like(m.advantages) for m in rows.microbatches]
    batch = rows.with_log_probs(old=base, ref=base)
    return [policy.update(batch.microbatches, LOSS, OPTIMIZER.lr)[0] for _ in range(3)]


@pytest.mark.parametrize(
    ("model", "layout", "dtype"),
    [
        ("qwen3-tied", ONE, "fp32"),
        ("qwen3-tied", ONE, "bf16"),
        ("qwen3-tied", Layout(4, tp=2), "fp32"),
        pytest.param("qwen3-tied", Layout(4, tp=2), "bf16", marks=pytest.mark.long),
        ("deep", Layout(4, pp=2, vpp=2, cp=2, more=OVERLAP), "fp32"),
    ],
    ids=str,
)
def test_the_reference_is_the_base_model_and_a_swap_restores_the_policy(
    laboratory: Laboratory, model: str, layout: Layout, dtype: str
) -> None:
    recorded = replace(laboratory.recorded(model), dtype=dtype)
    answers = laboratory.pool.call(layout.world, run_with_reference, recorded, layout)
    for answer in answers:
        assert answer["kl_max"][0] == 0.0, "before the first update the policy is its own reference"
        assert answer["kl_max"][1] > 0
        assert answer["exact"], "the reference's log-probs are not those of the base model"
        assert answer["moved"]
        assert answer["swapped_in"]
        assert answer["restored"], "digests or addresses differ after the swap"
        assert answer["restored_after_failure"]
    unswapped = laboratory.pool.call(layout.world, run_without_swaps, recorded, layout)
    assert [answer["stats"] for answer in answers] == unswapped


def run_in_small_buckets(
    rank: int, recorded: Recorded, layout: Layout
) -> tuple[list[UpdateStats], list[dict[str, Any]], int]:
    """Measure a layout with many gradient buckets; weights are not read between updates."""
    policy = open_policy(rank, recorded, layout)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    stats = [policy.update(batch.microbatches, LOSS, OPTIMIZER.lr)[0] for _ in range(2)]
    read = [{name: as_array(t) for name, t in policy.full_tensors(1 << 28)} for _ in range(2)]
    return stats, read, sum(len(b.buckets) for b in policy.parts.buffers)


@pytest.mark.parametrize("model", ["qwen3", "qwen3-tied"])
def test_gathers_and_reductions_that_overlap_in_many_buckets_change_nothing(laboratory: Laboratory, model: str) -> None:
    recorded, wanted = laboratory.recorded(model), laboratory.run(model, ONE)[0]
    layout = Layout(2, more=(*OVERLAP, ("megatron", {"ddp.bucket_size": 3000})))
    for stats, (tensors, again), buckets in laboratory.pool.call(2, run_in_small_buckets, recorded, layout):
        assert buckets >= 8
        for update in range(2):
            assert stats[update].grad_norm == pytest.approx(wanted.stats[update].grad_norm, rel=1e-5)
        for name, tensor in tensors.items():
            assert np.abs(tensor - wanted.tensors[2][name]).max() <= 1e-6, name
            assert tensor.tobytes() == again[name].tobytes()


def count_module_calls(rank: int, recorded: Recorded, parallel: dict[str, Any]) -> tuple[int, int, int, UpdateStats]:
    """Count the calls of attention, feed-forward and norms in one update of one row."""
    policy = open_policy(rank, recorded, Layout(more=tuple(parallel.items())))
    batch = with_recorded(make_rows(rank, recorded, ONE), recorded)
    calls = dict.fromkeys(("attention", "mlp", "norm"), 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    (model,) = policy.parts.models
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(count("attention"))
        layer.mlp.linear_fc1.register_forward_pre_hook(count("mlp"))
        layer.input_layernorm.register_forward_pre_hook(count("norm"))
    stats, _ = policy.update(batch.microbatches, LOSS, OPTIMIZER.lr)
    return calls["attention"], calls["mlp"], calls["norm"], stats


@pytest.mark.parametrize(
    ("parallel", "times"),
    [
        ({"recompute": "selective"}, (2, 1, 1)),
        ({"recompute": "selective", "recompute_modules": ("mlp",)}, (1, 2, 1)),
        ({"recompute": "selective", "recompute_modules": ("layernorm",)}, (1, 1, 2)),
        ({"recompute": "full"}, (2, 2, 2)),
    ],
    ids=str,
)
def test_recomputed_modules_run_twice_and_give_the_same_update(
    laboratory: Laboratory, parallel: dict[str, Any], times: tuple[int, int, int]
) -> None:
    recorded = replace(laboratory.recorded("qwen3"), max_tokens=4096)
    ((*once, plain),) = laboratory.pool.call(1, count_module_calls, recorded, {})
    ((*calls, stats),) = laboratory.pool.call(1, count_module_calls, recorded, parallel)
    assert once == [2, 2, 2]  # two layers, one row
    assert calls == [2 * n for n in times]
    assert stats == plain
