"""tools/compare_layouts.py as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import REPOSITORY
from tests.helpers.tiny_models import make_tiny_model


def test_layouts_of_a_users_model_pass_and_a_too_small_tolerance_fails(tmp_path: Path) -> None:
    config = {
        "model": {"path": str(make_tiny_model(tmp_path / "model", "qwen2", vocab=40))},
        "data": {"train": "arithmetic:train", "template": "plain", "max_prompt_tokens": 32},
        "sampling": {"max_tokens": 12},
        "reward": {"terms": [{"name": "exact"}]},
        "train": {"steps": 1, "max_tokens_per_microbatch": 128},
        "precision": {"dtype": "fp32"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--layouts", "tp=2", "--tolerance", "1e-12", "--json", str(tmp_path / "mine.yaml")]
    command = [sys.executable, str(REPOSITORY / "tools" / "compare_layouts.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stdout, done.stderr[-3000:]
    one, other = json.loads(done.stdout.splitlines()[-1])
    assert (one["layout"], one["first_difference"]) == ("one rank", None)
    assert (other["layout"], other["world_size"]) == ("tp=2", 2)
    assert other["first_difference"] == "model.embed_tokens.weight"
    assert 0 < other["largest_difference"] <= 1e-5
    assert abs(other["loss"] - one["loss"]) <= 1e-5
    assert abs(other["grad_norm"] - one["grad_norm"]) <= 1e-5 * one["grad_norm"]
    assert one["grad_norm"] > 1e-2
