"""Pickles of tensors for SGLang's schedulers."""

from __future__ import annotations

import pickle
import pickletools

import pytest
import torch
import torch.storage

from grpo_mega.engines.sglang.messages import pickled_tensors


def safe_load_from_bytes(data: bytes) -> None:
    """Stub of Megatron's function."""
    del data


def test_a_pickle_names_torch_s_own_function_whatever_a_library_put_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = torch.storage._load_from_bytes
    monkeypatch.setattr(torch.storage, "_load_from_bytes", safe_load_from_bytes)
    data = pickled_tensors([("name", torch.arange(3))])
    assert torch.storage._load_from_bytes is safe_load_from_bytes
    words = {str(value) for _, value, _ in pickletools.genops(data) if isinstance(value, str)}
    assert {"torch.storage", "_load_from_bytes"} <= words
    assert "safe_load_from_bytes" not in words
    monkeypatch.setattr(torch.storage, "_load_from_bytes", original)
    ((name, tensor),) = pickle.loads(data)
    assert (name, tensor.tolist()) == ("name", [0, 1, 2])
