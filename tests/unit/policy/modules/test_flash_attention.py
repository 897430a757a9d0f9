"""Attention with the flash kernel against float64. The kernel's two operators are computed by a formula on CPU."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from grpo_mega.policy.modules import flash_attention as module
from grpo_mega.policy.modules.flash_attention import Spans, can_use_flash, flash_attention
from tests.helpers.attention_oracle import bounds_of, reference_attention
from tests.helpers.flash_on_cpu import install_flash_on_cpu


@pytest.fixture(autouse=True)
def _flash_on_cpu() -> None:
    install_flash_on_cpu()


def lengths_of(seed: int) -> list[int]:
    """Return ragged lengths, with sequences of one token, an empty one, and a padding segment at the end."""
    rng = random.Random(seed)
    return [1, 0, *(rng.choice([1, 2, 3, 7, 8, 9, 30, 64]) for _ in range(rng.randrange(1, 9))), rng.randrange(1, 40)]


@pytest.mark.parametrize("window", [0, 1, 3, 500])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "scale"), [(4, 4, 8, None), (6, 2, 8, 0.7), (4, 1, 16, None), (2, 2, 24, 0.1)]
)
@pytest.mark.parametrize("seed", range(2))
def test_rows_are_attention_per_sequence_with_the_gradients(
    heads: int, kv_heads: int, width: int, scale: float | None, has_sinks: bool, window: int, seed: int
) -> None:
    bounds = bounds_of(lengths_of(seed))
    total, longest = int(bounds[-1]), int(bounds.diff().max())
    generator = torch.Generator().manual_seed(seed)
    shapes = ((total, heads, width), (total, kv_heads, width), (total, kv_heads, width), (heads,))
    exact = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    inputs = [x.detach().float().requires_grad_() for x in exact]
    upstream = torch.randn(total, heads, width, generator=generator, dtype=torch.float64)
    sinks = (exact[3], inputs[3]) if has_sinks else (None, None)
    expected = reference_attention(*exact[:3], bounds, scale if scale is not None else width**-0.5, sinks[0], window)
    spans = Spans(bounds, bounds, longest, longest)
    found = flash_attention(*inputs[:3], spans, scale, sinks=sinks[1], window=window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward(upstream)
    found.backward(upstream.float())
    for x, y in zip(inputs[: 3 + has_sinks], exact, strict=False):
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


def test_values_that_are_views_of_a_projection_are_not_copied_for_the_backward_pass() -> None:
    bounds = bounds_of([5, 3])
    projection = torch.randn(8, 2, 3 * 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        flash_attention(*projection.split(8, -1), Spans(bounds, bounds, 5, 5), None)
    storages = {x.untyped_storage().data_ptr() for x in saved}
    assert len(storages) == 3, "the projection, the output and its log sum exp"


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"width": 256}, True),
        ({"width": 264}, False),
        ({"width": 12}, False),
        ({"v_width": 128}, False),
        ({"capability": (7, 5)}, False),
        ({"built": False}, False),
        ({"device": "cpu"}, False),
    ],
    ids=str,
)
def test_the_kernel_is_used_where_it_is_supported(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], fits: bool
) -> None:
    case: dict[str, object] = {
        "dtype": torch.bfloat16, "width": 192, "capability": (8, 0), "built": True, "device": "cuda"
    } | change  # fmt: skip
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: case["built"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: case["capability"])
    module._device_has_flash.cache_clear()

    class Described:
        """Has the device of a tensor that this machine could not hold."""

        def __init__(self, width: object) -> None:
            self.dtype, self.device, self._width = case["dtype"], torch.device(str(case["device"])), width

        def size(self, _: int) -> object:
            return self._width

    q, v = Described(case["width"]), Described(case.get("v_width", case["width"]))
    assert can_use_flash(q, v) is fits  # type: ignore[arg-type]
    module._device_has_flash.cache_clear()
