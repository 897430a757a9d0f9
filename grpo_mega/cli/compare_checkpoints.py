"""Compare two checkpoints of any format and layout, tensor by tensor, by Hugging Face names.

    grpo-mega compare checkpoints A B
    python tools/compare_checkpoints.py A B

A and B are Hugging Face folders, torch_dist checkpoints or checkpoints of a run. The command lists tensors that differ
in value (with the largest absolute difference), dtype or shape, and tensors that only one checkpoint contains.

Exit code 0: equal bit for bit; 1: different; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.convert.compare import TensorComparison, compare, open_checkpoint


def line_of(found: TensorComparison) -> str:
    """Return the difference as one line."""
    pairs = zip(found.shapes, found.dtypes, strict=True)
    sides = ["missing" if shape is None else f"{shape} {dtype}" for shape, dtype in pairs]
    gap = "" if found.max_abs_difference is None else f", max abs difference {found.max_abs_difference:.6g}"
    return f"{found.name}: {found.verdict}: {sides[0]} | {sides[1]}{gap}"


@errors_as_exit_codes(OSError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="folder of the first checkpoint")
    parser.add_argument("b", type=Path, help="folder of the second checkpoint")
    parser.add_argument("--base", type=Path, help="folder of config.json, for a torch_dist checkpoint without one")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    left, right = open_checkpoint(args.a, args.base, args.b), open_checkpoint(args.b, args.base, args.a)
    found = list(compare(left, right))
    different = [each for each in found if each.verdict != "equal"]
    for each in different:
        print(line_of(each))
    if args.json:
        gaps = [each.max_abs_difference for each in found if each.max_abs_difference is not None]
        summary = {
            "equal": not different,
            "num_tensors": len(found),
            "num_different": len(different),
            "max_abs_difference": max(gaps, default=0.0),
            "different": [asdict(each) for each in different],
        }
        print(json.dumps(summary))
    else:
        print(f"{len(found) - len(different)} of {len(found)} tensors are equal")
    return 1 if different else 0
