"""What the metadata of a `torch_dist` checkpoint may hold: Megatron's own classes, as any Python pickles them."""

from __future__ import annotations

import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, StorageMeta

from grpo_mega.formats.torch_dist_reader import MetadataUnpickler


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def unpickled(value: Any) -> Any:
    return MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()


def test_a_member_of_an_enumeration_is_read_as_early_pythons_write_it() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert unpickled(Call(getattr, _MEM_FORMAT_ENCODING, member.name)) is member
    assert unpickled(member) is member


@pytest.mark.parametrize(
    "call",
    [
        Call(getattr, _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT, "name"),
        Call(getattr, StorageMeta, "__init__"),
        Call(operator.add, 1, 2),
        Call(eval, "1"),
    ],
)
def test_nothing_else_is_called(call: Call) -> None:
    with pytest.raises(pickle.UnpicklingError, match="not part of the format"):
        unpickled(call)
