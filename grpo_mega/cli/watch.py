"""Follow a run from another terminal or a login node; nothing is written.

    grpo-mega watch RUN_DIR [--once] [--interval SECONDS]

Shows the step with its ETA, sparklines, the phases of the last step, alarms, and the best and the worst rollout. The
folder may be on a shared file system, and the run may not have started yet. Without a terminal a new view is printed
after every step. The command ends when the run is done or has failed; Ctrl-C ends it at any time.

Exit code 0: the run is done, --once, or Ctrl-C; 2: RUN_DIR is not a folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from grpo_mega.config.option_parser import OptionParser
from grpo_mega.observe.watch.followed_run import FollowedRun
from grpo_mega.observe.watch.view import view

_ENDED = ("done", "failed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print one view and exit")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks at the folder")
    args = parser.parse_args(argv)
    if not args.run_dir.is_dir():
        print(f"error: RUN_DIR={args.run_dir} was not found; name the folder of a run (run.dir)", file=sys.stderr)
        return 2
    if not args.interval > 0:
        print(f"error: --interval={args.interval:g} must be above 0", file=sys.stderr)
        return 2
    run = FollowedRun(args.run_dir)
    run.poll()
    try:
        if args.once:
            print("\n".join(_lines(run)))
        elif sys.stdout.isatty():
            _follow_on_terminal(run, args.interval)
        else:
            _follow_in_lines(run, args.interval)
    except KeyboardInterrupt:
        print()
    return 0


def _lines(run: FollowedRun) -> list[str]:
    return view(run, time.time(), shutil.get_terminal_size().columns)


def _follow_on_terminal(run: FollowedRun, interval: float) -> None:
    # `Text` has no markup: rich would read square brackets of a completion as a style.
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(_lines(run)), no_wrap=True), refresh=True)
            if run.status in _ENDED:
                return
            time.sleep(interval)
            run.poll()


def _follow_in_lines(run: FollowedRun, interval: float) -> None:
    changed = True
    while True:
        if changed:
            print("\n".join(_lines(run)), flush=True)
        if run.status in _ENDED:
            return
        time.sleep(interval)
        changed = run.poll() or run.status in _ENDED
