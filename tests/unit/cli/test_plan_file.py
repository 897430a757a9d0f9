"""A plan file is read back as the same plan, and two plans are compared line by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_mega.cli.plan_file import difference, read_plan, slice_from_text, write_plan
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import TensorSlice, UserError
from grpo_mega.weight_sync.plan import ReshardPlan, plan_reshard
from tests.helpers.weight_layouts import TENSORS, EngineLayout, engine, policy


def plan_to(layout: EngineLayout) -> ReshardPlan:
    return plan_reshard(TENSORS, policy(Topology(4, tp=2, pp=2)), engine(layout, 4), (0, 0, 1, 1), 1 << 18)


def test_a_plan_that_was_written_is_read_back_as_the_same_plan(tmp_path: Path) -> None:
    plan = plan_to(EngineLayout(2))
    write_plan(plan, tmp_path / "plan.json", {"note": 1})
    again = read_plan(tmp_path / "plan.json")
    assert again.hash == plan.hash
    assert again.traffic.bytes_by_link() == plan.traffic.bytes_by_link()
    assert difference(again, plan) == []
    assert json.loads((tmp_path / "plan.json").read_text())["summary"] == {"note": 1}


def test_each_slice_has_a_line_with_sender_receiver_and_bucket(tmp_path: Path) -> None:
    write_plan(plan_to(EngineLayout(2)), tmp_path / "plan.json", {})
    lines = (tmp_path / "plan.json").read_text().splitlines()
    (norm,) = [line for line in lines if line.startswith('  "norm[0:192]"')]
    transfers = json.loads("{" + norm.rstrip(",") + "}")["norm[0:192]"]
    assert [(dst, src == dst, bucket == -1) for src, dst, bucket in transfers] == [
        (0, False, False),
        (1, False, False),
        (2, True, True),
        (3, True, True),
    ]


def test_plans_that_differ_name_the_slices() -> None:
    found = difference(plan_to(EngineLayout(2)), plan_to(EngineLayout(4)))
    assert any(line.startswith("0.up[") and "missing" in line for line in found)
    assert not any(line.startswith("0.norm[") for line in found if "missing" in line)


@pytest.mark.parametrize("text", ["w[0:2, 3:5]", "model.layers.0.mlp.experts.3.up_proj.weight[7:8]"])
def test_a_written_slice_is_read_back_unchanged(text: str) -> None:
    assert str(slice_from_text(text)) == text


def test_a_slice_keeps_name_offsets_and_shape() -> None:
    assert slice_from_text("w[0:2, 3:5]") == TensorSlice("w", (0, 3), (2, 2))


@pytest.mark.parametrize("text", ["", "{}", '{"tensors": {}, "transfers": {"x[0:1]": [[0, 0, 0]]}, "nodes": []}'])
def test_a_file_that_is_not_a_plan_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json: not a plan of tools/plan_sync\.py"):
        read_plan(tmp_path / "plan.json")
