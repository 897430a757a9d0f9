"""policy/fp8_scales.py: hand-computed quantized values and scales in the layout of Transformer Engine 2.11."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_mega.config.policy_sections import Fp8Config
from grpo_mega.policy.fp8_scales import delayed_scales, reported_scales, weight_range


def as_bytes(values: list[list[float]] | torch.Tensor) -> torch.Tensor:
    """Return e4m3 values as bytes; each given value must be one of e4m3."""
    wanted = torch.as_tensor(values)
    found = wanted.to(torch.float8_e4m3fn)
    assert torch.equal(found.float(), wanted.float())
    return found.view(torch.uint8)


def make_layer(*weights: Any) -> torch.nn.Module:
    """Return a layer that keeps FP8 copies beside its bf16 weights, as a layer of Transformer Engine does."""
    module = torch.nn.Linear(2, 2)
    module._fp8_workspaces = {f"weight{i}": each for i, each in enumerate(weights)}  # type: ignore[assignment]
    return torch.nn.Sequential(module)


def tensorwise_weight(values: list[list[float]], scale: float) -> Any:
    return SimpleNamespace(_data=as_bytes(values), _transpose=None, _scale_inv=torch.tensor([scale]))


def blockwise_weight(values: torch.Tensor, scales: list[list[float]]) -> Any:
    return SimpleNamespace(
        _rowwise_data=as_bytes(values),
        _rowwise_scale_inv=torch.tensor(scales),
        _columnwise_data=None,
        _columnwise_scale_inv=None,
    )


def test_a_tensor_with_one_scale_reports_its_largest_value_and_its_zeros() -> None:
    weight = tensorwise_weight([[448.0, 0.0, -0.0], [-2.0, 1.5, 0.0]], 0.5)
    assert weight_range([make_layer(weight)]).tolist() == [224, 3, 6]


def test_a_weight_whose_row_order_was_freed_is_read_from_its_transpose() -> None:
    weight = tensorwise_weight([[1.0, 0.0]], 4.0)
    weight._data, weight._transpose = None, weight._data.t().contiguous()
    assert weight_range([make_layer(weight)]).tolist() == [4, 1, 2]


def test_the_largest_value_of_blocks_is_not_always_in_the_one_with_the_largest_scale() -> None:
    values = torch.ones(130, 129)  # 2 x 2 blocks, three of them cut short
    values[0, 0], values[129, 128], values[129, 0] = 0.0, 448.0, -3.0
    padding = [1000.0, 1000.0]  # scales are padded to four columns; the padding belongs to no block
    weight = blockwise_weight(values, [[4.0, 2.0, *padding], [0.5, 0.25, *padding]])
    assert weight_range([make_layer(weight)]).tolist() == [448 * 0.25, 1, 130 * 129]


def test_scales_of_mxfp8_are_exponents_of_32_values_along_a_row_or_a_column() -> None:
    values = torch.ones(32, 64)
    values[1, 40], values[2, 3], values[31, 63] = -6.0, 0.0, 0.0
    scales = torch.full((128, 4), 255, dtype=torch.uint8)  # padded to 128 x 4
    scales[:32, :2] = 127
    scales[1, 1], scales[2, 0] = 126, 129  # 6 / 2 = 3 and 1 * 4
    weight = blockwise_weight(values, [[0.0]])
    weight._rowwise_scale_inv = scales
    assert weight_range([make_layer(weight)]).tolist() == [4, 2, 32 * 64]
    by_column = torch.full((4, 128), 255, dtype=torch.uint8)
    by_column[:1, :64] = 127
    by_column[0, 40] = 130
    weight._columnwise_data, weight._rowwise_data = weight._rowwise_data, None
    weight._columnwise_scale_inv = by_column
    assert weight_range([make_layer(weight)]).tolist() == [48, 2, 32 * 64]


def test_parameters_in_fp8_and_copies_beside_bf16_ones_are_counted_together() -> None:
    held = torch.nn.Linear(2, 2, bias=False)
    held.weight._data = as_bytes([[3.0, 0.0], [0.0, 0.0]])  # type: ignore[assignment]
    held.weight._scale_inv = torch.tensor([2.0])
    assert weight_range(
        [held, make_layer(tensorwise_weight([[1.0]], 5.0), tensorwise_weight([[0.0]], 7.0))]
    ).tolist() == [6, 4, 6]


@pytest.fixture
def single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op=None: None)


@pytest.mark.usefixtures("single_rank")
def test_each_recipe_reports_what_its_layers_keep_and_nothing_that_would_always_be_0() -> None:
    here = torch.device("cpu")
    model = [make_layer(tensorwise_weight([[2.0, 0.0, 1.0, 1.0]], 3.0))]
    current = reported_scales(model, Fp8Config(recipe="tensorwise"), 1, here)
    assert current == ({"fp8_zero": 0.25}, {"fp8_amax": 6.0})
    recorded = LayerWithHistory(8, 2)
    recorded.passes([500.0, 400.0])
    delayed = reported_scales([*model, recorded], Fp8Config(recipe="delayed"), 1, here)
    assert delayed == ({"fp8_zero": 0.25, "fp8_cut": 0.5}, {"fp8_amax": 500.0})
    assert reported_scales([torch.nn.Linear(2, 2)], Fp8Config(recipe="mxfp8"), 1, here) == ({}, {})


class LayerWithHistory(torch.nn.Module):
    """A layer as Transformer Engine's delayed recipe leaves it: one row of the history for each pass."""

    def __init__(self, length: int, tensors: int) -> None:
        super().__init__()
        self.state = SimpleNamespace(amax_history=torch.zeros(length, tensors))
        self.fp8_meta = {"scaling_fwd": self.state}

    def passes(self, *largest: list[float]) -> None:
        """Values are collected in row 0, then rows are rolled and row 0 is emptied."""
        for values in largest:
            self.state.amax_history[0] = torch.tensor(values)
            self.state.amax_history.copy_(self.state.amax_history.roll(-1, 0))
            self.state.amax_history[0] = 0


def test_delayed_scales_report_values_above_the_previous_maximum() -> None:
    recorded, settings = LayerWithHistory(8, 2), Fp8Config(recipe="delayed")
    recorded.passes([500.0, 400.0])  # the first scale is 1: up to 448
    assert delayed_scales([recorded], settings, 1).tolist() == [500, 1, 2]
    recorded.passes([100.0, 401.0], [499.0, 600.0])
    assert delayed_scales([recorded], settings, 1).tolist() == [600, 1, 2]
    assert delayed_scales([recorded], settings, 2).tolist() == [600, 2, 4]
    assert delayed_scales([recorded], settings, 100).tolist() == [600, 3, 6]
    recorded.passes([500.0, 600.0])  # as large as before: the scale holds it
    assert delayed_scales([recorded], settings, 1).tolist() == [600, 0, 2]


def test_gradients_have_the_range_of_their_own_format() -> None:
    recorded = LayerWithHistory(4, 1)
    recorded.fp8_meta = {"scaling_bwd": recorded.state}
    recorded.passes([1000.0])
    assert delayed_scales([recorded], Fp8Config(recipe="delayed"), 1)[1] == 0
    assert delayed_scales([recorded], Fp8Config(recipe="delayed", format="e4m3"), 1)[1] == 1


def test_layers_without_scales_report_nothing() -> None:
    assert delayed_scales([torch.nn.Linear(2, 2)], Fp8Config(recipe="delayed"), 1).tolist() == [0, 0, 0]
