"""Replayed experts: log-probs and gradients are those of one process that replays the same choices, and of transformers
in float64 with its routers told what to choose; not those of the policy's own choices."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_mega.types import UpdateStats
from tests.helpers.family_configs import raw_family_config
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
from tests.helpers.tiny_models import make_family_model
from tests.helpers.update_oracle import _checkpoint_names, _forward, _loss, load, perturbed_log_probs

LAYERS, EXPERTS, CHOSEN = 4, 8, 2
# one dense layer in between: choices are found by the layer's number
CONFIG = raw_family_config(
    "qwen3_moe", num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, mlp_only_layers=[1]
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
    """Of one rank; gradients on rank 0."""

    stats: UpdateStats
    log_probs: dict[int, list[float]]
    gradients: dict[str, Any]


def with_choices(recorded: Recorded) -> Recorded:
    """Random experts for every rollout but the last two; the last token is never in a record, nor the third."""
    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for rollout in recorded.groups.rollouts[:-2]:
        size = (rollout.num_tokens - 1, LAYERS, EXPERTS)
        choices = torch.rand(size, generator=generator).topk(CHOSEN).indices.to(torch.int16)
        choices[2] = -1
        rollouts.append(replace(rollout, completion=replace(rollout.completion, expert_choices=choices)))
    groups = replace(recorded.groups, rollouts=[*rollouts, *recorded.groups.rollouts[-2:]])
    return replace(recorded, groups=groups)


def train(rank: int, recorded: Recorded, layout: Layout) -> Run:
    policy = open_policy(rank, recorded, layout)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    values = policy.log_probs(batch.microbatches)
    stats, before = policy.backward(batch.microbatches, LOSS)
    if values is not None and before is not None:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, before, strict=True))
        assert len(values) > 1, "several microbatches are in flight"
    gradients = {name: as_array(t) for name, t in policy.full_gradients(1 << 28)}
    return Run(stats, {} if values is None else batch.completion_values(values), gradients if rank == 0 else {})


class Told:
    """The transformers model whose routers take a rollout's choices; called once for each rollout, in order."""

    def __init__(self, model: Any, recorded: Recorded) -> None:
        self.model = model
        self._records = itertools.cycle([r.completion.expert_choices for r in recorded.groups.rollouts])
        self._now: Tensor | None = None
        for layer, block in enumerate(model.model.layers):
            if hasattr(block.mlp, "gate"):
                block.mlp.gate.forward = lambda hidden, gate=block.mlp.gate, layer=layer: self._choose(
                    hidden, gate, layer
                )

    def __call__(self, **arguments: Any) -> Any:
        self._now = next(self._records)
        return self.model(**arguments)

    def _choose(self, hidden: Tensor, gate: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ gate.weight.t()
        chosen = logits.topk(CHOSEN).indices
        if self._now is not None:
            record = torch.full_like(chosen, -1)
            record[: len(self._now)] = self._now[:, layer].long()
            chosen = torch.where(record >= 0, record, chosen)
        return logits, torch.softmax(logits.gather(1, chosen), -1), chosen


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder: Path = make_family_model(tmp_path_factory.mktemp("routing") / "model", CONFIG, 5)
    groups, rewards = sample_groups(4, 4, 5)
    old = perturbed_log_probs(groups, folder, 1.0, 0.01, 15)
    ref = perturbed_log_probs(groups, folder, 1.0, 0.02, 25)
    return with_choices(Recorded(folder, groups, rewards, old, ref))


@pytest.fixture(scope="module")
def one(rank_pool: RankPool, told: Recorded) -> Run:
    (run,) = rank_pool.call(1, train, told, ONE)
    return run


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_one_process_equals_transformers_with_the_same_choices(told: Recorded, one: Run) -> None:
    model = load(told.model)
    replaying = Told(model, told)
    with torch.no_grad():
        wanted = [_forward(replaying, rollout, 1.0)[0].tolist() for rollout in told.groups.rollouts]
    for i, values in enumerate(wanted):
        np.testing.assert_allclose(one.log_probs[i], values, atol=2e-5)
    loss, _, _ = _loss(replaying, told)
    loss.backward()
    assert abs(one.stats.sums["loss"] - float(loss.detach())) <= 1e-5 * one.stats.sums["loss_magnitude"]
    gradients = _checkpoint_names(model, {name: p.grad for name, p in model.named_parameters()})
    assert gradients.keys() == one.gradients.keys()
    for name, gradient in gradients.items():
        assert relative(one.gradients[name], gradient.numpy()) <= 1e-5, name


def test_without_the_choices_it_is_another_gradient(rank_pool: RankPool, told: Recorded, one: Run) -> None:
    rollouts = [replace(r, completion=replace(r.completion, expert_choices=None)) for r in told.groups.rollouts]
    plain = replace(told, groups=replace(told.groups, rollouts=rollouts))
    (own,) = rank_pool.call(1, train, plain, ONE)
    assert abs(own.stats.grad_norm / one.stats.grad_norm - 1) > 1e-3
    differing = [name for name in one.gradients if relative(own.gradients[name], one.gradients[name]) > 1e-2]
    assert len(differing) == len(one.gradients)
    # a rollout without a record is routed by the policy alone, beside others that are not
    last = len(rollouts) - 1
    np.testing.assert_allclose(own.log_probs[last], one.log_probs[last], atol=1e-5)
    assert np.abs(np.array(own.log_probs[0]) - np.array(one.log_probs[0])).max() > 1e-3


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_every_layout_replays_what_one_process_replays(
    rank_pool: RankPool, told: Recorded, one: Run, layout: Layout
) -> None:
    runs = rank_pool.call(layout.world, train, told, layout)
    found = {i: values for run in runs for i, values in run.log_probs.items()}
    assert found.keys() == one.log_probs.keys()
    for i, values in one.log_probs.items():
        np.testing.assert_allclose(found[i], values, atol=2e-5)
    assert runs[0].stats.grad_norm == pytest.approx(one.stats.grad_norm, rel=1e-5)
    for name, gradient in one.gradients.items():
        assert relative(runs[0].gradients[name], gradient) <= 1e-5, name
