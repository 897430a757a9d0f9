"""Make a recorded step of a run again, without engine and rewards, and name the first stage that differs.

    grpo-mega replay RUN_DIR --step N [--layout "tp=2,pp=1"] [--json]

The policy is loaded from the newest checkpoint before the step, and the steps after it are made again with the rollouts
in `rollouts/`. Step N is compared with what the run recorded, in the order of its computation: log-probs, advantages,
loss, gradient, update (the tensors of the checkpoint after step N, if there is one). In the layout of the run every
number must be equal bit for bit; --layout compares another layout, where rounding differs. The run folder is not
changed. Where FP8 is on, the quantization error of each layer follows.

Exit code 0: all stages are equal, or within the tolerance in another layout; 1: a stage differs, or a rank failed; 2:
wrong input.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.cli.compare_layouts import measure_on_ranks, parse_layout
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.cli.replay_inputs import find_inputs
from grpo_mega.config.option_parser import OptionParser

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of a stage in another layout."""


@dataclass(frozen=True)
class Stage:
    """Comparison of one stage. `difference` is the largest, relative to the largest recorded value; None: unknown."""

    name: str
    difference: float | None
    text: str

    def verdict(self, tolerance: float) -> str:
        """Return one word for the comparison."""
        if self.difference is None:
            return "not recorded"
        if self.difference == 0:
            return "equal"
        return "within rounding" if self.difference <= tolerance else "differs"


def replay(args: argparse.Namespace) -> dict[str, Any]:
    """Make the step again and return the object that --json prints.

    Raises:
        UserError: the step cannot be made again from what the run folder has.
        RuntimeError: a rank failed; its message is on the screen.
    """
    layout = None if args.layout is None else parse_layout(args.layout)
    inputs = find_inputs(args.run, args.step, layout)
    with tempfile.TemporaryDirectory(prefix="replay_") as work:
        job, answer = Path(work) / "job.json", Path(work) / "answer.json"
        job.write_text(json.dumps(inputs.as_job() | {"answer": str(answer)}))
        measure_on_ranks("grpo_mega.cli.replay_worker", job, inputs.config.run.world_size or 1)
        found = json.loads(answer.read_text())
    stages = [Stage(**stage) for stage in found["stages"]]
    tolerance = 0.0 if layout is None else TOLERANCE[inputs.config.precision.dtype]
    differing = [stage.name for stage in stages if stage.verdict(tolerance) == "differs"]
    return {
        "run": str(args.run),
        "step": args.step,
        "from": inputs.start_name,
        "layout": "of the run" if layout is None else layout.text,
        "world_size": inputs.config.run.world_size,
        "first_difference": differing[0] if differing else None,
        "stages": [vars(stage) | {"verdict": stage.verdict(tolerance)} for stage in stages],
        "fp8": found["fp8"],
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """Return the result as lines of text."""
    lines = [
        f"step {found['step']} of {found['run']} from {found['from']}: {found['world_size']} rank(s), "
        f"layout {found['layout']}"
    ]
    lines += [f"  {stage['name']:<11} {stage['verdict']:<16} {stage['text']}".rstrip() for stage in found["stages"]]
    if found["fp8"]:
        lines += ["quantization error of the matrices in FP8 after the step:", *(f"  {line}" for line in found["fp8"])]
    first = found["first_difference"]
    lines.append("no stage differs" if first is None else f"the first stage that differs: {first}")
    return lines


@errors_as_exit_codes(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("--step", type=int, required=True, help="number of the step, from 1")
    parser.add_argument("--layout", help='another layout, for example "tp=2,pp=1" (default: that of the run)')
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    args = parser.parse_args(argv)
    found = replay(args)
    print(json.dumps(found) if args.json else "\n".join(lines_of(found)))
    return int(found["first_difference"] is not None)
