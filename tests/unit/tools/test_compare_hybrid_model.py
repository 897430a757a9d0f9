"""tools/dev/compare_hybrid_model.py, in a process of its own because it creates a process group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "dev" / "compare_hybrid_model.py"


def test_a_hybrid_model_with_the_same_weights_gives_the_same_logits() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--layers", "2", "--tokens", "9"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"layers": 2, "tokens": 9, "largest_difference": 0.0}
