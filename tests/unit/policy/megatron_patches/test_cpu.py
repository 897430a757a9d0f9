"""The replacements of CUDA for Megatron, which no other package sees. Each test runs in its own process."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import pytest
import torch

from grpo_mega.policy.megatron_patches import cpu

cpu.prepare_import()  # once here, so that forked children need not run it

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is replaced")

FUNCTIONS = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "empty_like", "zeros_like")
CUDA_FUNCTIONS = ("current_device", "synchronize", "Stream", "Event", "current_stream", "get_rng_state", "empty_cache")


def in_child(function: Callable[[], None], start: str = "fork") -> None:
    """Run `function` in a child process, so that its changes to torch and Megatron do not affect other tests.

    A spawned child also starts without the changes that other tests made in this process.
    """
    context = multiprocessing.get_context(start)
    parent_end, child_end = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(function, child_end))
    process.start()
    child_end.close()
    try:
        failure = parent_end.recv() if parent_end.poll(120) else "no answer in 120 s"
    finally:
        process.join(10)
        process.kill()
    if failure is not None:
        pytest.fail(failure)


def _report(function: Callable[[], None], connection: Connection) -> None:
    torch.set_num_threads(1)  # a forked child does not have the threads of its parent
    try:
        function()
        connection.send(None)
    except BaseException:  # the test reports any failure
        connection.send(traceback.format_exc())


def as_module(name: str) -> Callable[[str], Any]:
    """Return a function that evaluates an expression with `t`, a tensor, as if it were in the module `name`."""
    scope = {"__name__": name, "t": torch.zeros(1)}
    return lambda expression: eval(expression, scope)


def snapshot() -> dict[str, Any]:
    """Return the objects that `install` must not change for other packages, and those that it replaces for Megatron."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    found: dict[str, Any] = {f"torch.{name}": getattr(torch, name) for name in FUNCTIONS}
    found |= {f"torch.cuda.{name}": getattr(torch.cuda, name) for name in CUDA_FUNCTIONS}
    found |= {"Tensor.type": torch.Tensor.type, "Tensor.cuda": torch.Tensor.cuda, "compile": torch.compile}
    return found | {"parallel_state.torch": parallel_state.torch, "rng": random._get_cuda_rng_state}


CHANGED = {"Tensor.type", "Tensor.cuda", "parallel_state.torch", "rng"}


def _leaves_torch_unchanged() -> None:
    before = snapshot()
    cpu.install()
    assert {name for name, value in snapshot().items() if value is not before[name]} == CHANGED


def test_only_modules_of_megatron_and_two_tensor_methods_are_replaced() -> None:
    in_child(_leaves_torch_unchanged, "spawn")


def _does_nothing_with_cuda() -> None:
    before = snapshot()
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        cpu.install()
    after = snapshot()
    assert [name for name in after if after[name] is not before[name]] == []


def test_install_is_a_no_op_with_cuda() -> None:
    in_child(_does_nothing_with_cuda)


def _is_idempotent() -> None:
    cpu.install()
    first = snapshot()
    cpu.install()
    after = snapshot()
    assert [name for name in after if after[name] is not first[name]] == []


def test_install_is_idempotent() -> None:
    in_child(_is_idempotent)


def _type_and_cuda() -> None:
    cpu.install()
    elsewhere, optimizer = as_module("vllm.worker"), as_module("megatron.core.optimizer.clip_grads")
    model = as_module("megatron.core.models.gpt")
    assert [at("t.type()") for at in (elsewhere, model, optimizer)] == [
        "torch.FloatTensor",
        "torch.FloatTensor",
        "torch.cuda.FloatTensor",
    ]
    assert elsewhere("t.half().type()") == "torch.HalfTensor"
    assert optimizer("t.half().type()") == "torch.cuda.HalfTensor"
    assert elsewhere("t.type('torch.DoubleTensor').dtype") == torch.float64
    assert optimizer("t.type('torch.DoubleTensor').dtype") == torch.float64
    assert model("t.cuda() is t")
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        elsewhere("t.cuda()")


def test_tensor_methods_differ_only_in_modules_of_megatron() -> None:
    in_child(_type_and_cuda)


def _factories() -> None:
    from megatron.core import parallel_state

    cpu.install()
    replacement = parallel_state.torch
    assert replacement is not torch
    for name, args in (
        ("zeros", (2,)),
        ("empty", (2,)),
        ("full", ((2,), 1.0)),
        ("tensor", ([1, 2],)),
        ("arange", (2,)),
    ):
        assert getattr(replacement, name)(*args, device="cuda").device.type == "cpu"
        assert getattr(replacement, name)(*args, device=torch.device("cuda", 1), pin_memory=True).device.type == "cpu"
        assert getattr(replacement, name)(*args, device="meta").device.type == "meta"
    assert torch.zeros(1, device=replacement.cuda.current_device()).device.type == "cpu"
    assert replacement.nn is torch.nn
    assert replacement.cuda.is_available is torch.cuda.is_available
    with replacement.cuda.stream(replacement.cuda.Stream()):
        replacement.cuda.current_stream().wait_event(replacement.cuda.Event())
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")


def test_torch_in_megatron_creates_cuda_tensors_on_the_cpu() -> None:
    in_child(_factories)


def test_importing_megatron_does_not_change_torch_compile() -> None:
    assert torch.compile.__module__ == "torch"
