"""The policy's local modules on CUDA: where tensors are created, and what every family computes there.

A device that looks like CUDA and computes on the CPU (tests/helpers/cuda_lookalike.py) runs the code of CUDA.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.family_configs import FAMILY_CONFIGS
from tests.helpers.transformer_engine_sources import REPOSITORY

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


MODULES = sorted(path.relative_to(POLICY).as_posix() for path in POLICY.rglob("*.py"))


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


@pytest.fixture(scope="module")
def computed(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return device -> case -> family -> loss, gradients and log, from one process per device."""
    if shutil.which("g++") is None:
        pytest.skip("g++ compiles the device guard of the lookalike")
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA has a device guard of its own; tests/gpu runs the kernels")
    cache, folder = pytestconfig.cache, tmp_path_factory.mktemp("on_cuda")
    library = Path(cache.mkdir("cuda_lookalike")) if cache else folder
    found = {}
    for device in ("cpu", "cuda"):
        command = [sys.executable, "-m", "tests.helpers.policy_pass", str(folder / device), device, str(library)]
        done = subprocess.run(
            [*command, *FAMILY_CONFIGS], cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found[device] = torch.load(folder / device)
    return found


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("case", ["batches", "flash"])
def test_loss_and_gradients_of_a_packed_row_are_those_of_the_cpu(computed: Any, case: str, family: str) -> None:
    expected, found = computed["cpu"]["batches"][family], computed["cuda"][case][family]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        difference = (found["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert difference < 1e-5, name


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_bf16_uses_the_flash_kernel_and_fp32_says_why_it_does_not(computed: Any, family: str) -> None:
    assert computed["cuda"]["bf16"][family]["log"] == ["attention of packed rows: flash kernel"]
    (line,) = computed["cuda"]["batches"][family]["log"]
    assert "batches of sequences" in line
    assert "float32" in line
    assert computed["cuda"]["bf16"][family]["loss"] == pytest.approx(
        computed["cpu"]["batches"][family]["loss"], rel=0.01
    )


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("case", ["batches, context parallel", "flash, context parallel"])
def test_context_parallel_ranks_stay_on_their_device(computed: Any, case: str, family: str) -> None:
    found = computed["cuda"][case][family]
    assert len(found["log"]) == 1
    assert found["log"][0].endswith("flash kernel") == case.startswith("flash")
    assert found["gradients"].keys() == computed["cuda"]["batches"][family]["gradients"].keys()
