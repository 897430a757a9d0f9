"""The critic in every layout equals autograd in float64 on the transformers model; a resumed critic is bit-equal.

Compared are values, loss, and the gradient of every tensor and of the value head.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_mega.algorithm.value_loss import ValueLoss
from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.trainer.batch import TrainBatch
from grpo_mega.trainer.objective import Credit
from grpo_mega.trainer.phases import Phases
from grpo_mega.types import UpdateStats
from tests.helpers.recorded_rollouts import (
    LOSS,
    ONE,
    OPTIMIZER,
    Layout,
    Recorded,
    as_array,
    make_config,
    make_rows,
    open_policy,
    optimizer_moments,
    torch_optimizers,
    with_recorded,
)
from tests.helpers.token_values import token_values
from tests.helpers.update_oracle import load_model
from tests.parallel.conftest import MODELS, Laboratory

CLIP = 0.3
NUM_UPDATES = 2
SHARED = (  # sequence and context parallelism split the input of the value head
    ("qwen3-tied", Layout(2, tp=2, sequence_parallel=True)),
    ("qwen3-tied", Layout(2, pp=2)),
    ("qwen3", Layout(4, tp=2)),
    ("deep", Layout(4, tp=2, cp=2, sequence_parallel=True)),
)
LONG = (
    ("qwen2", Layout(2, tp=2)),
    ("llama", Layout(2)),
    ("qwen3", Layout(8, tp=2, pp=2)),
    ("deep", Layout(2, cp=2)),
    ("deep", Layout(2, pp=2, vpp=2, more=(("overlap_grad_reduce", True), ("overlap_param_gather", True)))),
    ("deep", Layout(8, tp=2, pp=2, cp=2)),
    ("deep", Layout(8, pp=2, vpp=2, cp=2, more=(("recompute", "full"),))),
)
CASES = [("qwen3-tied", ONE), *SHARED, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]


def random_numbers(recorded: Recorded, seed: int) -> list[list[float]]:
    """Return one random number per sampled token of each rollout."""
    rng = random.Random(seed)
    return [[rng.gauss(0, 0.5) for _ in range(r.completion.num_loss_tokens)] for r in recorded.groups.rollouts]


def head_weight(hidden_size: int) -> Tensor:
    return 0.3 * torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(7))


def rows_with_values(rank: int, recorded: Recorded, layout: Layout) -> TrainBatch:
    batch = make_rows(rank, recorded, layout)
    values, returns = (token_values(random_numbers(recorded, seed)) for seed in (1, 2))
    return batch.with_credit(Credit(batch.advantages, returns), values)


def open_critic(rank: int, recorded: Recorded, layout: Layout, *, plant: bool = True) -> tuple[Any, Any]:
    """Return the policy, whose process groups a critic uses, and a critic with a nonzero value head."""
    from grpo_mega.policy.critic import MegatronCritic

    policy = open_policy(rank, recorded, layout)
    critic = MegatronCritic(make_config(recorded, layout), policy.spec, recorded.model, policy.ranks)
    if plant and policy.ranks.is_last_stage:
        head = critic.parts.models[-1].output_layer.weight
        with torch.no_grad():
            assert not head.any(), "a head starts at zero"
            head.copy_(head_weight(policy.spec.hidden_size))
    critic.parts.optimizer.reload_model_params()
    return policy, critic


def measure_critic(rank: int, recorded: Recorded, layout: Layout) -> dict[str, Any]:
    _, critic = open_critic(rank, recorded, layout)
    batch = rows_with_values(rank, recorded, layout)
    values = critic.values(batch.microbatches)
    loss = ValueLoss(CLIP)
    stats = critic.backward(batch.microbatches, loss)
    gradients = {name: as_array(t) for name, t in critic.full_gradients(1 << 28)}
    last = critic.ranks.is_last_stage
    head = as_array(critic.parts.models[-1].output_layer.weight.main_grad) if last else None
    updates = [critic.update(batch.microbatches, loss, OPTIMIZER.lr) for _ in range(NUM_UPDATES)]
    return {
        "values": {} if values is None else batch.completion_values(values).by_rollout(),
        "stats": stats,
        "updates": updates,
        "gradients": gradients if rank == 0 else {},
        "head": head,
        "bytes": critic.state_bytes(),
        "parameters": sum(p.numel() for p in critic.parts.parameters),
    }


class Oracle:
    """The critic in float64: the transformers model, a value head, autograd and torch's AdamW."""

    def __init__(self, recorded: Recorded) -> None:
        model = load_model(recorded.model)
        self.head = torch.nn.Parameter(head_weight(model.config.hidden_size).double())
        body = dict(model.named_parameters())
        body.pop("lm_head.weight", None)
        parameters = [*body.values(), self.head]
        matrices, vectors = ([p for p in parameters if (p.dim() > 1) == many] for many in (True, False))
        adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=OPTIMIZER.lr,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
        )
        self.losses: list[float] = []
        self.norms: list[float] = []
        for update in range(NUM_UPDATES):
            adam.zero_grad()
            rows = [self._values(model, r) for r in recorded.groups.rollouts]
            loss = self._loss(recorded, rows)
            loss.backward()
            if update == 0:
                self.values = [row.tolist() for row in rows]
                self.gradients = {name: p.grad.clone() for name, p in body.items()}  # type: ignore[union-attr]
                self.head_gradient = self.head.grad.clone()  # type: ignore[union-attr]
            self.losses.append(float(loss.detach()))
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_grad)))
            adam.step()

    def _values(self, model: Any, rollout: Any) -> Tensor:
        prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
        hidden = model.model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).last_hidden_state[0]
        values: Tensor = (hidden[len(prompt) - 1 : -1] @ self.head.t())[:, 0]
        return (
            values if rollout.completion.loss_mask is None else values[torch.from_numpy(rollout.completion.loss_mask)]
        )

    @staticmethod
    def _loss(recorded: Recorded, rows: list[Tensor]) -> Tensor:
        """Return the loss as the recorded rows weight it: mean over the tokens of a rollout, then over rollouts."""
        parts = []
        for values, old, returns in zip(rows, random_numbers(recorded, 1), random_numbers(recorded, 2), strict=True):
            before, target = torch.tensor(old).double(), torch.tensor(returns).double()
            kept = before + (values - before).clamp(-CLIP, CLIP)
            parts.append(torch.maximum((values - target) ** 2, (kept - target) ** 2).mean() / 2)
        return torch.stack(parts).mean()


