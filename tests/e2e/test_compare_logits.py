"""tools/compare_logits.py: what it says of a model with experts in a layout of two ranks, and of wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.family_configs import raw_family_config
from tests.helpers.tiny_models import make_family_model

REPOSITORY = Path(__file__).resolve().parents[2]


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/compare_logits.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("glm"), raw_family_config("glm4_moe"), seed=1)


def test_a_model_with_experts_in_two_ranks_has_the_logits_of_transformers(model: Path) -> None:
    layout = "tp=2,ep=2"
    done = compare(str(model), "--layout", layout, "--json", "--tolerance", "2e-5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["family"], found["layout"]) == ("glm4_moe", layout)
    assert 0 < found["max_abs_logit_diff"] <= 2e-5
    assert 0 < found["max_abs_log_prob_diff"] <= 2e-5


def test_a_tolerance_that_is_not_met_is_exit_code_1(model: Path) -> None:
    assert compare(str(model), "--tolerance", "1e-12").returncode == 1


def test_wrong_input_is_exit_code_2_and_one_line(model: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((str(tmp_path / "none"),), "is not a folder; give a Hugging Face model folder"),
        ((str(tmp_path),), "holds no config.json"),
        ((str(model), "--layout", "tp=3"), "parallel.tp=3 does not divide the 4 attention heads"),
        (
            (str(model), "--layout", "tp=2,sequence_parallel=false"),
            "needs sequence parallelism; set parallel.sequence_parallel=true",
        ),
        ((str(model), "--layout", "qp=2"), "--layout: 'qp=2'"),
    ):
        done = compare(*arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
