"""Moving storages away and back, on host tensors, moved and copied: freed, and every view valid again and equal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_mega.interfaces import LearnerState
from grpo_mega.policy.host_memory import CopiedMemory, MovedMemory
from grpo_mega.policy.phase_offload import Movable, PolicyMemory


@pytest.fixture(autouse=True, params=[MovedMemory, CopiedMemory])
def _both_kinds_of_host_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are what CUDA devices use."""
    monkeypatch.setattr("grpo_mega.policy.phase_offload.host_memory", request.param)


def allocated_bytes(*tensors: Tensor) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_storages_are_freed_and_restored_for_all_their_views() -> None:
    flat = torch.randn(12, generator=torch.Generator().manual_seed(0))
    views = (flat[:6].view(2, 3), flat[6:], flat[::2])
    other = torch.arange(5, dtype=torch.bfloat16)
    copies = [t.clone() for t in (flat, *views, other)]
    movable = Movable([*views, flat, other])
    assert movable.num_bytes == 12 * 4 + 5 * 2
    movable.offload()
    assert allocated_bytes(flat, *views, other) == 0
    movable.reload()
    assert allocated_bytes(flat, *views, other) == 58
    assert all(torch.equal(t, copy) for t, copy in zip((flat, *views, other), copies, strict=True))
    views[0][0, 0] = 7.0
    assert flat[0] == 7.0


def test_bits_of_values_that_are_not_numbers_are_preserved() -> None:
    bits = torch.tensor([0x7FC00001, -(2**31), 1], dtype=torch.int32)
    floats = bits.clone().view(torch.float32)
    movable = Movable([floats])
    movable.offload()
    movable.reload()
    assert torch.equal(floats.view(torch.int32), bits)


def test_each_offload_keeps_the_content_at_its_time() -> None:
    tensor = torch.ones(4)
    movable = Movable([tensor])
    for value in (2.0, 3.0):
        tensor.fill_(value)
        movable.changed()
        movable.offload()
        movable.reload()
        assert tensor.tolist() == [value] * 4


def test_repeated_calls_do_nothing() -> None:
    tensor = torch.arange(4.0)
    movable = Movable([tensor])
    movable.reload()
    movable.offload()
    movable.offload()
    movable.reload()
    movable.reload()
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_discarded_content_is_restored_as_zeros() -> None:
    tensor = torch.ones(4)
    movable = Movable([tensor], keep=False)
    movable.offload()
    movable.reload()
    assert tensor.tolist() == [0.0] * 4


