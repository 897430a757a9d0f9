"""Copies of attention sinks follow a weight sync; vLLM's own code makes and renews them."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from grpo_mega.engines.vllm.attention_sinks import sink_copies
from grpo_mega.engines.vllm.regions import declare_regions

BACKENDS = ("flashinfer", "b12x")


def step_after_loading(module: str) -> Any:
    """Return `process_weights_after_loading` of an attention backend, whose module cannot be imported without CUDA."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("vLLM is not installed here")
    root = Path(spec.submodule_search_locations[0])
    tree = ast.parse((root / "v1" / "attention" / "backends" / f"{module}.py").read_text())
    (method,) = [
        node
        for each in tree.body
        if isinstance(each, ast.ClassDef)
        for node in each.body
        if isinstance(node, ast.FunctionDef) and node.name == "process_weights_after_loading"
    ]
    names: dict[str, Any] = {"torch": torch}
    exec(ast.unparse(method), names)
    return names[method.name]


class Attention(nn.Module):
    """Stub of vLLM's layer: it has the parameter, and its backend reads a copy."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(8, dtype=torch.bfloat16), requires_grad=False)
        self.attn = nn.Module()
        step = step_after_loading(module)

        class Backend:
            process_weights_after_loading = step

        backend: Any = Backend()
        backend._sinks_source, backend.sinks = self.sinks, None
        backend.process_weights_after_loading(torch.bfloat16)
        self.attn.impl = backend


@pytest.mark.parametrize("module", BACKENDS)
def test_a_copy_is_found_is_stale_after_a_write_and_is_renewed_in_place(module: str) -> None:
    model = nn.Module()
    model.layer = Attention(module)
    (copy,) = sink_copies(model)
    assert copy.parameter == "layer.sinks"
    assert copy.difference() is None
    address = model.layer.attn.impl.sinks.data_ptr()
    model.layer.sinks.data[2:5] += 1  # a sync writes the parameter
    assert copy.difference() == "3 of 8 attention sinks differ from the parameter"
    copy.rebuild()
    assert copy.difference() is None
    assert model.layer.attn.impl.sinks.data_ptr() == address
    model.layer.attn.impl.sinks.fill_(float("nan"))  # memory of an engine that slept
    assert copy.difference() is not None


def test_a_backend_that_reads_the_parameter_needs_no_copy() -> None:
    model = nn.Module()
    model.sinks = nn.Parameter(torch.randn(8))
    model.attn = nn.Module()
    model.attn.impl = SimpleNamespace(sinks=model.sinks)
    assert sink_copies(model) == []


def test_an_unknown_copy_is_an_error_with_the_name_of_the_layer() -> None:
    model = nn.Module()
    model.sinks = nn.Parameter(torch.randn(8))
    model.attn = nn.Module()
    model.attn.impl = SimpleNamespace(sinks=model.sinks.detach().clone())
    with pytest.raises(RuntimeError, match=r"SimpleNamespace of attn computes with a copy of its attention sinks"):
        sink_copies(model)


def test_the_regions_of_a_model_include_the_copies_of_its_sinks() -> None:
    model = nn.Module()
    model.layer = Attention("flashinfer")
    regions = declare_regions(model, None)
    model.layer.sinks.data += 1
    assert list(regions.probe()) == ["layer.sinks"]
    regions.rebuild()
    assert regions.probe() == {}
