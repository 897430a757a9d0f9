"""A device that looks like CUDA and computes on the CPU, to run the CUDA paths of Python code without a GPU.

A tensor of the device is a wrapper that says `cuda:0` and holds a CPU tensor. Every operator runs on the CPU tensors.
As on a GPU, an operator whose tensors are on different devices raises an error, unless one has no dimension or the
operator copies. So an index or an output that is created on the CPU is found, and so is a wrong value.

torch.cuda reports one GPU; streams and generators do nothing; torch.compile compiles nothing. Process groups must be
those of torch's fake backend. Attention uses torch's formula, or the formula of the flash operators
(flash_on_cpu.py). Use it in a process of its own, and call `load` before torch is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SOURCE = Path(__file__).with_suffix(".cpp")


def library(folder: Path) -> Path:
    """Return the compiled guard and hooks in `folder`, built for the installed torch."""
    built = folder / f"cuda_lookalike-{importlib.metadata.version('torch')}.so"
    if not built.exists() or built.stat().st_mtime < SOURCE.stat().st_mtime:
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        root = Path(spec.submodule_search_locations[0])
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(SOURCE), "-o", str(built)]
        subprocess.run([*command, f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"], check=True)
    return built


def load(folder: Path) -> None:
    """Load the guard and the hooks into this process."""
    assert "torch" not in sys.modules, "torch looks for the hooks when it is imported"
    ctypes.CDLL(str(library(folder)), mode=ctypes.RTLD_GLOBAL)


def _nothing(*_: Any, **__: Any) -> mock.MagicMock:
    return mock.MagicMock()


@contextlib.contextmanager
def cuda_lookalike() -> Iterator[None]:
    """Create tensors of the device inside the block, and let torch.cuda report one GPU."""
    import torch
    import torch.distributed as dist

    from tests.helpers.cuda_lookalike_tensor import OnCudaLookalike
    from tests.helpers.flash_on_cpu import install_flash_on_cpu

    install_flash_on_cpu()
    new_group = dist.new_group

    def fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return new_group(*args, backend="fake" if backend == "nccl" else backend, **kwargs)

    state = torch.zeros(1, dtype=torch.uint8)
    replaced = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0), "set_device": lambda *_: None, "synchronize": lambda *_: None,
        "Stream": _nothing, "Event": _nothing, "stream": _nothing, "manual_seed": lambda *_: None,
        "_lazy_init": lambda: None, "_lazy_call": lambda *_, **__: None,
        "current_stream": _nothing, "get_rng_state": lambda *_, **__: state, "set_rng_state": lambda *_: None,
    }  # fmt: skip
    # the class of a tensor cannot change in place: `module.to` replaces parameters that were created on the CPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device="cuda") is a copy of a CPU tensor
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", return_value=state))
        stack.enter_context(mock.patch.object(torch.backends.cuda, "is_flash_attention_available", return_value=True))
        stack.enter_context(
            mock.patch.object(torch, "compile", lambda f=None, **_: f if f is not None else lambda g: g)
        )
        stack.enter_context(mock.patch.object(dist, "new_group", fake_group))
        stack.enter_context(OnCudaLookalike())
        yield
