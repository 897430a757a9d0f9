"""Master weights and gradients on the host are in shared pinned buffers before an update.

Megatron's hybrid optimizer runs with parameters that say that they are on CUDA. Streams do nothing, and pinned memory
is ordinary memory that is remembered.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from grpo_mega.config.policy_sections import OptimizerConfig, PrecisionConfig
from grpo_mega.policy.megatron_arguments import split_arguments
from grpo_mega.policy.megatron_patches import host_optimizer
from grpo_mega.policy.megatron_patches.host_optimizer import HybridDeviceOptimizer, install, pin
from grpo_mega.policy.optimizer_config import optimizer_fields
from grpo_mega.types import UserError

SHAPES = ((3, 4), (5,), (2, 2))
Pinned = dict[int, Tensor]


class OnDevice(torch.Tensor):
    """A host tensor that says that it is on CUDA."""

    is_cuda = True

    def cpu(self, *_: Any) -> Tensor:
        return self.clone().as_subclass(Tensor)


@pytest.fixture
def pinned() -> Iterator[Pinned]:
    """Return address -> buffer of all pinned memory, and replace what needs CUDA."""
    found: Pinned = {}
    empty = torch.empty

    def create(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        if pin_memory:
            found[made.untyped_storage().data_ptr()] = made
        return made

    with (
        mock.patch.object(torch, "empty", create),
        mock.patch.object(Tensor, "pin_memory", lambda t: create(t.shape, dtype=t.dtype, pin_memory=True).copy_(t)),
        mock.patch.object(Tensor, "is_pinned", lambda t: t.untyped_storage().data_ptr() in found),
        mock.patch.multiple(
            torch.cuda, current_stream=mock.MagicMock(), Stream=mock.MagicMock(), stream=mock.MagicMock()
        ),
    ):
        yield found


def optimizer_of(weights: list[Tensor]) -> Any:
    return HybridDeviceOptimizer(
        [{"params": weights}], offload_fraction=1.0, cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW, param_update_in_fp32=True, lr=0.5, weight_decay=0.0, fused=True,
    )  # fmt: skip


def weights_on_device() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).bfloat16().as_subclass(OnDevice) for s in SHAPES]


def step(optimizer: Any, weights: list[Tensor]) -> None:
    for weight in weights:
        weight.decoupled_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
    optimizer.step()


def are_pinned(optimizer: Any) -> list[bool]:
    return [copy.is_pinned() for copy in optimizer.gpu_params_map_cpu_copy.values()]


def test_master_weights_are_pinned_from_the_first_step_and_after_a_load(pinned: Pinned) -> None:
    install()
    install()
    weights = weights_on_device()
    expected = [w.as_subclass(Tensor).float() - 0.5 for w in weights]  # a first step of Adam is lr * sign(gradient)
    optimizer = optimizer_of(weights)
    step(optimizer, weights)
    assert are_pinned(optimizer) == [True] * 3
    masters = list(optimizer.gpu_params_map_cpu_copy.values())
    assert [m.dtype for m in masters] == [torch.float32] * 3
    for weight, master, values in zip(weights, masters, expected, strict=True):
        assert torch.allclose(master, values, atol=1e-6)
        assert torch.equal(weight.as_subclass(Tensor), master.bfloat16())
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, weights)
    assert are_pinned(optimizer) == [True] * 3
    assert all(
        torch.allclose(m, v - 0.5, atol=1e-6)
        for m, v in zip(optimizer.gpu_params_map_cpu_copy.values(), expected, strict=True)
    )
    buffers = len(pinned)
    step(optimizer, weights)
    assert len(pinned) == buffers


def test_the_release_still_updates_master_weights_that_are_not_pinned(
    pinned: Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, the release repaired it: delete the patch."""
    install()
    monkeypatch.setattr(HybridDeviceOptimizer, "step", inspect.unwrap(HybridDeviceOptimizer.step))
    weights = weights_on_device()
    optimizer = optimizer_of(weights)
    step(optimizer, weights)
    assert are_pinned(optimizer) == [False] * 3
    assert pinned


def test_tensors_share_pinned_buffers_of_a_limited_size(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_optimizer, "MAX_PIECE_BYTES", 48)
    copies = [torch.full((n,), float(n)) for n in (4, 8, 1, 20, 3)]
    pin(copies)
    assert [buffer.nbytes for buffer in pinned.values()] == [48, 4, 80, 12]
    assert all(copy.is_pinned() for copy in copies)
    assert [copy.tolist() for copy in copies] == [[float(n)] * n for n in (4, 8, 1, 20, 3)]


def test_gradients_share_a_pinned_buffer_and_are_those_of_the_step(pinned: Pinned) -> None:
    install()
    weights = weights_on_device()
    optimizer = optimizer_of(weights)
    step(optimizer, weights)
    copies = list(optimizer.gpu_params_map_cpu_copy.values())
    assert all(copy.grad.is_pinned() for copy in copies)
    assert len({copy.grad.untyped_storage().data_ptr() for copy in copies}) == 1
    for weight in weights:
        weight.decoupled_grad = torch.full(weight.shape, 3.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(copy.grad.unique().tolist() == [3.0] for copy in copies)
    assert all(torch.equal(optimizer.cpu_copy_map_grad[copy], copy.grad) for copy in copies)


def test_the_release_still_pins_a_buffer_for_each_gradient(pinned: Pinned, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the release repaired it: delete `_pin_gradients`."""
    install()
    monkeypatch.setattr(HybridDeviceOptimizer, "step", inspect.unwrap(HybridDeviceOptimizer.step))
    weights = weights_on_device()
    optimizer = optimizer_of(weights)
    step(optimizer, weights)
    assert len({c.grad.untyped_storage().data_ptr() for c in optimizer.gpu_params_map_cpu_copy.values()}) == 3


def test_the_release_repeats_the_gradient_of_a_parameter_without_one_which_the_policy_cannot_meet(
    pinned: Pinned,
) -> None:
    """hybrid_optimizer.py:124 leaves `grad` as it is. The distributed optimizer gives every parameter a gradient."""
    install()
    weights = weights_on_device()
    optimizer = optimizer_of(weights)
    step(optimizer, weights)
    before = weights[0].as_subclass(Tensor).clone()
    weights[0].decoupled_grad = None  # type: ignore[attr-defined]
    optimizer.step()
    assert not torch.equal(weights[0].as_subclass(Tensor), before)
    host = OptimizerConfig(host_fraction=1.0)
    assert optimizer_fields(host, PrecisionConfig(dtype="bf16"))["use_distributed_optimizer"] is True
    with pytest.raises(UserError, match="use_distributed_optimizer"):
        split_arguments({"use_distributed_optimizer": False})
