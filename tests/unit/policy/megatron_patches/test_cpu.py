"""What Megatron is given in place of CUDA, and that nobody else sees it. Each test has a process of its own."""

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

cpu.prepare_import()  # here, so that the children need not

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is replaced")

FUNCTIONS = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "empty_like", "zeros_like")
CUDA_FUNCTIONS = ("current_device", "synchronize", "Stream", "Event", "current_stream", "get_rng_state", "empty_cache")


def in_child(function: Callable[[], None], start: str = "fork") -> None:
    """Run `function` in a process whose changes to torch and Megatron end with it; one that is spawned also begins
    without those that other tests made here."""
    context = multiprocessing.get_context(start)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(function, theirs))
    process.start()
    theirs.close()
    try:
        failure = ours.recv() if ours.poll(120) else "no answer in 120 s"
    finally:
        process.join(10)
        process.kill()
    if failure is not None:
        pytest.fail(failure)


def _report(function: Callable[[], None], connection: Connection) -> None:
    torch.set_num_threads(1)  # threads of the parent are not there
    try:
        function()
        connection.send(None)
    except BaseException:  # whatever it is, the test shows it
        connection.send(traceback.format_exc())


def as_module(name: str) -> Callable[[str], Any]:
    """Evaluates an expression with `t`, a tensor, as if it stood in the module `name`."""
    scope = {"__name__": name, "t": torch.zeros(1)}
    return lambda expression: eval(expression, scope)


def snapshot() -> dict[str, Any]:
    """Everything that `install` may not touch for others, and what it may for Megatron."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import random

    found: dict[str, Any] = {f"torch.{name}": getattr(torch, name) for name in FUNCTIONS}
    found |= {f"torch.cuda.{name}": getattr(torch.cuda, name) for name in CUDA_FUNCTIONS}
    found |= {"Tensor.type": torch.Tensor.type, "Tensor.cuda": torch.Tensor.cuda, "compile": torch.compile}
    found |= {"parallel_state.torch": parallel_state.torch, "thd": rope_utils._apply_rotary_pos_emb_thd}
    return found | {"rng": random._get_cuda_rng_state}


CHANGED = {"Tensor.type", "Tensor.cuda", "parallel_state.torch", "thd", "rng"}


def _leaves_torch_alone() -> None:
    before = snapshot()
    cpu.install()
    assert {name for name, value in snapshot().items() if value is not before[name]} == CHANGED


def test_only_megatron_s_own_modules_and_two_tensor_methods_are_replaced() -> None:
    in_child(_leaves_torch_alone, "spawn")


def _does_nothing_with_cuda() -> None:
    before = snapshot()
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        cpu.install()
    after = snapshot()
    assert [name for name in after if after[name] is not before[name]] == []


def test_install_is_a_no_op_where_cuda_is() -> None:
    in_child(_does_nothing_with_cuda)


def _is_idempotent() -> None:
    cpu.install()
    first = snapshot()
    cpu.install()
    after = snapshot()
    assert [name for name in after if after[name] is not first[name]] == []


def test_install_twice_is_install_once() -> None:
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


def test_tensor_methods_answer_megatron_alone() -> None:
    in_child(_type_and_cuda)


def _factories() -> None:
    from megatron.core import parallel_state

    cpu.install()
    stand_in = parallel_state.torch
    assert stand_in is not torch
    for name, args in (
        ("zeros", (2,)),
        ("empty", (2,)),
        ("full", ((2,), 1.0)),
        ("tensor", ([1, 2],)),
        ("arange", (2,)),
    ):
        assert getattr(stand_in, name)(*args, device="cuda").device.type == "cpu"
        assert getattr(stand_in, name)(*args, device=torch.device("cuda", 1), pin_memory=True).device.type == "cpu"
        assert getattr(stand_in, name)(*args, device="meta").device.type == "meta"
    assert torch.zeros(1, device=stand_in.cuda.current_device()).device.type == "cpu"
    assert stand_in.nn is torch.nn
    assert stand_in.cuda.is_available is torch.cuda.is_available
    with stand_in.cuda.stream(stand_in.cuda.Stream()):
        stand_in.cuda.current_stream().wait_event(stand_in.cuda.Event())
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")


def test_megatron_s_torch_makes_its_cuda_tensors_on_the_host() -> None:
    in_child(_factories)


def test_importing_megatron_leaves_torch_compile_as_it_was() -> None:
    assert torch.compile.__module__ == "torch"
