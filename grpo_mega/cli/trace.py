"""Merge the traces of the ranks of a run into one file that ui.perfetto.dev opens.

    grpo-mega trace RUN_DIR [--out FILE.json.gz]

A run with observe.trace=true does this at its end; the command is for a run that is running, failed or was killed.

Exit code 0: written; 2: the folder has no trace, or the file cannot be written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.trace.merge import merge_trace


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="merged file; default: RUN_DIR/trace.json.gz")
    args = parser.parse_args(argv)
    folder = RunFolder(args.run_dir)
    merged = merge_trace(folder.traces, args.out if args.out is not None else folder.trace)
    skipped = f", {merged.num_skipped} lines could not be read" if merged.num_skipped else ""
    print(
        f"{merged.path}: {merged.num_events:,} events of {merged.num_ranks} ranks on one clock, which is exact to "
        f"{merged.uncertainty_ns / 1e6:.3f} ms{skipped}"
    )
    return 0
