"""Muon on one rank: the orthogonalization, one step worked by hand, and the rows of joint matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_mega.policy.muon import COEFFICIENTS, ITERATIONS, MatrixShard, Muon, newton_schulz, qkv_rows


def shard_of(master: Tensor, shape: tuple[int, int], start: int = 0, **keys: Any) -> MatrixShard:
    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "data_group": None,
        "tensor_group": None,
        "partition_dim": -1,
        "split_rows": lambda values: [values],
        "join_rows": lambda parts: parts[0],
    }
    return MatrixShard(shape=shape, master=master, start=start, end=start + master.numel(), **(settings | keys))


def polynomial(value: float) -> float:
    """Return what the iterations make of one singular value."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        value = a * value + b * value**3 + c * value**5
    return value


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5)])
def test_the_orthogonalization_keeps_singular_vectors_and_maps_singular_values(shape: tuple[int, int]) -> None:
    """The iteration is a polynomial of each singular value, which float64 computes from a decomposition."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    mapped = [polynomial(value / math.sqrt((values**2).sum())) for value in values]
    found = newton_schulz(matrix, torch.float32)
    np.testing.assert_allclose(found.numpy(), left @ np.diag(mapped) @ right, atol=2e-5)
    assert all(0.6 < value < 1.3 for value in mapped if value / math.sqrt((values**2).sum()) > 0.01)


def test_a_zero_matrix_stays_zero_and_bf16_stays_close() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 4), torch.float32), torch.zeros(3, 4))
    matrix = torch.eye(4) * 3  # the iterations amplify the rounding of bf16, 2^-8, by up to 10 near 1
    assert 0 < (newton_schulz(matrix, torch.bfloat16) - newton_schulz(matrix, torch.float32)).abs().max() < 0.06


def test_a_step_is_the_one_computed_by_hand() -> None:
    """Gradient diag(2, 2): its direction is diag(x, x) with x = p(1 / sqrt 2), scaled by 0.2 sqrt 2."""
    weight, bias = torch.nn.Parameter(torch.eye(2).flatten()), torch.nn.Parameter(torch.tensor([1.0]))
    groups = [
        {"params": [weight], "lr": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8},
        {"params": [bias], "lr": 0.5, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8},
    ]
    muon = Muon(groups, [shard_of(weight, (2, 2))], momentum=0.75)
    weight.grad, bias.grad = 2 * torch.eye(2).flatten(), torch.tensor([3.0])
    muon.step()
    x = polynomial(1 / math.sqrt(2))
    expected = 1 - 0.5 * 0.1 - 0.5 * 0.2 * math.sqrt(2) * x
    assert weight.detach().tolist() == pytest.approx([expected, 0, 0, expected], rel=1e-5, abs=1e-7)
    assert bias.item() == pytest.approx(0.5)  # Adam's first step is the rate
    assert muon.state[weight]["exp_avg"].tolist() == [0.5, 0, 0, 0.5]
    assert set(muon.state[weight]) == {"step", "exp_avg"}
    assert set(muon.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}
    assert (muon.moments_of(weight), muon.moments_of(bias)) == (("exp_avg",), ("exp_avg", "exp_avg_sq"))
    assert weight.grad is not None, "the gradient is kept, as other optimizers keep it"
    assert [group["step"] for group in muon.param_groups] == [1, 1]


def test_a_loaded_state_continues_bit_equal() -> None:
    """Also from a state in which Megatron allocated both moments of Adam, and one whose steps are those of groups."""

    def made() -> tuple[torch.nn.Parameter, Muon]:
        weight = torch.nn.Parameter(torch.arange(6.0))
        group = {"params": [weight], "lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        return weight, Muon([group], [shard_of(weight, (2, 3))], momentum=0.9)

    def step(weight: torch.nn.Parameter, muon: Muon, seed: int) -> None:
        weight.grad = torch.randn(6, generator=torch.Generator().manual_seed(seed))
        muon.step()

    weight, muon = made()
    step(weight, muon, 1)
    saved, state = weight.detach().clone(), muon.state_dict()
    state["state"][0] = {"exp_avg": state["state"][0]["exp_avg"].clone(), "exp_avg_sq": torch.full((6,), 9.0)}
    other, resumed = made()
    other.data.copy_(saved)
    resumed.load_state_dict(state)
    assert set(resumed.state[other]) == {"step", "exp_avg"}
    assert resumed.state[other]["step"].item() == 1
    for each, optimizer in ((weight, muon), (other, resumed)):
        step(each, optimizer, 2)
    assert torch.equal(weight, other)


def test_joint_rows_are_split_into_the_matrices_of_a_checkpoint() -> None:
    """Two key-value heads with two query heads each, of two rows: q q k v, q q k v."""
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    split, join = qkv_rows(queries=2, head_dim=2)
    query, key, value = (part[:, 0].tolist() for part in split(rows))
    assert query == [0, 1, 2, 3, 8, 9, 10, 11]
    assert (key, value) == ([4, 5, 12, 13], [6, 7, 14, 15])
    assert torch.equal(join(split(rows)), rows)


def test_each_matrix_of_a_joint_parameter_is_orthogonalized_by_itself() -> None:
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    joint = lambda parts: torch.cat([*parts])  # noqa: E731
    split: Any = lambda rows: rows.chunk(2)  # noqa: E731
    shard = shard_of(torch.zeros(12), (4, 3), split_rows=split, join_rows=joint)
    alone: Sequence[Tensor] = [shard_of(torch.zeros(6), (2, 3)).orthogonalized(part) for part in values.chunk(2)]
    assert torch.equal(shard.orthogonalized(values), torch.cat([*alone]))
