"""The auxiliary loss of routers has one value and one gradient in every layout: those of transformers in float64.

The oracle takes the routers' choices and inputs from transformers, which computes each rollout alone and so without
padding. It computes the loss from DeepSeek-V3, arXiv:2412.19437, equations 17 to 20. It shares no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_mega.config.algorithm_section import AlgorithmConfig
from tests.helpers.family_updates import FAMILY_MODELS, record_family
from tests.helpers.ranks import RankPool
from tests.helpers.recorded_rollouts import (
    LOSS,
    ONE,
    Layout,
    Recorded,
    as_array,
    make_config,
    make_rows,
    ranks_of,
    with_recorded,
)
from tests.helpers.replayed_choices import REPLAYED_CONFIG, ReplayingModel, with_choices
from tests.helpers.update_oracle import by_checkpoint_name, grpo_loss, load_model

COEF = 0.3  # large, so that a wrong loss changes every gradient by far more than the tolerance
FULL = (("recompute", "full"),)
MOE = (("recompute", "selective"), ("recompute_modules", ("moe",)))
CASES = [
    ("qwen3-moe", ONE),
    ("qwen3-moe", Layout(2, tp=2, sequence_parallel=True)),
    ("deepseek-v3", Layout(4, pp=2, cp=2, ep=2, more=MOE)),
    ("replayed", Layout(2, tp=2, sequence_parallel=True, more=FULL)),
    *(
        pytest.param(model, layout, marks=pytest.mark.long)
        for model in ("qwen3-moe", "deepseek-v3", "replayed")
        for layout in (
            Layout(2, more=FULL),
            Layout(4, pp=2, vpp=2, ep=2, more=(("pipeline_layout", "E|t|t|L"),)),
            Layout(8, tp=2, pp=2, cp=2, sequence_parallel=True, ep=2, etp=2, more=MOE),
        )
        if model != "replayed" or layout.vpp == 1
    ),
    pytest.param("qwen3-moe", Layout(2, ep=2), marks=pytest.mark.long),
    pytest.param("qwen3-moe", Layout(2, cp=2), marks=pytest.mark.long),
    pytest.param("mixtral", ONE, marks=pytest.mark.long),
    pytest.param("gpt-oss", Layout(2, cp=2), marks=pytest.mark.long),
]


@dataclass(frozen=True)
class Measured:
    """Gradients of an update by tensor (of rank 0), and the auxiliary loss without its coefficient; None: no such."""

    gradients: dict[str, Any]
    aux_loss: float | None
    loss: float


class Models:
    """Recorded models and their oracles; each is made once, on first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recorded: dict[str, Recorded] = {}
        self._expected: dict[str, Measured] = {}

    def recorded(self, name: str) -> Recorded:
        if name not in self._recorded:
            config = REPLAYED_CONFIG if name == "replayed" else FAMILY_MODELS[name]
            recorded = record_family(self._folder / name, config, 7)
            self._recorded[name] = with_choices(recorded) if name == "replayed" else recorded
        return self._recorded[name]

    def expected(self, name: str) -> Measured:
        if name not in self._expected:
            self._expected[name] = compute_expected(self.recorded(name), COEF)
        return self._expected[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("router_aux_loss"))


def balance_of(gate: Any, inputs: Tensor, chosen: Tensor, *, sigmoid: bool) -> Tensor:
    """Return sum_e f_e P_e of one rollout, equations 17 to 20 expert by expert."""
    logits = inputs.reshape(-1, inputs.shape[-1]) @ gate.weight.t()
    if getattr(gate, "bias", None) is not None:
        logits = logits + gate.bias
    scores = logits.sigmoid() if sigmoid else logits.exp()
    shares = scores / scores.sum(1, keepdim=True)
    tokens, experts = shares.shape
    total = torch.zeros((), dtype=torch.float64)
    for expert in range(experts):
        f = experts / (chosen.shape[1] * tokens) * int((chosen == expert).sum())
        total = total + f * shares[:, expert].mean()
    return total


