"""tools/gpu_proof.py without a GPU: arguments, deadline, failed and hanging parts, and what a run leaves behind.

The parts are stubs here; tests/unit/tools/test_gpu_rehearsal.py runs the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.config.model_sections import ArchitectureConfig
from grpo_mega.engines.engine_rules import check_engine_fp8
from grpo_mega.models.tiny_recipe import recipe_spec
from grpo_mega.types import UserError
from tests.helpers.jobs import REPOSITORY
from tools import gpu_proof
from tools.gpu_checks import part_job, subject
from tools.gpu_checks.deadline import RESERVE_SECONDS, Deadline, RealClock, SimulatedClock
from tools.gpu_checks.parts import PARTS, CheckPart
from tools.gpu_checks.result_file import ResultFile

WITHOUT_GPU = pytest.mark.skipif(gpu_proof.has_gpu(), reason="this machine has GPUs")
Run = Callable[..., tuple[int, dict[str, Any]]]
STUB = """
import json, os, subprocess, sys, time
part, size, gpu, answer, *options = sys.argv[1:]
result = {"part": part, "status": "rehearsed" if options else "measured", "numbers": {"size": size, "gpu": gpu}}
def write(**more):
    with open(answer, "w") as file:
        json.dump(result | more, file)
if part == "cuda_ipc":
    write(status="running", numbers={"half": 1})
    sys.exit("ImportError: no peers")
if part == "offload" and os.environ.get("HANG"):
    write(status="running", numbers={"half": 1})
    children = [subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(2)]
    with open(os.environ["HANG"], "w") as file:
        file.write("\\n".join(str(child.pid) for child in children))
    time.sleep(300)
if part == "digests":
    os.kill(os.getpid(), 11)
if part == "reference":
    write(status="failed", why="checks that failed: weights")
elif part == "checkpoint":
    write(status="running")
else:
    write(main="fine")
