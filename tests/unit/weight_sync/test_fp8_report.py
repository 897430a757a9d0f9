"""The FP8 error report equals quantization by hand, and the tool prints the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_mega.cli import fp8_report as tool
from grpo_mega.quantization.block_fp8 import dequantize, quantize
from grpo_mega.types import TensorSlice
from grpo_mega.weight_sync.fp8_report import by_layer, fp8_report, table_lines
from tests.helpers.fp8_weights import DOWN, O, Q, Source, weights
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tiny_models import make_tiny_model

QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


def test_the_report_holds_the_error_of_each_matrix() -> None:
    whole = [(TensorSlice(name, (0, 0), tuple(weights()[name].shape)), True) for name in (Q, O, DOWN)]
    report = fp8_report(Source(weights(), whole), None, power_of_two=False)
    assert list(report) == [Q, O, DOWN]
    for name, found in report.items():
        value = weights()[name].bfloat16()
        error = (dequantize(*quantize(value)).double() - value.double()).abs()
        assert found["largest"] == float(error.max())
        assert found["relative"] == pytest.approx(float(error.norm() / value.double().norm()), rel=1e-12)
        assert 0.01 < found["relative"] < 0.04  # three bits of mantissa


REPORT = {
    "model.layers.0.a.weight": {"relative": 0.01, "largest": 0.5},
    "model.layers.10.a.weight": {"relative": 0.03, "largest": 0.1},
    "model.layers.10.b.weight": {"relative": 0.02, "largest": 0.2},
    "model.layers.2.a.weight": {"relative": 0.02, "largest": 0.1},
}


def test_layers_are_reported_in_order_with_their_worst_matrix() -> None:
    rows = by_layer(REPORT)
    assert [(row.layer, row.matrices) for row in rows] == [(0, 1), (2, 1), (10, 2)]
    assert (rows[2].median, rows[2].worst, rows[2].largest) == (0.025, 0.03, 0.2)
    assert rows[2].worst_name == "model.layers.10.a.weight"
    lines = list(table_lines(REPORT))
    assert len(lines) == 1 + 3 + 1
    assert lines[-1].split() == ["all", "4", "2.0000%", "3.0000%", "model.layers.10.a.weight", "0.5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("report") / "model")


def run_tool(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    code = tool.main([*arguments, "--json"])
    streams = capsys.readouterr()
    return code, json.loads(streams.out.splitlines()[-1]) if code == 0 else None, streams.err


@pytest.mark.parametrize("scales", ["fp32", "power_of_two"])
def test_the_tool_reports_the_matrices_of_the_files(
    capsys: pytest.CaptureFixture[str], model: Path, scales: str
) -> None:
    code, found, _ = run_tool(capsys, str(model), "--scales", scales)
    assert (code, found["scales"]) == (0, scales)
    stored = load_file(model / "model.safetensors")
    assert set(found["tensors"]) == {name for name in stored if "_proj.weight" in name}
    name = "model.layers.1.mlp.up_proj.weight"
    value = stored[name].bfloat16()
    error = dequantize(*quantize(value, power_of_two=scales == "power_of_two")).double() - value.double()
    assert found["tensors"][name]["largest"] == float(error.abs().max())
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    assert all(layer["matrices"] == 7 for layer in found["layers"])


def test_folder_and_scales_are_read_from_a_config(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    given = ["model.base=null", f"model.path={model}", "precision.dtype=bf16", "engine.fp8=scales_power_of_two"]
    code, found, _ = run_tool(capsys, str(QUICKSTART), *given)
    assert (code, found["scales"], found["model"]) == (0, "power_of_two", str(model))


def test_invalid_input_ends_with_one_message(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((model / "config.json").read_text())
    for arguments, message in (
        ([str(tmp_path / "nothing")], "has no config.json"),
        ([str(QUICKSTART)], "has a model.base"),
        ([str(model), "train.steps=3"], "train.steps=3 overrides a config key"),
        ([str(broken)], "model.layers.0.mlp.up_proj.weight has a value that is not finite"),
    ):
        code, _, error = run_tool(capsys, *arguments)
        assert code == 2
        assert message in error
        assert "Traceback" not in error
