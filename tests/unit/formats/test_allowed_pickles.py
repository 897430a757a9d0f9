"""Files of a checkpoint may contain only the classes of the format, pickled by any Python; nothing else is called."""

from __future__ import annotations

import io
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, StorageMeta

from grpo_mega.formats.allowed_pickles import MetadataUnpickler, load_metadata, load_values
from grpo_mega.types import UserError


class Call:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def unpickle(value: Any) -> Any:
    return MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


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


@pytest.mark.parametrize("forced", [False, True])
def test_nothing_is_called_by_values_also_if_the_environment_disables_the_protection_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    executed = tmp_path / "executed"
    with pytest.raises(UserError, match=r"common\.pt: cannot be read .*Unsupported global: GLOBAL getattr"):
        load_values(saved({"args": Call(Path.touch, executed)}), "common.pt")
    assert not executed.exists()
    value = {"step": 3, "kl_coef": None, "tensor": torch.ones(2)}
    assert str(load_values(saved(value), "common.pt")) == str(value)


@pytest.mark.parametrize("data", [b"", b"x", pickle.dumps({"a": 1}), pickle.dumps(None)], ids=repr)
def test_damaged_metadata_is_named(data: bytes) -> None:
    with pytest.raises(UserError, match=r"step_000003/\.metadata: cannot be read"):
        load_metadata(data, "step_000003/.metadata")
