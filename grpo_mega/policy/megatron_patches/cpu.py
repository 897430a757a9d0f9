"""Patches that let Megatron-Core 0.19 run without CUDA. With CUDA they do nothing.

Megatron hard-codes the device "cuda". In every loaded `megatron.core` module, the global name `torch` is replaced by a
proxy. The proxy forwards to torch, except for the entries below; each names the Megatron line that needs it. torch
itself is unchanged, so other libraries in the process, such as the engine, are not affected. Two methods of `Tensor`
cannot be replaced that way: they are wrapped, and the wrapper acts only on calls from Megatron.

Nothing here changes arithmetic, except that reductions of unequal shards are expressed by operations that gloo has.
Attention is in modules/packed_attention.py, corrections of defects are in fixes.py, and what local modules need on
every device is in local_modules.py.
Asserted by tests/unit/policy/megatron_patches/test_cpu.py and by every test in tests/parallel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def prepare_import() -> None:
    """Import the Megatron modules in use with `torch.compile` disabled. Call it before any import of `megatron`.

    Megatron decorates functions with `torch.compile` at import time (jit.py:21). On CPU that needs a C++ compiler and
    takes minutes.
    """
    if has_cuda() or "megatron.core" in sys.modules:
        return
    compiler = torch.compile
    torch.compile = _identity_decorator  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # Megatron warns seven times that Apex and Transformer Engine are missing, which is expected here
            warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine)")
            sys.modules.setdefault(_PAGED_STASH, _without_triton())
            for name in _MODULES:
                importlib.import_module(name)
    finally:
        torch.compile = compiler


def has_cuda() -> bool:
    """Return whether torch finds a CUDA device: the only place in policy/ that asks."""
    return torch.cuda.is_available()


def install() -> None:
    """Give every loaded Megatron module the torch proxy. Idempotent; call it again after a module was imported."""
    if has_cuda():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _TORCH  # type: ignore[attr-defined]
    _replace_functions()
    _replace_tensor_methods()


@contextlib.contextmanager
def without_gpu(device: torch.device) -> Iterator[None]:
    """Keep Megatron from allocating on a GPU inside the block: its current device is `device`.

    Megatron builds embeddings, heads, routers and rotary frequencies on the current GPU, even on the meta device
    (tensor_parallel/layers.py:305,1000; moe/router.py:184,193), and records the state of its random numbers.
    On a machine without CUDA this does nothing, because `install` is permanent there.
    """
    if not has_cuda():
        yield
        return
    from megatron.core.tensor_parallel import random

    entries = _CUDA_ENTRIES | {"current_device": lambda: device}
    proxy = _TorchOnCpu(torch, {"cuda": _TorchOnCpu(torch.cuda, entries)})
    modules = [
        m for n, m in list(sys.modules.items()) if n.startswith("megatron.core") and vars(m).get("torch") is torch
    ]
    functions = {name: getattr(random, name) for name in ("_get_cuda_rng_state", "_set_cuda_rng_state")}
    random._get_cuda_rng_state, random._set_cuda_rng_state = _rng_state, _nothing
    for module in modules:
        module.torch = proxy  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch  # type: ignore[attr-defined]
        vars(random).update(functions)


# `prepare_import` imports these, so that nothing in them is compiled and `install` finds every module in use.
_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # imported at the first save
)


# paged_stash.py:12 imports kernels whose module imports triton at :4 without a guard. They are called with CUDA only.
_PAGED_STASH = "megatron.core.transformer.moe.ops.paged_stash"


def _without_triton() -> types.ModuleType:
    """Return a module with the names that paged_stash.py:12-16 imports."""

    def needs_cuda(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the kernels of Megatron's paged stash need CUDA and triton")

    module = types.ModuleType(_PAGED_STASH)
    module.__dict__.update(
        GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=needs_cuda, paged_stash_pop_kernel=needs_cuda
    )
    return module


def _identity_decorator(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else lambda f: f


class _NullStream:
    """Stub of Stream and Event: work is complete when a call returns, so there is nothing to wait for.

    Needed by token_dispatcher.py:469,925; param_and_grad_buffer.py:686; shared_experts.py:192,237,260,321,335,354.
    """

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NullStream)

    def __hash__(self) -> int:
        return 0

    def record(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> _NullStream:
        return self

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...


def _cpu(*_: Any, **__: Any) -> torch.device:
    return torch.device("cpu")


def _nothing(*_: Any, **__: Any) -> None: ...


def _null_stream(*_: Any, **__: Any) -> _NullStream:
    return _NullStream()


def _rng_state(*_: Any, **__: Any) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device="cpu")


_CUDA_ENTRIES: dict[str, Any] = {
    # tensor_parallel/mappings.py:95,145,152,185,447; tensor_parallel/layers.py:647; p2p_communication.py:334,342;
    # param_and_grad_buffer.py:1162,1180,1186; utils.py:715; moe/router.py:98,100; rotary_pos_embedding.py:78,162;
    # distrib_optimizer.py:998,1362; strategies/async_utils.py:224,698; strategies/state_dict_saver.py:252
    "current_device": _cpu,
    # p2p_communication.py:419; async_utils.py:273; filesystem_async.py:248; fully_parallel.py:287,296
    "synchronize": _nothing,
    # async_utils.py:565
    "set_device": _nothing,
    "Stream": _NullStream,
    "Event": _NullStream,
    "stream": _null_stream,
    "current_stream": _null_stream,
    # tensor_parallel/random.py:298-308,318,323,341: states are recorded although every dropout is 0
    "get_rng_state": _rng_state,
    "set_rng_state": _nothing,
    "manual_seed": _nothing,
    "empty_cache": _nothing,
}


class _TorchOnCpu(types.ModuleType):
    """A proxy of a module: attributes come from `entries` if they are there, otherwise from the real module."""

    def __init__(self, real: types.ModuleType, entries: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(entries)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _without_cuda(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory so that device="cuda" creates a CPU tensor.

    Needed by pipeline_parallel/schedules.py:749,1121,2292; optimizer.py:315,690,698,702,1249;
    clip_grads.py:96,108,112,180,231; utils.py:1332. Pinned memory needs CUDA as well: rope_utils.py:63.
    """

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "empty_like", "zeros_like")
_TORCH = _TorchOnCpu(
    torch,
    {name: _without_cuda(getattr(torch, name)) for name in _FACTORIES}
    | {"cuda": _TorchOnCpu(torch.cuda, _CUDA_ENTRIES)},
)