@pytest.fixture(scope="module")
def oracle(laboratory: Laboratory) -> Any:
    return functools.cache(lambda model: Oracle(laboratory.recorded(model)))


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_values_loss_and_gradient_equal_autograd_in_float64(
    laboratory: Laboratory, oracle: Any, model: str, layout: Layout
) -> None:
    wanted = oracle(model)
    answers = laboratory.pool.call(layout.world, measure_critic, laboratory.recorded(model), layout)
    found: dict[int, list[float]] = {}
    for answer in answers:
        found |= answer["values"]
        assert answer["stats"].sums == answers[0]["stats"].sums
        assert answer["updates"] == answers[0]["updates"], "all ranks report the same"
        if answer["head"] is not None and layout.topology.dp * layout.cp == 1:
            np.testing.assert_allclose(answer["head"], wanted.head_gradient.numpy(), rtol=1e-4, atol=1e-6)
    assert found.keys() == set(range(len(wanted.values)))
    for i, row in enumerate(wanted.values):
        np.testing.assert_allclose(found[i], row, atol=2e-5)
    for update, stats in enumerate(answers[0]["updates"]):
        assert stats.sums["loss"] == pytest.approx(wanted.losses[update], rel=1e-5)
        assert stats.grad_norm == pytest.approx(wanted.norms[update], rel=1e-5)
        assert 0.01 < stats.sums["clip_fraction"] < 0.99
    for name, gradient in wanted.gradients.items():
        difference = np.linalg.norm(answers[0]["gradients"][name] - gradient.numpy())
        assert difference <= 1e-5 * np.linalg.norm(gradient.numpy()), name
    assert MODELS[model].tied or not answers[0]["gradients"]["lm_head.weight"].any()