class TinyPolicy:
    """Two parameters in one buffer, their gradients in another, and AdamW on master weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.params = torch.arange(1.0, 7.0).to(dtype)
        self.grads = torch.zeros(6)
        # in fp32 the master weights are the parameters themselves
        flat = self.params if dtype == torch.float32 else self.params.float()
        self.masters = [torch.nn.Parameter(flat[:4]), torch.nn.Parameter(flat[4:])]
        self.adam = torch.optim.AdamW(self.masters, lr=0.1)
        buffer = SimpleNamespace(param_data=self.params, grad_data=self.grads)
        inner = SimpleNamespace(optimizer=self.adam)
        self.memory = PolicyMemory([buffer], SimpleNamespace(chained_optimizers=[inner]))

    def step(self) -> None:
        self.memory.changed()
        for master, grad in zip(self.masters, (self.grads[:4], self.grads[4:]), strict=True):
            master.grad = grad.clone()
        self.adam.step()
        for master in self.masters:
            master.grad = None
        if self.masters[0].untyped_storage().data_ptr() != self.params.untyped_storage().data_ptr():
            self.params.copy_(torch.cat([m.detach() for m in self.masters]))

    def moments(self) -> list[Tensor]:
        return [state[name] for state in self.adam.state.values() for name in ("exp_avg", "exp_avg_sq")]

    def content(self) -> list[Any]:
        return [t.tolist() for t in (self.params, *self.masters, *self.moments())]


def test_each_part_is_freed_separately_and_restored_with_equal_values() -> None:
    policy = TinyPolicy(torch.bfloat16)
    policy.grads.fill_(0.5)
    policy.step()
    before = policy.content()
    tensors: dict[LearnerState, list[Tensor]] = {
        "params": [policy.params],
        "grads": [policy.grads],
        "optimizer": [m.data for m in policy.masters] + policy.moments(),
    }
    for part in tensors:
        policy.memory.offload(part)
        assert {name: allocated_bytes(*held) == 0 for name, held in tensors.items()} == {n: n == part for n in tensors}
        assert policy.memory.resident_bytes() == {n: allocated_bytes(*held) for n, held in tensors.items()}
        policy.memory.reload(part)
        assert all(allocated_bytes(*held) for held in tensors.values())
    assert policy.content() == before
    assert policy.grads.tolist() == [0.0] * 6


def test_master_weights_that_are_the_parameters_move_with_them_alone() -> None:
    policy = TinyPolicy(torch.float32)
    policy.memory.offload("optimizer")
    assert allocated_bytes(policy.params) == 24
    policy.memory.offload("params")
    assert allocated_bytes(policy.params, *policy.masters) == 0
    policy.memory.reload("optimizer")
    assert allocated_bytes(policy.params) == 0
    policy.memory.reload("params")
    assert policy.params.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert policy.masters[1].tolist() == [5.0, 6.0]


def test_moments_are_moved_once_they_exist() -> None:
    policy = TinyPolicy(torch.float32)
    policy.memory.offload("grads", "optimizer")  # before the first update
    policy.memory.reload("grads", "optimizer")
    policy.grads.fill_(0.5)
    policy.step()
    before = policy.content()
    policy.memory.offload("optimizer")
    assert allocated_bytes(*policy.moments()) == 0
    policy.memory.reload("optimizer")
    assert policy.content() == before


def test_training_with_offloads_equals_training_without_them() -> None:
    policies = [TinyPolicy(torch.bfloat16), TinyPolicy(torch.bfloat16)]
    for update in range(3):
        for moves, policy in enumerate(policies):
            if moves:
                policy.memory.offload("grads", "optimizer", "params")
                policy.memory.reload("params", "grads", "optimizer")
            policy.grads.copy_(torch.arange(6.0) * (update + 1))
            policy.step()
    assert policies[0].content() == policies[1].content()


def test_moments_on_another_device_are_not_moved() -> None:
    policy = TinyPolicy(torch.float32)
    policy.step()
    elsewhere = torch.empty(6, device="meta")
    adam = policy.memory._optimizer.chained_optimizers[0].optimizer
    adam.state[policy.masters[0]]["exp_avg"] = elsewhere
    with_it = policy.memory.num_bytes()["optimizer"]
    policy.memory.offload("optimizer")
    assert elsewhere.untyped_storage().nbytes() == 24
    assert allocated_bytes(*[m for m in policy.moments() if m.device.type == "cpu"]) == 0
    assert with_it == policy.memory.num_bytes()["optimizer"]


def test_moments_that_were_replaced_are_found_again() -> None:
    policy = TinyPolicy(torch.float32)
    policy.step()
    policy.memory.offload("optimizer")
    policy.memory.reload("optimizer")
    state = policy.adam.state[policy.masters[0]]
    state["exp_avg"] = torch.full((4,), 9.0)  # as loading a checkpoint may do
    policy.memory.changed()
    policy.memory.offload("optimizer")
    assert allocated_bytes(*policy.moments()) == 0
    policy.memory.reload("optimizer")
    assert state["exp_avg"].tolist() == [9.0] * 4


def test_parameters_set_aside_are_restored_and_their_buffers_are_writable() -> None:
    policy = TinyPolicy(torch.float32)
    before = policy.content()
    with policy.memory.params_set_aside():
        assert policy.memory.resident_bytes()["params"] == 24
        policy.params.fill_(5.0)
        assert policy.masters[1].tolist() == [5.0, 5.0]
    assert policy.content() == before
    with pytest.raises(TypeError), policy.memory.params_set_aside():
        policy.params.fill_("lost")  # type: ignore[arg-type]
    assert policy.content() == before


def test_a_reader_of_an_offloaded_part_gets_an_error_with_part_and_phase() -> None:
    memory = TinyPolicy(torch.float32).memory
    memory.require("Model.save", "checkpointing", "params", "optimizer")
    memory.offload("optimizer")
    memory.require("Model.log_probs", "training", "params")
    with pytest.raises(RuntimeError, match=r"^optimizer=host: Model.save needs .*Phases\.checkpointing"):
        memory.require("Model.save", "checkpointing", "params", "optimizer")
    memory.reload("optimizer")
    with memory.params_set_aside():
        memory.require("Model.log_probs", "training", "params", reference=True)
        with pytest.raises(RuntimeError, match=r"^params=set aside: Model.update "):
            memory.require("Model.update", "training", "params")
    memory.require("Model.update", "training", "params", "grads", "optimizer")
