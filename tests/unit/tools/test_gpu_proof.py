"""tools/gpu_proof.py without a GPU: it exits without a number; a failed part does not affect the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.config.model_sections import ArchitectureConfig
from grpo_mega.engines.engine_rules import check_engine_fp8
from grpo_mega.models.tiny_recipe import recipe_spec
from tests.helpers.jobs import REPOSITORY
from tools import gpu_proof
from tools.gpu_checks import subject

WITHOUT_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="this machine has GPUs")


@WITHOUT_GPU
def test_without_a_gpu_nothing_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_proof.main(["--out", str(tmp_path / "out"), "--json"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    (message,) = streams.err.splitlines()
    assert "run it on a machine with a GPU" in message
    assert not (tmp_path / "out").exists()


@WITHOUT_GPU
@pytest.mark.parametrize("part", gpu_proof.PARTS)
def test_a_part_started_alone_exits_without_a_gpu(part: str, tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-m", gpu_proof.PROGRAM, part, "small", "h100-80g", str(answer)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "no CUDA device: tools/gpu_proof.py measures on GPUs only\n")
    assert not answer.exists()


@WITHOUT_GPU
@pytest.mark.parametrize("measure", [subject.conditions, lambda: subject.seconds_of(lambda: None)])
def test_helpers_raise_without_a_gpu(measure: object) -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        measure()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--parts", "bf16,fp16"],
            "fp16 is not a part; use bf16, fp8, engine, engine_fp8, engine_sglang",
        ),
        (["--parts", ""], "--parts=: must name at least one part"),
        (["--gpu", "h101"], "--gpu=h101 is not a known device; use one of a100-80g"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_proof.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_failed_part_writes_its_reason_and_does_not_affect_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The parts are stubs. The result file of an earlier run is replaced."""
    (tmp_path / "stub_part.py").write_text(
        "import json, sys\n"
        "part, size, gpu, answer = sys.argv[1:]\n"
        "if part == 'fp8':\n"
        "    sys.exit('ImportError: no transformer_engine')\n"
        "open(answer, 'w').write(json.dumps({'part': part, 'status': 'measured', 'numbers': {}}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_proof, "num_visible_gpus", lambda env: 1)
    monkeypatch.setattr(gpu_proof, "PROGRAM", "stub_part")
    out = tmp_path / "out"
    out.mkdir()
    (out / "gpu_fp8.json").write_text('{"status": "measured"}')
    assert gpu_proof.main(["--out", str(out), "--json"]) == 1
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {part: result["status"] for part, result in results.items()} == {
        "bf16": "measured",
        "fp8": "failed",
        "engine": "measured",
        "engine_fp8": "measured",
    }
    assert "no transformer_engine" in json.loads((out / "gpu_fp8.json").read_text())["why"]


def test_rows_of_the_measured_batch_are_full(tmp_path: Path) -> None:
    """The config loads, and every row has the maximum length."""
    (tmp_path / "model").mkdir()
    config = subject.config_of(tmp_path / "model", "precision.fp8.recipe=mxfp8")
    batch, objective = subject.batch_of(subject.random_groups(vocab_size=100), config)
    assert not objective.algorithm.needs_reference
    tokens = [len(microbatch.token_ids) for microbatch in batch.microbatches]
    assert sum(tokens) == subject.NUM_PROMPTS * subject.GROUP_SIZE * (subject.PROMPT_TOKENS + subject.COMPLETION_TOKENS)
    assert set(tokens) == {config.train.max_tokens_per_microbatch}
    assert all(count % 32 == 0 for count in tokens)


@pytest.mark.parametrize("size", subject.SHAPES)
def test_measured_models_support_fp8_engines(size: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = subject.config_of(tmp_path / "model", "engine.fp8=scales_fp32")
    shape = {
        name: value for name, value in vars(subject.SHAPES[size]).items() if name in ArchitectureConfig.model_fields
    }
    check_engine_fp8(recipe_spec(ArchitectureConfig(**shape)), config, "the model")