def test_state_bytes_are_weights_gradients_and_two_moments(laboratory: Laboratory) -> None:
    (answer,) = laboratory.pool.call(1, measure_critic, laboratory.recorded("qwen3-tied"), ONE)
    weights, padding = 4 * answer["parameters"], 4 * 1024  # Megatron rounds its flat buffers up
    for part, factor in (("params", 1), ("grads", 1), ("optimizer", 2)):
        assert factor * weights <= answer["bytes"][part] <= factor * weights + padding


def learner_state(learner: Any) -> list[bytes]:
    """Return parameters, master weights, moments and step counters of this rank."""
    masters = [p for adam in torch_optimizers(learner) for group in adam.param_groups for p in group["params"]]
    steps = [state["step"] for adam in torch_optimizers(learner) for state in adam.state.values()]
    return [as_array(t).tobytes() for t in (*learner.parts.parameters, *masters, *optimizer_moments(learner), *steps)]


def state_of_both(phases: Phases, policy: Any, critic: Any) -> list[bytes]:
    with phases.training():
        state = learner_state(policy)
        with phases.valuing():
            return state + learner_state(critic)


def update_both(
    rank: int, phases: Phases, policy: Any, critic: Any, recorded: Recorded, layout: Layout, updates: int
) -> list[tuple[UpdateStats, UpdateStats]]:
    rows = rows_with_values(rank, recorded, layout).microbatches
    batch = with_recorded(make_rows(rank, recorded, layout), recorded).microbatches
    stats = []
    for _ in range(updates):
        with phases.training():
            with phases.valuing():
                of_critic = critic.update(rows, ValueLoss(CLIP), 2e-3)
            stats.append((policy.update(batch, LOSS, 1e-3)[0], of_critic))
    return stats


def run_uninterrupted(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> tuple[Any, list[bytes]]:
    policy, critic = open_critic(rank, recorded, layout)
    phases = Phases(policy)
    phases.build_critic(lambda: critic)
    manager = CheckpointManager(folder, 2, phases.checkpointing, is_first=rank == 0, critic=critic)
    update_both(rank, phases, policy, critic, recorded, layout, 2)
    manager.stage_if_due(policy, LoopState(step=1, policy_version=2), is_due=True)
    manager.publish(wait=True)
    stats = update_both(rank, phases, policy, critic, recorded, layout, 2)
    return stats, state_of_both(phases, policy, critic)


def run_resumed(rank: int, recorded: Recorded, layout: Layout, checkpoint: Path) -> tuple[Any, list[bytes]]:
    policy, critic = open_critic(rank, recorded, layout, plant=False)
    phases = Phases(policy)
    phases.build_critic(lambda: critic)
    manager = CheckpointManager(checkpoint.parent, 2, phases.checkpointing, is_first=rank == 0, critic=critic)
    assert manager.load(policy, checkpoint) == LoopState(step=1, policy_version=2)
    stats = update_both(rank, phases, policy, critic, recorded, layout, 2)
    return stats, state_of_both(phases, policy, critic)


@pytest.mark.parametrize(
    ("model", "layout", "other", "dtype"),
    [
        ("qwen3-tied", Layout(4, tp=2, pp=2, sequence_parallel=True), ONE, "fp32"),
        pytest.param("qwen3", Layout(2), Layout(2, tp=2), "bf16", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_resumed_critic_is_bit_equal_to_an_uninterrupted_one(
    laboratory: Laboratory, tmp_path: Path, model: str, layout: Layout, other: Layout, dtype: str
) -> None:
    recorded = replace(laboratory.recorded(model), dtype=dtype)
    whole = laboratory.pool.call(layout.world, run_uninterrupted, recorded, layout, RunFolder(tmp_path).checkpoints)
    (checkpoint,) = RunFolder(tmp_path).complete_checkpoints().values()
    assert laboratory.pool.call(layout.world, run_resumed, recorded, layout, checkpoint) == whole
    tolerance = 1e-5 if dtype == "fp32" else 3e-2
    for stats, _ in laboratory.pool.call(other.world, run_resumed, recorded, other, checkpoint):
        for found, wanted in zip(stats, whole[0][0], strict=True):
            assert found[1].grad_norm == pytest.approx(wanted[1].grad_norm, rel=tolerance)
            assert found[1].sums["loss"] == pytest.approx(wanted[1].sums["loss"], rel=tolerance)
