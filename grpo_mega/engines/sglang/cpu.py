"""What SGLang 0.5.23 lacks on a machine without CUDA, put in place before its first import; its quirks are all here.

The wheel imports three packages that it does not need on CPU, of which there are only CUDA builds:
- `triton`: srt/utils/common.py:91; its version in kernels/ops/mamba/triton_ops/mamba_ssm.py:18, `triton.Config` as a
  class in .../ssd_bmm.py:22, decorators wherever a kernel is defined;
- `torchvision`: srt/multimodal/internvl_utils.py:5, srt/configs/deepseek_ocr.py:7;
- `sgl_kernel`: names taken under is_cpu() by kernels/ops/kvcache/cache_move.py:10, srt/mem_cache/allocation.py:46,
  kernels/ops/speculative/*.py and srt/layers/quantization/utils.py:27.
Empty modules stand in for them; vLLM, which it would import where it is there (layers/moe/moe_runner/triton_utils), for
5 s of every process, is hidden. A call of something of sgl_kernel raises: nothing computes with a stand-in. Without the
real kernels SGLang takes its torch implementations, also on processors with AMX, so parameters stay plain.
Its buffer for chosen experts is registered with CUDA (srt/mem_cache/pool_host/common.py:147), which does nothing here.

They would be seen by everything in a process (torch, Megatron), so only the processes of an engine import this for its
effect: sglang/host.py, which the processes that it spawns import first, too.
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
# Functions that ask whether a package is there and must hear no: transformers/utils/import_utils.py:73 would import
# image processors with torchvision, srt/utils/common.py would take kernels.
_PROBES = frozenset({"_is_package_available", "is_flashinfer_available"})

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",  # srt/utils/common.py:222; else is_cpu() is false
    "TORCHDYNAMO_DISABLE": "1",  # else the first tokens of an engine of two ranks wait 20 s for a compiler
}


def import_sglang() -> None:
    """Everything that its processes import, with the stand-ins, in this process: is the environment complete?"""
    os.environ.update(ENVIRONMENT)
    install_stubs()
    for name in ("entrypoints.engine", "managers.scheduler", "managers.detokenizer_manager", "models.registry"):
        importlib.import_module(f"sglang.srt.{name}")


def threads_of(tp: int) -> str:
    """SGLANG_CPU_OMP_THREADS_BIND. Without it srt/utils/numa_utils.py:463 refuses more ranks than NUMA nodes; the cores
    named in it are used only with sgl_kernel."""
    return "|".join(["0"] * tp)


def other_models(config_dir: Path) -> str:
    """SGLANG_DISABLED_MODEL_ARCHS: SGLang's model files that have no part in this model. Its registry imports all of
    them, 250, in two processes: 10 s of a core. Empty where the model's class is in none of them."""
    architectures = json.loads((config_dir / "config.json").read_text(encoding="utf-8")).get("architectures") or ()
    spec = importlib.util.find_spec("sglang")
    assert spec is not None, "check_sglang found it"
    assert spec.submodule_search_locations is not None, "it is a package"
    files = sorted(Path(spec.submodule_search_locations[0], "srt", "models").glob("*.py"))
    texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    own = {name for name, text in texts.items() if any(f"class {each}(" in text for each in architectures)}
    return ",".join(sorted(texts.keys() - own)) if own else ""


def install_stubs() -> None:
    """Before the first import of SGLang."""
    sys.meta_path.insert(0, _Finder())
    import torch

    unchanged = types.SimpleNamespace(cudaHostRegister=_registered, cudaHostUnregister=_registered)
    torch.cuda.cudart = lambda: unchanged


class _Nothing:
    """What a class of a missing package stands for: SGLang derives from it and annotates with it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


class _StubModule(types.ModuleType):
    """A module in which every name is there: a capitalised one is a class, any other a module that can be called."""

    __path__: ClassVar[list[str]] = []  # type: ignore[misc]  # it has submodules

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return _TRITON_VERSION
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = type(name, (_Nothing,), {}) if name[0].isupper() else _StubModule(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a decorator, with or without arguments."""
        if self.__name__.startswith("sgl_kernel"):
            raise NotImplementedError(f"{self.__name__} is not there without CUDA")
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return _undecorated


def _registered(*_: int) -> int:
    return 0


def _undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class _Finder:
    """Finds the missing packages and everything below them, but not for those who only ask."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        first = name.partition(".")[0]
        if first == _HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r} in the processes of SGLang", name=name)
        if first not in _NAMES or _is_asked_by_probe():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _is_asked_by_probe() -> bool:
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _PROBES:
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":  # launch/setup.sh
    import_sglang()
