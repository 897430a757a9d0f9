"""Supervised fine-tuning: loss and gradient equal transformers in every layout, resume is bit-equal, RL follows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.family_configs import raw_family_config
from tests.helpers.jobs import read_json, read_lines, without_times
from tests.helpers.recorded_rollouts import ONE, OVERLAP, VOCAB, Layout
from tests.helpers.sft_runs import (
    cross_entropy_of_transformers,
    gradient_of_examples,
    random_examples,
    run_sft,
    sft_config,
    start_of_rl,
)
from tests.helpers.tiny_models import make_family_model
from tests.parallel.conftest import Laboratory

EXAMPLES = random_examples(11, VOCAB, seed=3)
# test_update.py has the layouts of the same policy in the default tier
DENSE = (
    ONE,
    Layout(2, tp=2, sequence_parallel=True),
    Layout(4, pp=2, more=OVERLAP),
    *(
        pytest.param(layout, marks=pytest.mark.long)
        for layout in (Layout(2), Layout(2, cp=2), Layout(2, pp=2, vpp=2), Layout(8, tp=2, pp=2, cp=2))
    ),
)
EXPERTS = (
    Layout(4, tp=2, pp=2, ep=2, sequence_parallel=True),
    *(pytest.param(layout, marks=pytest.mark.long) for layout in (ONE, Layout(2, ep=2))),
)


@pytest.fixture(scope="module")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = raw_family_config("qwen3_moe")
    return make_family_model(tmp_path_factory.mktemp("moe"), config)


@pytest.mark.parametrize("layout", DENSE, ids=str)
def test_loss_and_gradient_equal_transformers_in_every_layout(laboratory: Laboratory, layout: Layout) -> None:
    check_gradient(laboratory, laboratory.recorded("deep").model, layout)


@pytest.mark.parametrize("layout", EXPERTS, ids=str)
def test_loss_and_gradient_of_a_mixture_of_experts_equal_transformers(
    laboratory: Laboratory, moe_model: Path, layout: Layout
) -> None:
    check_gradient(laboratory, moe_model, layout)


def check_gradient(laboratory: Laboratory, model: Path, layout: Layout) -> None:
    loss, expected = cross_entropy_of_transformers(model, EXAMPLES)
    records = laboratory.pool.call(layout.world, gradient_of_examples, model, layout, EXAMPLES)
    assert len({num_microbatches for _, num_microbatches, _ in records}) == 1
    for stats, _, _ in records:
        assert stats.sums["loss"] == pytest.approx(loss, rel=1e-5)
        assert stats.sums["entropy"] > 0.1
    found = records[0][2]
    assert expected.keys() == found.keys()
    for name, wanted in expected.items():
        gradient = found[name]
        assert np.linalg.norm(gradient - wanted.numpy()) <= 1e-5 * np.linalg.norm(wanted.numpy()), name


RESUMED = Layout(2, pp=2)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(laboratory: Laboratory, tmp_path: Path) -> None:
    model, pool = laboratory.recorded("qwen3").model, laboratory.pool
    for name, steps in (("whole", (5,)), ("resumed", (2, 5))):  # 30 examples are almost three epochs
        for each in steps:
            pool.call(2, run_sft, sft_config(model, RESUMED, tmp_path / name, steps=each), RESUMED, EXAMPLES)
    whole, resumed = (read_json(tmp_path / name / "summary.json") for name in ("whole", "resumed"))
    assert whole["status"] == resumed["status"] == "done"
    assert whole["policy_digest"] == resumed["policy_digest"]
    lines = [[without_times(line) for line in read_lines(tmp_path / n / "metrics.jsonl")] for n in ("whole", "resumed")]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5]
    assert lines[0][-1]["train/loss"] < lines[0][0]["train/loss"] - 0.05
    assert lines[0][-1]["data/epoch"] == pytest.approx(30 / 11)


def test_rl_starts_with_the_weights_of_the_last_checkpoint_in_another_layout(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    model, pool, layout = laboratory.recorded("qwen3").model, laboratory.pool, Layout(2, tp=2)
    (held,) = pool.call(1, run_sft, sft_config(model, ONE, tmp_path / "sft", steps=2), ONE, EXAMPLES)
    assert min(held.values()) > 0, "without an engine the policy stays on its device"
    checkpoint = tmp_path / "sft" / "checkpoints" / "step_000002"
    first, second = pool.call(2, start_of_rl, model, checkpoint, layout, EXAMPLES)
    base = load_file(model / "model.safetensors")
    changed = [
        n for n, t in base.items() if n in first["weights"] and not np.array_equal(first["weights"][n], t.numpy())
    ]
    assert len(changed) > 10, "the weights are still those of the base"
    (alone,) = pool.call(1, start_of_rl, model, checkpoint, ONE, EXAMPLES)
    for name, weight in alone["weights"].items():
        assert np.array_equal(weight, first["weights"][name]), name
        assert np.array_equal(weight, second["weights"][name]), name
    for own, ref in zip(first["own"], first["ref"], strict=True):
        assert torch.equal(own, ref), "the reference differs from the policy before the first update"
