"""What Megatron-Core 0.16 needs to run without CUDA; a no-op where CUDA is there.

Megatron names the device "cuda" in its own source. Here every loaded `megatron.core` module gets a stand-in for its
global name `torch`: the real torch, but for the few entries below, each with the Megatron line that needs it. torch
itself keeps its functions, so that other libraries in the process (the engine) see nothing of this. Two methods of
`Tensor` cannot be reached that way and are replaced for calls that come from Megatron's optimizer.

Never: arithmetic. What changes numbers is in `attention.py` (attention itself) and `quirks.py` (faults).
Asserted by tests/unit/policy/megatron_patches/test_cpu.py and by every test in tests/parallel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_mega.parallel.context_parallel import rank_index


def prepare_import() -> None:
    """Call before the first import of `megatron`: on CPU `torch.compile` costs a compiler and minutes, and Megatron
    decorates with it while it is imported (jit.py:23)."""
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    compiler = torch.compile
    torch.compile = _identity_decorator  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # that Apex and Transformer Engine are missing is what this file is about; Megatron says it seven times
            warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine)")
            for name in _MODULES:
                importlib.import_module(name)
    finally:
        torch.compile = compiler


def install() -> None:
    """Give every loaded Megatron module a torch whose device is the CPU. Idempotent; call again after an import."""
    if torch.cuda.is_available():
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _TORCH  # type: ignore[attr-defined]
    _replace_functions()
    _replace_tensor_methods()


# Imported under `prepare_import`, so that nothing below is compiled and `install` finds every module that is used.
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
)


def _identity_decorator(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else lambda f: f


class _NullStream:
    """Stands for Stream and Event: everything is done when it is called.

    Needed by token_dispatcher.py:445,871,874,895; param_and_grad_buffer.py:417; shared_experts.py:123.
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


def _null_context(*_: Any, **__: Any) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


class _NoFp8:
    """Stands for Transformer Engine's FP8GlobalStateManager."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _rng_state(*_: Any, **__: Any) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8)


_CUDA_ENTRIES: dict[str, Any] = {
    # tensor_parallel/mappings.py:91,141,181,442; tensor_parallel/layers.py:552; p2p_communication.py:313,321;
    # param_and_grad_buffer.py:800,806; utils.py:631; moe/router.py:90; rotary_pos_embedding.py:78,162;
    # distrib_optimizer.py:791,1077; strategies/async_utils.py:165,604
    "current_device": _cpu,
    # p2p_communication.py:398; async_utils.py:212; filesystem_async.py:230
    "synchronize": _nothing,
    # async_utils.py:488
    "set_device": _nothing,
    "Stream": _NullStream,
    "Event": _NullStream,
    "stream": _null_stream,
    "current_stream": _null_stream,
    # tensor_parallel/random.py:235-240,250,255,273,277: states are recorded although every dropout is 0
    "get_rng_state": _rng_state,
    "set_rng_state": _nothing,
    "manual_seed": _nothing,
    "empty_cache": _nothing,
}


class _TorchOnCpu(types.ModuleType):
    """A module that answers with `entries` first and with the real module otherwise."""

    def __init__(self, real: types.ModuleType, entries: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(entries)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _without_cuda(factory: Callable[..., Any]) -> Callable[..., Any]:
    """device="cuda" means the CPU: pipeline_parallel/schedules.py:596,983,2138; optimizer.py:481,485,907;
    clip_grads.py:103,174; utils.py:1207. Pinned memory needs CUDA too: rope_utils.py:63."""

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
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # random.py:422,447,457 read and set the CUDA generator through torch._C
    random._get_cuda_rng_state = _rng_state
    random._set_cuda_rng_state = _nothing
    # random.py:589-592,660: a module that is computed again asks for the state of FP8, also where there is none (:636)
    if not hasattr(random, "FP8GlobalStateManager"):
        random.FP8GlobalStateManager = _NoFp8
        random.activation_recompute_forward = random.fp8_autocast = _null_context
    # moe_utils.py:1192,1225: the name is only defined with Transformer Engine
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # multi_latent_attention.py:62 takes a stub for Transformer Engine, and :185 then asks for an instance of None
    multi_latent_attention.HAVE_TE = False
    # moe_utils.py:1093 only turns tensors of a GPU into what all_to_all needs: lists of numbers
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_as_numpy
    # gloo gathers and scatters equal sizes only; experts cut by etp see as many tokens as were routed to them
    if mappings._gather_along_first_dim.__module__ == mappings.__name__:
        mappings._gather_along_first_dim = functools.partial(_gather_unequal, mappings._gather_along_first_dim)
        mappings._reduce_scatter_along_first_dim = functools.partial(
            _reduce_scatter_unequal, mappings._reduce_scatter_along_first_dim
        )
    # The baseline for packed rows loops over sequences in Python, in every layer, for q and k: a row of 500 short
    # rollouts spends most of its forward pass there. (With CUDA a fused kernel takes its place.)
    if rope_utils._apply_rotary_pos_emb_thd.__module__ == rope_utils.__name__:
        rope_utils._apply_rotary_pos_emb_thd = _rotary_packed


def _splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_unequal(
    gather: Callable[..., Tensor], input_: Tensor, group: Any, output_split_sizes: Any = None, *args: Any
) -> Tensor:
    """mappings.py:150 with parts of different sizes: all padded to the largest, gathered and cut."""
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
    """mappings.py:193 with parts of different sizes: summed whole, of which each rank takes its part."""
    if input_split_sizes is None or group.size() == 1:
        return scatter(input_, group, input_split_sizes, *args)
    total = input_.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    part: Tensor = total.split([int(size) for size in input_split_sizes])[group.rank()]
    return part


def _rotary_packed(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
    cp_group: Any = None,
) -> Tensor:
    """Rotary embedding of a packed row, or of this rank's share of it, [T/cp, n, d] in one gather: position = place in
    the row - start of its sequence."""
    from megatron.core.models.common.embeddings import rope_utils

    total = t.size(0) * (cp_group.size() if cp_group is not None else 1)
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=total)
    positions = torch.arange(total, device=t.device) - starts
    if total != t.size(0):
        positions = positions[rank_index(cu_seqlens, cp_group.size(), cp_group.rank())]
    rotated: Tensor = rope_utils._apply_rotary_pos_emb_bshd(
        t.unsqueeze(1),
        freqs[positions],
        rotary_interleaved=rotary_interleaved,
        multi_latent_attention=multi_latent_attention,
        mscale=mscale,
    )
    return rotated.squeeze(1)


def _replace_tensor_methods() -> None:
    if getattr(Tensor.type, "answers_megatron", False):
        return
    real_type, real_cuda = Tensor.type, Tensor.cuda

    @functools.wraps(real_type)
    def tensor_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        # distrib_optimizer.py:361,420,582; optimizer.py:671,690; clip_grads.py:167 sort parameters by type *name*
        if isinstance(answer, str) and sys._getframe(1).f_globals.get("__name__", "").startswith(
            "megatron.core.optimizer"
        ):
            return answer.replace("torch.", "torch.cuda.", 1) if not answer.startswith("torch.cuda") else answer
        return answer

    @functools.wraps(real_cuda)
    def tensor_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # distrib_optimizer.py:1089; rope_utils.py:63
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return self
        return real_cuda(self, *args, **kwargs)

    tensor_type.answers_megatron = True  # type: ignore[attr-defined]
    Tensor.type = tensor_type  # type: ignore[method-assign, assignment]
    Tensor.cuda = tensor_cuda  # type: ignore[method-assign, assignment]
