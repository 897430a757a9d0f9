"""A file in the format of GSM8K."""

from __future__ import annotations

import json
from pathlib import Path


def write_gsm8k(path: Path, count: int = 4) -> Path:
    """Write `count` questions, whose last calculation is `40+i=4i`."""
    solution = "So <<1+1=2>>2.\nIn all <<40+{0}=4{0}>>4{0} clips.\n#### 4{0}"
    rows = [{"question": f"Question {i}?", "answer": solution.format(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
