"""tools/measure_math_reward.py: mutations are wrong answers, rewritings are right ones, and the rates count them."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "measure_math_reward.py"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_math_reward_under_test", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kind_of_mutation_changes_the_answer(measure: ModuleType) -> None:
    answer = r"\frac{12}{3.5} - \sqrt{7}! \pm 1"
    found = dict(measure.mutations(answer, ["8"], random.Random(0)))
    assert set(found) == {
        "dropped point",
        "added point",
        "moved bar",
        "dropped bracket",
        "swapped digits",
        "changed digit",
        "changed sign",
        "dropped operator",
        "added hedge",
        "two boxes",
    }
    assert answer not in found.values()


def test_a_mutation_that_leaves_the_number_is_recognized(measure: ModuleType) -> None:
    assert measure.is_same_number("1,000", "1000.0")
    assert measure.is_same_number(r"\frac{2}{4}", "0.5")
    assert not measure.is_same_number("0.10", "0.01")
    assert not measure.is_same_number("x", "y")


def test_the_rates_of_a_run(tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    rows = [
        {"completion": r"\boxed{0.5}", "answer": r"\frac{1}{2}", "right": 1},
        {"completion": r"\boxed{12}", "answer": "21", "right": 0},
        {"completion": r"\boxed{34}", "answer": "34", "right": 0},  # a wrong label: it counts as a false positive
    ]
    labels.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    command = [sys.executable, str(TOOL), "--labels", str(labels), "--measure", "labels"]
    done = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])["results"]["labels"]
    assert done.returncode == 1
    assert (result["pairs"], result["false_positives"], result["false_negatives"]) == (3, 1, 0)
    assert result["false_positive_rate"] == 0.5


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--labels", str(tmp_path / "none.jsonl"), "--measure", "labels"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "give a JSONL file" in done.stderr
