"""tools/compare_layouts.py: layouts are parsed, wrong input is rejected, and differing tensors are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpo_mega.cli.compare_layouts import compare, main, parse_layout
from grpo_mega.types import UserError
from tests.conftest import REPOSITORY

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", {"run.world_size=1"}),
        (" tp=2", {"parallel.tp=2", "run.world_size=2"}),
        ("pp=2,cp=2,dp=3", {"parallel.pp=2", "parallel.cp=2", "run.world_size=12"}),
        ("tp=2, ep=3", {"parallel.tp=2", "parallel.ep=3", "run.world_size=6"}),
        ("dp=2,overlap_grad_reduce=true", {"parallel.overlap_grad_reduce=true", "run.world_size=2"}),
        ("pp=2,pipeline_layout=Ett|ttL", {"parallel.pp=2", 'parallel.pipeline_layout="Ett|ttL"', "run.world_size=2"}),
    ],
)
def test_a_layout_sets_keys_of_parallel_and_the_number_of_ranks(text: str, overrides: set[str]) -> None:
    assert set(parse_layout(text).overrides) == overrides


@pytest.mark.parametrize("text", ["tp", "xp=2", "tp=x", "tp=0", "dp=0", "dp=1.5"])
def test_an_invalid_layout_is_rejected(text: str) -> None:
    with pytest.raises(UserError, match="--layouts: "):
        parse_layout(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", ";"], "--layouts=';' must contain a layout; write for example 'tp=2;pp=2,cp=2'"),
        (["--layouts", "tp=2;tp=8"], "--layouts: tp=8: parallel.tp=8 does not divide the 4 attention heads"),
        (["--layouts", "tp=2;vpp=2"], "--layouts: vpp=2: parallel.vpp=2 does nothing with parallel.pp=1"),
        (["--layouts", "cp=64"], "--layouts: cp=64: train.max_tokens_per_microbatch="),
        (["--layouts", "tp=2", "--rollouts", "/nowhere"], "--rollouts=/nowhere was not found"),
        (["--layouts", "tp=2", "train.step=1"], "train.step: unknown key; did you mean train.steps?"),
    ],
)
def test_wrong_input_is_rejected_before_the_start(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    config = ["train.max_tokens_per_microbatch=100"] if "cp=64" in arguments else []
    assert main([QUICKSTART, *config, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_first_differing_tensor_is_the_first_in_checkpoint_order(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    one = {name: torch.randn(50, generator=generator) for name in ("z", "b", "a")}
    (tmp_path / "one.json").write_text(json.dumps(list(one)))
    save_file(one, tmp_path / "one")
    save_file(one | {"b": 1.001 * one["b"], "a": 1.1 * one["a"]}, tmp_path / "other")
    save_file(one | {"b": one["b"] * float("nan")}, tmp_path / "broken")
    assert compare(tmp_path / "one", tmp_path / "one", 0.0) == (None, 0.0, "")
    first, largest, largest_of = compare(tmp_path / "other", tmp_path / "one", 1e-4)
    assert (first, largest_of) == ("b", "a")
    assert largest == pytest.approx(0.1, rel=1e-4)
    assert compare(tmp_path / "other", tmp_path / "one", 1e-2)[0] == "a"
    assert compare(tmp_path / "broken", tmp_path / "one", 1e-2)[0] == "b"
