"""Tensors of the device of cuda_lookalike.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}


class LookalikeTensor(torch.Tensor):
    """A tensor on `DEVICE` whose values are those of the CPU tensor `values_on_cpu`."""

    values_on_cpu: Tensor

    @staticmethod
    def __new__(cls: type[LookalikeTensor], real: Tensor) -> LookalikeTensor:
        made: LookalikeTensor = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.values_on_cpu = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"LookalikeTensor({self.values_on_cpu})"

    @property
    def data(self) -> Tensor:
        """The tensor without its history; Megatron also assigns to it (utils.py: `make_viewless_tensor`)."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: LookalikeTensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.values_on_cpu = value.values_on_cpu

    def tolist(self) -> Any:
        """Return the values, as a tensor on a GPU does after waiting for it."""
        return self.values_on_cpu.tolist()

    def record_stream(self, stream: Any) -> None:
        """Do nothing: there is one stream."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


class OnCudaLookalike(TorchDispatchMode):
    """Creates tensors on the device where `device="cuda"` is asked for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU tensors, and return tensors of the device where a GPU would.

    Raises:
        RuntimeError: the tensors are on different devices.
    """
    if function is _aten._fused_sdp_choice.default:
        return 0  # the formula: the other choices are kernels
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = [x for x in given if isinstance(x, LookalikeTensor)]
    others = [x for x in given if not isinstance(x, LookalikeTensor) and x.dim() > 0 and x.device.type == "cpu"]
    if ours and others and function not in _COPIES:
        shapes = [tuple(x.shape) for x in ours], [tuple(x.shape) for x in others]
        raise RuntimeError(f"{function}: tensors on two devices, {shapes[0]} on cuda:0 and {shapes[1]} on cpu")
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        kwargs = kwargs | {"device": torch.device("cpu")}
    on_cuda = bool(ours) if device is None else torch.device(device).type == "cuda"
    real_args, real_kwargs = tree_map_only(LookalikeTensor, lambda x: x.values_on_cpu, (args, kwargs))
    known = {id(x.values_on_cpu if isinstance(x, LookalikeTensor) else x): x for x in given}
    found = function(*real_args, **real_kwargs)

    def placed(x: Tensor) -> Tensor:
        if id(x) in known:  # an operator that writes into its argument
            return known[id(x)]
        return LookalikeTensor(x) if on_cuda else x

    return tree_map_only(Tensor, placed, found)
