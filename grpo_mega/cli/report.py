"""Print status, accuracy gain, answer length and time of a run, from its summary.json.

    grpo-mega report RUN_DIR [--json]

The command also works during a run; it then prints the numbers of the newest checkpoint.

Exit code 0: printed; 2: the folder does not contain a summary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from grpo_mega.config.option_parser import OptionParser
from grpo_mega.observe.summary import read_summary, render
from grpo_mega.types import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on the last line")
    args = parser.parse_args(argv)
    file = args.run_dir / "summary.json"
    try:
        if not file.is_file():
            raise UserError(f"RUN_DIR={args.run_dir}: summary.json was not found", "name the folder of a run (run.dir)")
        summary = read_summary(file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(summary, args.run_dir))
    if args.json:
        print(json.dumps(asdict(summary)))
    return 0
