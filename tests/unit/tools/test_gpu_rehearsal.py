"""The rehearsal of tools/gpu_proof.py: its parts on the CPU, with the real policy, and what its comparisons find.

The long tier runs every part, the default tier four of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.guides import shell_blocks
from tests.helpers.jobs import REPOSITORY
from tools.gpu_checks.part_job import PartJob
from tools.gpu_checks.parts import PARTS
from tools.gpu_checks.result_file import ResultFile

REHEARSED = [part.name for part in PARTS.values() if part.rehearsable]
SOME = ["machine", "bf16", "log_probs", "checkpoint"]
MEASUREMENTS = REPOSITORY / "docs" / "measurements"


REHEARSE = ["--rehearse", "--minutes", "12"]


def test_the_commands_of_the_guide_are_those_that_are_tested() -> None:
    """test_gpu_kit.py runs the first two, for this Python and as a rehearsal; this file runs the third (long tier)."""
    commands = [line for block in shell_blocks("gpu-check.md") for line in block.splitlines()]
    assert commands == [
        "launch/gpu_proof_kit.sh --python 3.12 --out gpu-proof-kit",
        "python tools/gpu_proof.py --minutes 12 --wheels gpu-proof-kit",
        " ".join(["launch/tool.sh gpu_proof", *REHEARSE]),
    ]


@dataclass(frozen=True)
class Rehearsal:
    """Output folder and parts of a rehearsal."""

    out: Path
    parts: list[str]

    def result_of(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / f"rehearsal_{part}.json").read_text())
        return found


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.long)])
def rehearsal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """Rehearse the twelve minutes."""
    out = tmp_path_factory.mktemp("rehearsal")
    before = sorted(MEASUREMENTS.iterdir())
    parts = REHEARSED if request.param == "all" else SOME
    chosen = [] if parts is REHEARSED else ["--parts", ",".join(parts)]
    command = [sys.executable, "tools/gpu_proof.py", *REHEARSE, *chosen, "--out", str(out)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    (out / "table").write_text(done.stdout)
    (out / "code").write_text(f"{done.returncode} {done.stderr}")
    assert sorted(MEASUREMENTS.iterdir()) == before
    return Rehearsal(out, parts)


def test_every_part_runs_and_its_file_says_that_it_is_a_rehearsal(rehearsal: Rehearsal) -> None:
    for part in rehearsal.parts:
        found = rehearsal.result_of(part)
        assert found["status"] == "rehearsed", found.get("why")
        assert found["rehearsal"] is True
        assert found["conditions"]["device"] == "cpu, rehearsal: says nothing about a GPU"
        assert found["numbers"], part
        assert [check["name"] for check in found["checks"] if check["passed"] is False] == []


def test_the_command_exits_with_zero_and_prints_a_table(rehearsal: Rehearsal) -> None:
    assert (rehearsal.out / "code").read_text() == "0 "
    rows = (rehearsal.out / "table").read_text().splitlines()[-len(rehearsal.parts) :]
    assert sorted(row.split()[:2] for row in rows) == sorted([part, "rehearsed"] for part in rehearsal.parts)
    assert list(rehearsal.out.glob("gpu_*")) == []
    summary = json.loads((rehearsal.out / "rehearsal_check.json").read_text())
    assert summary["rehearsal"] is True
    assert set(summary["parts"]) == set(rehearsal.parts)


def test_a_step_is_planned_although_the_part_is_a_rank(rehearsal: Rehearsal) -> None:
    """Modules are counted in a fake process group, which must be done before the real one exists."""
    for part in [name for name in ("bf16", "fp8") if name in rehearsal.parts]:
        numbers = rehearsal.result_of(part)["numbers"]
        assert numbers["bf16"]["planned"]["train_allocated_bytes"] > numbers["bf16"]["state_bytes"]["optimizer"]
        assert numbers["bf16"]["mfu"] > 0
        if part == "fp8":
            assert {entry["status"] for entry in numbers["recipes"].values()} == {"not rehearsed"}


def test_packed_rows_are_compared_with_transformers_in_every_family(rehearsal: Rehearsal) -> None:
    found = rehearsal.result_of("log_probs")
    numbers = found["numbers"]
    assert numbers.keys() == {"dense", "moe", "mla"}
    for family in numbers.values():
        assert family["fp32"]["max_abs"] < 1e-5  # the CPU is far below the limit of a GPU
        assert 1e-3 < family["bf16"]["mean_abs"] < 0.1
        assert family["control_mean_abs"] > 0.3
        assert family["fp32"]["gradient_tensors"] > 20
    assert len(found["checks"]) == 5 * len(numbers)


def test_state_is_compared_by_digests(rehearsal: Rehearsal) -> None:
    least = {"offload": 4, "checkpoint": 6, "reference": 5, "digests": 2, "cuda_ipc": 1}
    for part in least.keys() & set(rehearsal.parts):
        made = [check for check in rehearsal.result_of(part)["checks"] if check["passed"]]
        assert len(made) >= least[part], part


@pytest.fixture
def job(tmp_path: Path) -> PartJob:
    result = ResultFile(tmp_path / "answer.json", "log_probs", rehearsal=True)
    return PartJob("log_probs", "tiny", "cpu", result, torch.device("cpu"))


def family_numbers(**changes: Any) -> dict[str, Any]:
    exact = {"max_abs": 1e-6, "mean_abs": 1e-7, "gradient": 1e-6}
    rounded = {"max_abs": 0.05, "mean_abs": 0.01, "gradient": 0.01}
    found = {"fp32": exact, "bf16": rounded, "transformers_bf16": rounded, "control_mean_abs": 0.5}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        found[section] = {**found[section], key: value} if key else value  # type: ignore[dict-item]
    return found


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"fp32__max_abs": 2e-4}, ["fp32 log-probs"]),
        ({"fp32__max_abs": float("nan")}, ["fp32 log-probs"]),
        ({"fp32__gradient": 1e-3}, ["fp32 gradient"]),
        ({"bf16__mean_abs": 0.03}, ["bf16 log-probs"]),
        ({"bf16__gradient": float("nan")}, ["bf16 gradient"]),
        ({"control_mean_abs": 0.03}, ["control"]),
    ],
)
def test_a_difference_above_its_limit_fails_the_part(job: PartJob, changes: dict[str, Any], failed: list[str]) -> None:
    from tools.gpu_checks.packed_rows import add_checks

    add_checks(job, "dense", family_numbers(**changes))
    job.result.close()
    names = [check["name"] for check in job.result.content["checks"] if not check["passed"]]
    assert [name.removeprefix("dense: ").startswith(start) for name, start in zip(names, failed, strict=True)] == [
        True
    ] * len(failed)
    assert job.result.content["status"] == ("failed" if failed else "rehearsed")


def test_differences_count_every_tensor_and_reject_a_missing_one() -> None:
    from tools.gpu_checks.packed_rows import Scores, differences

    log_probs = torch.tensor([-1.0, -2.0])
    expected = Scores(log_probs, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])})
    found = Scores(log_probs + torch.tensor([0.0, 0.25]), {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([4.0])})
    assert differences(found, expected) == {
        "max_abs": 0.25,
        "mean_abs": 0.125,
        "gradient": pytest.approx(0.2),
        "gradient_tensors": 2,
    }
    unused_expert = replace(found, gradient=found.gradient | {"expert": torch.zeros(2)})
    assert differences(unused_expert, expected)["gradient_tensors"] == 2
    with pytest.raises(AssertionError, match=r"one side only: \['b'\]"):
        differences(replace(found, gradient={"a": torch.ones(2)}), expected)


def test_weights_of_a_packed_row_leave_out_the_last_token_of_each_sequence() -> None:
    from tools.gpu_checks.packed_rows import packed_row, token_weights

    row = packed_row([[5, 6, 7], [8, 9]])
    assert row.loss_mask.tolist() == [True, True, False, True, False]
    assert row.labels[row.loss_mask].tolist() == [6, 7, 9]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 3, 5]
    assert torch.equal(row.token_weights[row.loss_mask], token_weights(3))
    assert row.token_weights[~row.loss_mask].tolist() == [0.0, 0.0]


def test_digests_of_state_change_with_every_bit_and_tensor_order() -> None:
    from tools.gpu_checks.trained_policy import flat_digest

    values = torch.randn(2500, generator=torch.Generator().manual_seed(0))
    digest = flat_digest(values)
    assert flat_digest(values.view(50, 50).clone()) == digest
    for index in (0, 1023, 1024, 2499):  # in the matrix and in the rest
        other = values.clone()
        other[index] = -other[index]
        assert flat_digest(other) != digest
    assert flat_digest(values.flip(0)) != digest
