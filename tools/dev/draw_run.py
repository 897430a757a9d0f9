"""Draws the reward, the KL divergence and the held-out accuracy of a run.

    python tools/dev/draw_run.py RUN_DIR [--out docs/assets/quickstart.svg]

Reads `metrics.jsonl` and `summary.json` of the run folder. docs/assets/quickstart.svg was made from a run of
`launch/train.sh` on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "quickstart.svg"


def draw(run: Path, out: Path) -> None:
    """Write the plot of the run folder `run` to `out`, as SVG with the same bytes for the same run."""
    mpl.rcParams.update({"svg.hashsalt": "grpo_mega", "svg.fonttype": "none", "font.size": 9})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "evaluation" not in line]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    numbers = [step["step"] for step in steps]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    left.plot(numbers, [step["reward/mean"] for step in steps], color="#e07a3f", label="reward/mean, training prompts")
    ends = [(0, "eval_before"), (numbers[-1], "eval_after")]
    left.plot(
        [number for number, _ in ends],
        [summary[key]["accuracy"] for _, key in ends],
        "o",
        color="#2a9d8f",
        label="accuracy, 300 held-out prompts" if summary["eval_after"]["num_prompts"] == 300 else "held-out accuracy",
    )
    left.set(xlabel="step", ylim=(0, 1.05))
    left.legend(loc="lower right", frameon=False)
    right.plot(numbers, [step["train/kl"] for step in steps], color="#6d597a", label="train/kl, nats per token")
    right.set(xlabel="step", ylim=(0, None))
    right.legend(loc="lower right", frameon=False)
    figure.savefig(out, format="svg", metadata={"Date": None})


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    draw(arguments.run, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
