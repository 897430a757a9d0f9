"""Stub modules that SGLang 0.5.23 needs on a machine without CUDA, installed before its first import.

All patches for SGLang on CPU are here. The wheel imports three packages that it does not use on CPU and that exist only
as CUDA builds:
- `triton`: srt/utils/common.py:91; its version in kernels/ops/mamba/triton_ops/mamba_ssm.py:18, `triton.Config` as a
  class in .../ssd_bmm.py:22, decorators wherever a kernel is defined;
- `torchvision`: srt/multimodal/internvl_utils.py:5, srt/configs/deepseek_ocr.py:7;
- `sgl_kernel`: names taken under is_cpu() by kernels/ops/kvcache/cache_move.py:10, srt/mem_cache/allocation.py:46,
  kernels/ops/speculative/*.py and srt/layers/quantization/utils.py:27.
Empty stub modules replace them. vLLM is hidden, because SGLang would import it if it is installed
(layers/moe/moe_runner/triton_utils), which takes 5 s in every process. A call into the stub of sgl_kernel raises an
error, so no result is computed by a stub. Without the real kernels SGLang uses its torch implementations, also on
processors with AMX, so parameters stay plain. SGLang registers its buffer of chosen experts with CUDA
(srt/mem_cache/pool_host/common.py:147); on CPU the registration does nothing.

Stubs are visible to everything in a process (torch, Megatron). Therefore only engine processes install them:
sglang/engine_process.py and the processes that it spawns.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

_NAMES = frozenset({"sgl_kernel", "torchvision", "triton"})
_HIDDEN = "vllm"
_TRITON_VERSION = "3.7.1"
# Functions that check for a package and must not find the stubs: transformers/utils/import_utils.py:73 would import
# image processors with torchvision, srt/utils/common.py would choose kernels.
_PROBES = frozenset({"_is_package_available", "is_flashinfer_available"})

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",  # srt/utils/common.py:222; otherwise is_cpu() is false
    "TORCHDYNAMO_DISABLE": "1",  # otherwise the first tokens of an engine of two ranks wait 20 s for a compiler
}


def import_sglang() -> None:
    """Import everything that SGLang's processes import, with the stubs, to check that the environment is complete."""
    os.environ.update(ENVIRONMENT)
    install_stubs()
    for name in ("entrypoints.engine", "managers.scheduler", "managers.detokenizer_manager", "models.registry"):
        importlib.import_module(f"sglang.srt.{name}")


def threads_of(tp: int) -> str:
    """Return SGLANG_CPU_OMP_THREADS_BIND for `tp` ranks.

    Without it srt/utils/numa_utils.py:463 rejects more ranks than NUMA nodes. Its cores are used only with sgl_kernel.
    """
    return "|".join(["0"] * tp)


def other_models(config_dir: Path) -> str:
    """Return SGLANG_DISABLED_MODEL_ARCHS: the model files of SGLang that this model does not need.

    Its registry would import all 250 of them in two processes, which takes 10 s of a core. Empty if no file defines the
    model's class.
    """
    architectures = json.loads((config_dir / "config.json").read_text(encoding="utf-8")).get("architectures") or ()
    spec = importlib.util.find_spec("sglang")
    assert spec is not None, "check_sglang found it"
    assert spec.submodule_search_locations is not None, "it is a package"
    files = sorted(Path(spec.submodule_search_locations[0], "srt", "models").glob("*.py"))
    texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    own = {name for name, text in texts.items() if any(f"class {each}(" in text for each in architectures)}
    return ",".join(sorted(texts.keys() - own)) if own else ""


def install_stubs() -> None:
    """Install the stub modules; call it before the first import of SGLang."""
    sys.meta_path.insert(0, _Finder())
    import torch

    unchanged = types.SimpleNamespace(cudaHostRegister=_succeed, cudaHostUnregister=_succeed)
    torch.cuda.cudart = lambda: unchanged


class _StubClass:
    """Replacement for a class of a missing package; SGLang only derives from it and annotates with it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


class _StubModule(types.ModuleType):
    """A module that defines every name: a capitalized one as a class, any other as a callable module."""

    __path__: ClassVar[list[str]] = []  # type: ignore[misc]  # it has submodules

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return _TRITON_VERSION
        if name.startswith("__"):
            raise AttributeError(name)
        stub: Any = type(name, (_StubClass,), {}) if name[0].isupper() else _StubModule(f"{self.__name__}.{name}")
        setattr(self, name, stub)
        return stub

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Act as a decorator, with or without arguments."""
        if self.__name__.startswith("sgl_kernel"):
            raise NotImplementedError(f"{self.__name__} is not available without CUDA")
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return _undecorated


def _succeed(*_: int) -> int:
    return 0


def _undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class _Finder:
    """Finds the missing packages and their submodules, except for functions that only check for them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        first = name.partition(".")[0]
        if first == _HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r} in SGLang's processes", name=name)
        if first not in _NAMES or _called_by_probe():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _called_by_probe() -> bool:
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _PROBES:
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":  # launch/setup.sh
    import_sglang()
