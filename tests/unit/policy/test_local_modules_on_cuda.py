"""The policy's local modules on CUDA: where tensors are created."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

POLICY = Path(__file__).resolve().parents[3] / "grpo_mega" / "policy"
FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


def calls_without_device(source: str) -> list[int]:
    """Return the lines that create a tensor with a function of torch and do not say on which device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in FACTORIES
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


def calls_of_is_available(source: str) -> list[int]:
    """Return the lines that ask torch for CUDA devices."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda.is_available"
    ]


HOST_COPIES = {"phase_offload.py", "host_memory.py", "reference.py"}  # create host memory only
MODULES = sorted({path.relative_to(POLICY).as_posix() for path in POLICY.rglob("*.py")} - HOST_COPIES)


@pytest.mark.parametrize("module", MODULES)
def test_every_tensor_is_created_on_a_stated_device(module: str) -> None:
    assert calls_without_device((POLICY / module).read_text()) == []


def test_a_call_without_a_device_is_found() -> None:
    source = "import torch\nx = torch.arange(3)\ny = torch.zeros(2, device='cpu')\nz = x.new_zeros(2)\n"
    assert calls_without_device(source) == [2]


@pytest.mark.parametrize("module", MODULES)
def test_only_one_function_asks_whether_there_is_cuda(module: str) -> None:
    found = calls_of_is_available((POLICY / module).read_text())
    assert len(found) == (1 if module == "megatron_patches/cpu.py" else 0)
