"""The metadata of a `torch_dist` checkpoint may contain only the classes of the format, pickled by any Python."""

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
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def unpickle(value: Any) -> Any:
    return MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()


def test_an_enum_member_pickled_by_an_older_python_is_read() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert unpickle(Call(getattr, _MEM_FORMAT_ENCODING, member.name)) is member
    assert unpickle(member) is member


@pytest.mark.parametrize(
    "call",
    [
        Call(getattr, _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT, "name"),
        Call(getattr, StorageMeta, "__init__"),
        Call(operator.add, 1, 2),
        Call(eval, "1"),
    ],
)
def test_other_calls_are_rejected(call: Call) -> None:
    with pytest.raises(pickle.UnpicklingError, match="not part of the format"):
        unpickle(call)
