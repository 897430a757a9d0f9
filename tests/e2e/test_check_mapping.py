"""DeepSeek-V3 671B from its headers: every tensor is mapped exactly once, counted from Megatron's real modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mega.interfaces import HeldSlice
from grpo_mega.types import TensorSlice
from tests.helpers.deepseek_v3 import write_headers
from tests.helpers.family_checkpoints import make_published
from tests.helpers.jobs import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def run_tool(folder: Path, layout: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(REPOSITORY / "tools/check_mapping.py"), str(folder), "--layout", layout, "--json"]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode in (0, 1), ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return ended.returncode, found


@pytest.fixture(scope="module")
def header_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("671b")
    write_headers(folder)
    yield folder
    for path in folder.glob("*.safetensors"):  # sparse files with an apparent size of 689 GB
        path.unlink()


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        "tp=8,pp=16,ep=32,sequence_parallel=true,pipeline_layout=Et*4|(t*4|)*14tL",
        "tp=1,pp=8,ep=64,pipeline_layout=Et*8|(t*8|)*6t*5L",
    ],
)
def test_deepseek_v3_is_mapped_exactly_once_by_its_headers(header_folder: Path, layout: str) -> None:
    code, found = run_tool(header_folder, layout)
    assert (code, found["faults"]) == (0, [])
    assert found["ranks"] == 512
    assert found["parameters"] == 671_026_419_200, "with the 14,848 correction biases of the routers"
    assert found["tensors_aside"] > 3 * 256, "the multi-token-prediction layer"
    assert found["peak_bytes"] < 4 * 2**30


def test_a_tiny_model_is_mapped_exactly_once(tmp_path: Path) -> None:
    hf = make_published(tmp_path / "hf", "deepseek_v3", quantized=True)
    code, found = run_tool(hf, "tp=2,pp=2,ep=2,sequence_parallel=true")
    assert (code, found["faults"]) == (0, [])
    assert found["ranks"] == 4


def slices_of(name: str, rank: int, begin: int, rows: int, local_rows: int | None = None) -> tuple[int, HeldSlice]:
    view = torch.empty(rows if local_rows is None else local_rows, 3, device="meta")
    return rank, HeldSlice(TensorSlice(name, (begin, 0), (rows, 3)), (4, 3), view)


@pytest.mark.parametrize(
    ("slices", "faults"),
    [
        ([("a", 0, 0, 2), ("a", 1, 2, 2)], []),
        ([("a", 0, 0, 2)], ["a of shape (4, 3) has 12 elements, ranks hold 6"]),
        ([], ["a of shape (4, 3) has 12 elements, ranks hold 0"]),
        ([("a", 0, 0, 2), ("a", 1, 1, 2)], ["a[0:2, 0:3] on rank 0 and a[1:3, 0:3] on rank 1 overlap"]),
        ([("a", 0, 0, 2), ("a", 1, 3, 2)], ["a of shape (4, 3) is smaller than what ranks hold of it"]),
        ([("a", 0, 0, 4), ("b", 1, 0, 1)], ["b of no tensor of the checkpoint is on rank 1"]),
        ([("a", 0, 0, 4, 3)], ["a[0:4, 0:3] is a region of shape (3, 3) of a parameter on rank 0"]),
    ],
)
def test_gaps_overlaps_and_unknown_slices_of_a_tensor_are_reported(
    slices: list[tuple[str, int, int, int]], faults: list[str]
) -> None:
    from grpo_mega.policy.inspect.slice_mapping import faults_of_mapping

    assert set(faults) <= set(found := faults_of_mapping({"a": (4, 3)}, [slices_of(*each) for each in slices]))
    assert bool(found) == bool(faults)
