"""tools/gpu_proof.py on a GPU: every part is measured, and its numbers are within the limits of a training run.

A part that needs a package of another environment is skipped.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_proof
from tools.gpu_checks.parts import PARTS

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(3600)]


def numbers_of(part: str, folder: Path) -> dict[str, Any]:
    needed = PARTS[part].needs
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    code = gpu_proof.main(["--parts", part, "--size", "small", "--out", str(folder)])
    result = json.loads((folder / f"gpu_{part}.json").read_text())
    assert code == 0, result.get("why")
    numbers: dict[str, Any] = result["numbers"]
    return numbers


@pytest.mark.parametrize("part", ["machine", "cuda_ipc", "log_probs", "offload", "checkpoint", "reference", "digests"])
def test_a_part_of_the_short_check_is_measured(part: str, tmp_path: Path) -> None:
    """Each part compares its own results with a limit, and fails if one is outside of it."""
    assert numbers_of(part, tmp_path)


def test_a_bf16_step_offloads_and_reloads_with_unchanged_weights(tmp_path: Path) -> None:
    step = numbers_of("bf16", tmp_path)["bf16"]
    assert step["offload"]["same_weights"]
    assert step["offload"]["allocated_after_bytes"] < 0.1 * step["peak_allocated_bytes"]


def test_log_probs_of_every_supported_fp8_recipe_are_close_to_bf16(tmp_path: Path) -> None:
    recipes = numbers_of("fp8", tmp_path)["recipes"]
    measured = {name: found for name, found in recipes.items() if found["status"] == "measured"}
    assert {name: found["why"] for name, found in recipes.items() if found["status"] == "failed"} == {}
    assert measured
    assert all(found["log_prob_difference_mean"] < 0.1 for found in measured.values())


def test_the_engine_sleeps_wakes_and_matches_the_policys_log_probs(tmp_path: Path) -> None:
    found = numbers_of("engine", tmp_path)
    assert found["sleep"]["growth_bytes"] < 256 * 2**20
    assert max(found["sleep"]["used_in_training_bytes"]) > 0
    assert found["mismatch"]["kl"] < 0.01
    assert found["sync"]["bytes"] > 0


def test_an_fp8_engine_receives_fewer_bytes_and_its_log_probs_are_close_to_the_policys(tmp_path: Path) -> None:
    """Every sync verifies all values and scales; a kernel that read other values would give random tokens."""
    plain, found = numbers_of("engine", tmp_path), numbers_of("engine_fp8", tmp_path)
    assert 0.5 < found["sync"]["bytes"] / plain["sync"]["bytes"] < 0.7  # embedding and head stay in bf16
    assert 0.01 < found["fp8_error"] < 0.04
    assert plain["mismatch"]["kl"] < found["mismatch"]["kl"] < 0.1
    assert found["sleep"]["growth_bytes"] < 256 * 2**20