def _replace_functions() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    # random.py:104,135 read and set the CUDA generator through torch._C
    random._get_cuda_rng_state = _rng_state
    random._set_cuda_rng_state = _nothing
    # mapping.py:251: the default of an argument is torch.empty itself; exchange_utils.py:97 passes "cuda"
    if ShardedTensor.init_data.__module__ == ShardedTensor.__module__:
        ShardedTensor.init_data = functools.partialmethod(_init_data, ShardedTensor.init_data)
    # moe_utils.py:1184 converts only GPU tensors into the lists of integers that all_to_all needs
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_as_numpy
    # gloo gathers and scatters equal sizes only, and experts that are sharded by etp receive unequal numbers of tokens
    if mappings._gather_along_first_dim.__module__ == mappings.__name__:
        mappings._gather_along_first_dim = functools.partial(_gather_unequal, mappings._gather_along_first_dim)
        mappings._reduce_scatter_along_first_dim = functools.partial(
            _reduce_scatter_unequal, mappings._reduce_scatter_along_first_dim
        )


def _init_data(tensor: Any, init_data: Callable[..., None], device: Any, *args: Any, **kwargs: Any) -> None:
    init_data(tensor, "cpu" if str(device).startswith("cuda") else device, *args, **kwargs)


def _splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_unequal(
    gather: Callable[..., Tensor], input_: Tensor, group: Any, output_split_sizes: Any = None, *args: Any
) -> Tensor:
    """Gather unequal parts (mappings.py:154): pad all to the largest, gather, and remove the padding."""
    if output_split_sizes is None or group.size() == 1:
        return gather(input_, group, output_split_sizes, *args)
    sizes = [int(size) for size in output_split_sizes]
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    whole = gather(padded, group, None, *args)
    return torch.cat([part[:size] for part, size in zip(whole.split(max(sizes)), sizes, strict=True)])


def _reduce_scatter_unequal(
    scatter: Callable[..., Tensor], input_: Tensor, group: Any, input_split_sizes: Any = None, *args: Any
) -> Tensor:
    """Reduce-scatter unequal parts (mappings.py:197): all-reduce the whole tensor and return this rank's part."""
    if input_split_sizes is None or group.size() == 1:
        return scatter(input_, group, input_split_sizes, *args)
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    part: Tensor = total.split([int(size) for size in input_split_sizes])[group.rank()]
    return part


def _replace_tensor_methods() -> None:
    if getattr(Tensor.type, "answers_megatron", False):
        return
    real_type, real_cuda = Tensor.type, Tensor.cuda

    @functools.wraps(real_type)
    def tensor_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        # distrib_optimizer.py:401,466,758; optimizer.py:1009,1028; clip_grads.py:174 compare parameters by type name
        if isinstance(answer, str) and sys._getframe(1).f_globals.get("__name__", "").startswith(
            "megatron.core.optimizer"
        ):
            return answer.replace("torch.", "torch.cuda.", 1) if not answer.startswith("torch.cuda") else answer
        return answer

    @functools.wraps(real_cuda)
    def tensor_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # distrib_optimizer.py:1374; rope_utils.py:63
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return self
        return real_cuda(self, *args, **kwargs)

    tensor_type.answers_megatron = True  # type: ignore[attr-defined]
    Tensor.type = tensor_type  # type: ignore[method-assign, assignment]
    Tensor.cuda = tensor_cuda  # type: ignore[method-assign, assignment]