def compute_expected(recorded: Recorded, coef: float) -> Measured:
    """Return the gradient of the GRPO loss + coef * balance: mean over rollouts, sum over layers."""
    model = load_model(recorded.model)
    balances: list[Tensor] = []

    def collect(module: Any, arguments: Any, found: Any) -> None:
        sigmoid = hasattr(module, "e_score_correction_bias")
        balances.append(balance_of(module, arguments[0], found[2], sigmoid=sigmoid))

    gates = [m for name, m in model.named_modules() if name.endswith((".gate", ".router"))]
    assert gates, "the model has experts"
    for gate in gates:
        gate.register_forward_hook(collect)
    rollouts = recorded.groups.rollouts
    replayed = any(r.completion.expert_choices is not None for r in rollouts)
    loss, _, _ = grpo_loss(ReplayingModel(model, recorded) if replayed else model, recorded)
    assert len(balances) == len(gates) * len(rollouts)
    total = torch.stack(balances).sum() / len(rollouts)
    (loss + coef * total).backward()
    gradients = by_checkpoint_name(model, {name: p.grad for name, p in model.named_parameters()})
    return Measured(
        {n: g.numpy() for n, g in gradients.items()}, float(total.detach()) / len(gates), float(loss.detach())
    )


def measure(rank: int, recorded: Recorded, layout: Layout, coef: float) -> Measured:
    from grpo_mega.models.config_readers import read_spec
    from grpo_mega.policy.policy import MegatronPolicy

    config = make_config(recorded, layout).model_copy(update={"algorithm": AlgorithmConfig(aux_loss_coef=coef)})
    spec = read_spec(recorded.model)
    policy = MegatronPolicy(config, spec, recorded.model, ranks_of(rank, layout), with_reference=False)
    batch = with_recorded(make_rows(rank, recorded, layout), recorded)
    for _ in range(2):  # neither log-probs nor an earlier update add to the value
        policy.log_probs(batch.microbatches)
        stats, _ = policy.backward(batch.microbatches, LOSS)
    gradients = {name: as_array(t) for name, t in policy.full_gradients(1 << 28)}
    return Measured(gradients if rank == 0 else {}, stats.sums.get("aux_loss"), stats.sums["loss"])


def largest_difference(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, str]:
    """Return the largest |g - g'| / |g'| over the tensors, and the tensor's name."""
    assert wanted.keys() == {name for name in found if not name.endswith("e_score_correction_bias")}
    norm = float(np.sqrt(sum(np.linalg.norm(w) ** 2 for w in wanted.values())))
    return max(  # an expert that no token chose has no gradient
        (float(np.linalg.norm(found[n] - w) / max(np.linalg.norm(w), 1e-4 * norm)), n) for n, w in wanted.items()
    )


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_value_and_every_gradient_equal_those_of_transformers(
    rank_pool: RankPool, models: Models, model: str, layout: Layout
) -> None:
    expected = models.expected(model)
    records = rank_pool.call(layout.world, measure, models.recorded(model), layout, COEF)
    for record in records:
        assert record.aux_loss == pytest.approx(expected.aux_loss, rel=1e-6)
        assert record.loss == pytest.approx(expected.loss, abs=1e-5)
    difference, name = largest_difference(records[0].gradients, expected.gradients)
    assert difference <= 1e-5, name


def test_without_a_coefficient_there_is_no_auxiliary_loss(rank_pool: RankPool, models: Models) -> None:
    recorded = models.recorded("qwen3-moe")
    (found,) = rank_pool.call(1, measure, recorded, ONE, 0.0)
    assert found.aux_loss is None
    assert largest_difference(found.gradients, compute_expected(recorded, 0.0).gradients)[0] <= 1e-5
    with_loss = models.expected("qwen3-moe").gradients
    gates = [name for name in with_loss if name.endswith("mlp.gate.weight")]
    assert gates
    assert all(largest_difference({n: found.gradients[n]}, {n: with_loss[n]})[0] > 0.05 for n in gates)
