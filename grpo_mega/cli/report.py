"""Make the report of a run, one HTML page that needs no network, and print the summary of the run.

    grpo-mega report RUN_DIR [OTHER_RUN] [--out FILE.html] [--json]

With OTHER_RUN the page compares two runs: the differences of their configs first, and their curves in the same charts.
The command also works during a run, and on the folder of a run that was killed; the page then says what is missing. Of
the rollouts the page holds a sample; it states by which rule.

Exit code 0: written; 2: a folder is not that of a run, or the page cannot be written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.option_parser import OptionParser
from grpo_mega.observe.atomic_files import write_atomically
from grpo_mega.observe.report.page import report_page
from grpo_mega.observe.report.rollout_sample import RolloutSample, TokenTexts, sample_rollouts
from grpo_mega.observe.report.run_data import RunData, read_run
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.summary import read_summary, render
from grpo_mega.types import UserError


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("other_run", type=Path, nargs="?", help="folder of a run to compare it with")
    parser.add_argument("--out", type=Path, help="file of the page; default: RUN_DIR/report.html")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on the last line")
    args = parser.parse_args(argv)
    folders = [args.run_dir, *([args.other_run] if args.other_run is not None else [])]
    out = args.out if args.out is not None else args.run_dir / "report.html"
    runs = [read_run(folder) for folder in folders]
    page = report_page([(run, _sample(run)) for run in runs])
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written ({error.strerror})", "name a file that you can write"
        ) from error
    summary = _print_summary(runs[0], out, len(page.encode()))
    if args.json:
        print(json.dumps({**summary, "page": str(out)}))
    return 0


def _print_summary(run: RunData, out: Path, num_bytes: int) -> dict[str, Any]:
    """Print the summary, or what is known without one; return it as plain values."""
    found: dict[str, Any] = {}
    try:
        summary = read_summary(RunFolder(run.path).summary)
        print(render(summary, run.path))
        found = asdict(summary)
    except UserError:
        print(" ".join(run.verdict))
    for problem in run.problems:
        print(f"  note               {problem}")
    print(f"  report             {out} ({num_bytes / 1e6:.1f} MB)")
    return found


def _sample(run: RunData) -> RolloutSample:
    mismatch = {
        step: value
        for step, value in zip(run.steps, run.curves.get("train/mismatch_max", []), strict=False)
        if value is not None
    }
    alarms = [int(alarm["since"]) for alarm in run.alarms if isinstance(alarm.get("since"), int)]
    return sample_rollouts(RunFolder(run.path).rollouts, mismatch, alarms, _token_texts(run))


def _token_texts(run: RunData) -> TokenTexts | None:
    """Return the decoder of the run's tokenizer, or None if no folder with it is left."""
    model = run.raw_config.get("model") or {}
    folders = [run.path / "hf", *([Path(str(model["path"]))] if model.get("path") else [])]
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            from grpo_mega.data.chat import load_tokenizer
            from grpo_mega.data.token_texts import TokenTextCache

            return TokenTextCache(load_tokenizer(folder))
    return None
