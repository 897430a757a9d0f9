"""Routing replay: every layout has the log-probs and gradients of one process that replays the same expert choices.

That process equals transformers in float64 whose routers are replaced to use the same choices. Without replay the
gradients differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_mega.types import UpdateStats
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import (
    LOSS,
    ONE,
    Layout,
    Recorded,
    as_array,
    make_rows,
    open_policy,
    sample_groups,
    with_recorded,
)
from tests.helpers.replayed_choices import REPLAYED_CONFIG, ReplayingModel, with_choices
from tests.helpers.tiny_models import make_family_model
from tests.helpers.update_oracle import (
    by_checkpoint_name,
    grpo_loss,
    load_model,
    log_probs_and_entropies,
    perturbed_log_probs,
)

FULL = (("recompute", "full"),)
MOE = (("recompute", "selective"), ("recompute_modules", ("moe",)))
CASES = [
    Layout(4, pp=2, cp=2, ep=2, more=FULL),
    Layout(4, pp=2, cp=2, ep=2, more=MOE),
    Layout(2, tp=2, sequence_parallel=True),
    *(
        pytest.param(layout, marks=pytest.mark.long)
        for layout in (
            Layout(4, pp=2, vpp=2, ep=2, more=MOE),
            Layout(8, tp=2, pp=2, cp=2, ep=2, etp=2, sequence_parallel=True, more=FULL),
            Layout(4, tp=2, cp=2, ep=2, sequence_parallel=True),
        )
    ),
]


@dataclass(frozen=True)
class Run:
    """The results of one rank; rank 0 has the gradients."""

    stats: UpdateStats
    log_probs: dict[int, list[float]]
    gradients: dict[str, Any]


def run_updates(rank: int, recorded: Recorded, layout: Layout) -> Run:
    policy = open_policy(rank, recorded, layout)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    values = policy.log_probs(batch.microbatches)
    stats, before = policy.backward(batch.microbatches, LOSS)
    if values is not None and before is not None:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, before, strict=True))
        assert len(values) > 1, "several microbatches are in flight"
    gradients = {name: as_array(t) for name, t in policy.full_gradients(1 << 28)}
    return Run(
        stats, {} if values is None else batch.completion_values(values).by_rollout(), gradients if rank == 0 else {}
    )


@pytest.fixture(scope="module")
def recorded_choices(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder: Path = make_family_model(tmp_path_factory.mktemp("routing") / "model", REPLAYED_CONFIG, 5)
    groups, rewards = sample_groups(4, 4, 5)
    old = perturbed_log_probs(groups, folder, 1.0, 0.01, 15)
    ref = perturbed_log_probs(groups, folder, 1.0, 0.02, 25)
    return with_choices(Recorded(folder, groups, rewards, old, ref))


@pytest.fixture(scope="module")
def reference(rank_pool: RankPool, recorded_choices: Recorded) -> Run:
    (run,) = rank_pool.call(1, run_updates, recorded_choices, ONE)
    return run


def relative_difference(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_one_process_equals_transformers_with_the_same_choices(recorded_choices: Recorded, reference: Run) -> None:
    model = load_model(recorded_choices.model)
    replaying_model = ReplayingModel(model, recorded_choices)
    with torch.no_grad():
        expected = [
            log_probs_and_entropies(replaying_model, rollout, 1.0)[0].tolist()
            for rollout in recorded_choices.groups.rollouts
        ]
    for i, values in enumerate(expected):
        np.testing.assert_allclose(reference.log_probs[i], values, atol=2e-5)
    loss, _, _ = grpo_loss(replaying_model, recorded_choices)
    loss.backward()
    assert abs(reference.stats.sums["loss"] - float(loss.detach())) <= 1e-5 * reference.stats.sums["loss_magnitude"]
    gradients = by_checkpoint_name(model, {name: p.grad for name, p in model.named_parameters()})
    assert gradients.keys() == reference.gradients.keys()
    for name, gradient in gradients.items():
        assert relative_difference(reference.gradients[name], gradient.numpy()) <= 1e-5, name


def test_without_replay_the_gradient_differs(rank_pool: RankPool, recorded_choices: Recorded, reference: Run) -> None:
    rollouts = [
        replace(r, completion=replace(r.completion, expert_choices=None)) for r in recorded_choices.groups.rollouts
    ]
    plain = replace(recorded_choices, groups=replace(recorded_choices.groups, rollouts=rollouts))
    (own,) = rank_pool.call(1, run_updates, plain, ONE)
    assert abs(own.stats.grad_norm / reference.stats.grad_norm - 1) > 1e-3
    differing = [
        name
        for name in reference.gradients
        if relative_difference(own.gradients[name], reference.gradients[name]) > 1e-2
    ]
    assert len(differing) == len(reference.gradients)
    # a rollout without recorded choices is routed by the policy, beside rollouts that are replayed
    last = len(rollouts) - 1
    np.testing.assert_allclose(own.log_probs[last], reference.log_probs[last], atol=1e-5)
    assert np.abs(np.array(own.log_probs[0]) - np.array(reference.log_probs[0])).max() > 1e-3


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_every_layout_replays_what_one_process_replays(
    rank_pool: RankPool, recorded_choices: Recorded, reference: Run, layout: Layout
) -> None:
    runs = rank_pool.call(layout.world, run_updates, recorded_choices, layout)
    found = {i: values for run in runs for i, values in run.log_probs.items()}
    assert found.keys() == reference.log_probs.keys()
    for i, values in reference.log_probs.items():
        np.testing.assert_allclose(found[i], values, atol=2e-5)
    assert runs[0].stats.grad_norm == pytest.approx(reference.stats.grad_norm, rel=1e-5)
    for name, gradient in reference.gradients.items():
        assert relative_difference(runs[0].gradients[name], gradient) <= 1e-5, name