"""


@pytest.fixture
def run_stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command with stubs of the parts: its exit code and results."""
    (tmp_path / "stub_part.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_proof, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_proof, "PROGRAM", "stub_part")

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = gpu_proof.main([*arguments, "--out", str(tmp_path / "out"), "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {name: result["status"] for name, result in results.items()}


@WITHOUT_GPU
def test_without_a_gpu_nothing_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_proof.main(["--out", str(tmp_path / "out"), "--json"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    (message,) = streams.err.splitlines()
    assert "run it on a machine with a GPU" in message
    assert not (tmp_path / "out").exists()


@WITHOUT_GPU
@pytest.mark.parametrize("part", ["machine", "engine"])
def test_a_part_started_alone_exits_without_a_gpu(part: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-m", gpu_proof.PROGRAM, part, "small", "h100-80g", str(answer)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "no CUDA device: tools/gpu_proof.py measures on GPUs only\n")
    assert not answer.exists()


@WITHOUT_GPU
def test_a_job_without_a_gpu_is_a_rehearsal_or_an_error(tmp_path: Path) -> None:
    result = ResultFile(tmp_path / "answer.json", "bf16", rehearsal=False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        part_job.PartJob.start("bf16", "small", "h100-80g", result, rehearsal=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "bf16,fp16"], "fp16 is not a part; use machine, cuda_ipc, log_probs, offload, checkpoint"),
        (["--parts", ""], "--parts=: must name at least one part"),
        (["--gpu", "h101", "--rehearse"], "--gpu=h101 is not a known device; use one of a100-80g"),
        (["--minutes", "0"], "--minutes=0.0: must be positive"),
        (["--minutes", "nan"], "--minutes=nan: must be positive"),
        (["--rehearse", "--parts", "engine"], "engine is not supported with --rehearse"),
        (["--rehearse", "--out", str(REPOSITORY / "docs" / "measurements" / "gpu")], "must not write into docs/meas"),
        (["--rehearse", "--wheels", "/nowhere"], "--wheels=/nowhere: must hold wheels"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert gpu_proof.main([*arguments, *out]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_part_keeps_its_numbers_and_does_not_affect_the_others(run_stubs: Run, tmp_path: Path) -> None:
    """The result file of an earlier run is replaced."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu_cuda_ipc.json").write_text('{"status": "measured"}')
    code, results = run_stubs("--parts", "machine,cuda_ipc,checkpoint,reference,digests,bf16")
    assert code == 1
    assert statuses(results) == {
        "machine": "measured",
        "cuda_ipc": "failed",
        "checkpoint": "failed",
        "reference": "failed",
        "digests": "failed",
        "bf16": "measured",
    }
    written = json.loads((out / "gpu_cuda_ipc.json").read_text())
    assert written == results["cuda_ipc"]
    assert written["numbers"] == {"half": 1}
    assert "exit code 1\nImportError: no peers" in written["why"]
    assert results["checkpoint"]["why"] == "the part wrote no complete result"
    assert results["reference"]["why"] == "checks that failed: weights"
    assert "SIGSEGV" in results["digests"]["why"]
    assert json.loads((out / "gpu_check.json").read_text())["parts"] == results
    _, _, row, *_ = gpu_proof.table_of(results).splitlines()
    assert row.split(maxsplit=3)[::3] == ["cuda_ipc", "exit code 1: ImportError: no peers"]


def test_a_hanging_part_is_stopped_with_its_children(
    run_stubs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The children have left the session of the part."""
    part = PARTS["offload"]
    monkeypatch.setenv("HANG", str(tmp_path / "children"))
    monkeypatch.setitem(PARTS, "offload", CheckPart(part.name, part.module, part.shows, 1.0, 2.0))
    code, results = run_stubs("--parts", "offload,bf16")
    assert code == 1
    assert statuses(results) == {"offload": "failed", "bf16": "measured"}
    assert "stopped after 2 s" in results["offload"]["why"]
    assert results["offload"]["numbers"] == {"half": 1}
    children = (tmp_path / "children").read_text().split()
    assert len(children) == 2
    assert [child for child in children if is_running(child)] == []


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_parts_that_no_longer_fit_are_skipped_with_the_reason(run_stubs: Run, tmp_path: Path) -> None:
    """The clock of a rehearsal is simulated: after 40, 110 and 45 s, and 5 s kept, 120 s do not fit into 4 minutes."""
    code, results = run_stubs("--rehearse", "--minutes", "4", "--parts", "machine,bf16,log_probs,offload")
    assert code == 1
    assert results["bf16"]["status"] == "skipped"
    assert results["bf16"]["why"] == "--minutes=4: 40 s are left, and the part is expected to take 120 s"
    assert list(results) == ["machine", "log_probs", "offload", "bf16"]  # the order of the check
    assert {name for name, status in statuses(results).items() if status == "rehearsed"} == set(results) - {"bf16"}
    files = sorted(path.name for path in (tmp_path / "out").glob("*.json"))
    assert files == sorted(f"rehearsal_{name}.json" for name in (*results, "check"))
    for name in results:
        assert json.loads((tmp_path / "out" / f"rehearsal_{name}.json").read_text())["rehearsal"] is True


def test_a_part_that_ends_at_once_still_takes_its_expected_time(
    run_stubs: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds of a result are rounded to tenths: a quick part reports 0.0 s."""
    real = gpu_proof.run_limited
    monkeypatch.setattr(gpu_proof, "run_limited", lambda *args: replace(real(*args), seconds=0.01))
    _, results = run_stubs("--rehearse", "--minutes", "4", "--parts", "machine,bf16,log_probs,offload")
    assert results["bf16"]["status"] == "skipped"
    assert results["offload"] == {**results["offload"], "status": "rehearsed", "seconds": 0.0}


def test_a_missing_package_counts_only_for_parts_that_were_named(run_stubs: Run) -> None:
    code, results = run_stubs("--parts", "machine,fp8")
    assert code == 1
    assert results["fp8"]["status"] == "not installed"
    assert results["fp8"]["why"] == "transformer_engine is not installed"
    assert gpu_proof._is_good("not installed", named=False)
    assert not gpu_proof._is_good("skipped", named=False)


def test_the_default_parts_fit_into_twelve_minutes() -> None:
    parts = [part for part in PARTS.values() if part.default and part.needs in ("", "transformer_engine")]
    assert sum(part.expected_seconds for part in parts) + RESERVE_SECONDS <= 12 * 60
    assert all(part.limit_seconds >= 2 * part.expected_seconds for part in parts)


def test_a_part_is_stopped_at_the_deadline_or_at_its_own_limit() -> None:
    clock = SimulatedClock()
    deadline, part = Deadline(2.0, clock), CheckPart("a", "a", "", expected_seconds=50.0, limit_seconds=100.0)
    assert deadline.limit_of(part) == 100.0
    clock.after(part)
    assert deadline.reason_to_skip(part) == ""
    assert deadline.limit_of(part) == 120.0 - 50.0 - RESERVE_SECONDS
    clock.after(part)
    assert "15 s are left" in deadline.reason_to_skip(part)
    unlimited = Deadline(None, RealClock())
    assert unlimited.reason_to_skip(part) == ""
    assert unlimited.limit_of(part) == 100.0


def test_the_final_status_follows_from_the_checks(tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    for passed, rehearsal, status in (
        (True, False, "measured"),
        (True, True, "rehearsed"),
        (None, True, "rehearsed"),
        (False, True, "failed"),
        (False, False, "failed"),
    ):
        result = ResultFile(path, "digests", rehearsal=rehearsal)
        assert json.loads(path.read_text())["status"] == "running"
        result.check("digests", 1, 2, passed=passed, reason="")
        result.close()
        assert json.loads(path.read_text())["status"] == status
    assert json.loads(path.read_text())["why"] == "checks that failed: digests"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H20", "h20-96g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA B200", "b200-180g"),
    ],
)
def test_the_planners_name_of_a_gpu_is_found(device: str, name: str) -> None:
    assert part_job.planner_name(device) == name


def test_an_unknown_gpu_must_be_named() -> None:
    with pytest.raises(UserError) as error:
        part_job.planner_name("NVIDIA L40S")
    assert "--gpu" in str(error.value)
    assert "NVIDIA L40S" in str(error.value)
    assert "h200-141g" in error.value.remedy


def test_rows_of_the_measured_batch_are_full(tmp_path: Path) -> None:
    """The config loads, and every row has the maximum length."""
    (tmp_path / "model").mkdir()
    config = subject.config_of("1b", tmp_path / "model", "precision.fp8.recipe=mxfp8")
    batch, objective = subject.batch_of(subject.random_groups("1b", vocab_size=100), config)
    assert not objective.algorithm.needs_reference
    tokens = [len(microbatch.token_ids) for microbatch in batch.microbatches]
    assert sum(tokens) == subject.BATCHES["1b"].tokens
    assert set(tokens) == {config.train.max_tokens_per_microbatch}
    assert all(count % 32 == 0 for count in tokens)


@pytest.mark.parametrize("size", ["small", "1b"])
def test_measured_models_support_fp8_engines(size: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = subject.config_of(size, tmp_path / "model", "engine.fp8=scales_fp32")
    architecture: ArchitectureConfig = subject.SHAPES[size]
    check_engine_fp8(recipe_spec(architecture), config, "the model", latent_split=False)
