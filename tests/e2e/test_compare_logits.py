"""tools/compare_logits.py: a model with experts on two ranks, quantized weights, and wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grpo_mega.cli.compare_logits import main
from grpo_mega.quantization import block_fp8
from tests.helpers.family_checkpoints import make_published_mxfp4
from tests.helpers.family_configs import FAMILY_CONFIGS, raw_family_config
from tests.helpers.tiny_models import make_family_model

REPOSITORY = Path(__file__).resolve().parents[2]


def run_compare_logits(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/compare_logits.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("glm"), raw_family_config("glm4_moe"), seed=1)


def test_a_model_with_experts_in_two_ranks_has_the_logits_of_transformers(model: Path) -> None:
    layout = "tp=2,ep=2"
    done = run_compare_logits(str(model), "--layout", layout, "--json", "--tolerance", "2e-5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["family"], found["layout"]) == ("glm4_moe", layout)
    assert 0 < found["max_abs_logit_diff"] <= 2e-5
    assert 0 < found["max_abs_log_prob_diff"] <= 2e-5


@pytest.mark.long
def test_a_tolerance_that_is_not_met_is_exit_code_1(model: Path) -> None:
    assert run_compare_logits(str(model), "--tolerance", "1e-12").returncode == 1


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("layout", ["tp=2,pp=2", "cp=2,pp=2", "tp=2,dp=2"])
def test_every_family_has_the_logits_of_transformers(tmp_path: Path, family: str, layout: str) -> None:
    folder = make_family_model(tmp_path / family, raw_family_config(family), seed=2)
    done = run_compare_logits(str(folder), "--layout", layout, "--json", "--tolerance", "2e-5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["family"] == family


@pytest.mark.long
def test_fp8_weights_are_compared_by_their_dequantized_values(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[name + block_fp8.SCALE_SUFFIX] = block_fp8.quantize(tensors[name])
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(raw_family_config("glm4_moe", quantization_config=quantized)))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run_compare_logits(str(tmp_path), "--json", "--tolerance", "2e-5")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_mxfp4_experts_are_compared_by_their_dequantized_values(tmp_path: Path) -> None:
    folder = make_published_mxfp4(tmp_path / "model", hidden_size=64, intermediate_size=96)
    done = run_compare_logits(str(folder), "--layout", "tp=2,ep=2", "--json", "--tolerance", "2e-5")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected_message"),
    [
        (("MODEL", "--layout", "tp=3"), "parallel.tp=3 does not divide the 4 attention heads"),
        (("MODEL", "--layout", "ep=3"), "parallel.ep=3 does not divide the 8 experts"),
        (
            ("MODEL", "--layout", "tp=2,sequence_parallel=false"),
            "needs sequence parallelism; set parallel.sequence_parallel=true",
        ),
        (("MODEL", "--layout", "qp=2"), "--layout: 'qp=2'"),
        (("EMPTY",), "has no config.json"),
        (("EMPTY/none",), "must be a folder; give a Hugging Face model folder"),
    ],
)
def test_wrong_input_is_exit_code_2_and_one_line(
    arguments: tuple[str, ...], expected_message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw_family_config("glm4_moe")))
    paths = {"MODEL": "model", "EMPTY": "empty", "EMPTY/none": "empty/none"}
    given = [str(tmp_path / paths[a]) if a in paths else a for a in arguments]
    assert main(given) == 2
    stderr = capsys.readouterr().err
    assert expected_message in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
