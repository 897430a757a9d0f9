"""Train a model. The command does the same as `launch/train.sh`, but does not build an environment.

    grpo-mega train [CONFIG] [section.key=value ...] [--restarts N]

CONFIG is a file, or the name of a shipped config (`grpo-mega configs` lists them); default: quickstart. The ranks are
started as `launch/train.sh --help` describes: on one machine, on several machines, by Slurm or by torchrun. Inside a
Slurm allocation srun starts `grpo-mega-train`, the console script of this module, on each node.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.environment import set_process_environment
from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.launch.main import main as launch
from grpo_mega.launch.restarts import take_restarts

SCRIPT = "grpo-mega-train"


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    restarts, rest = take_restarts(arguments)
    if not rest or "=" in rest[0]:
        rest.insert(0, "quickstart")
    set_process_environment()
    again = ["--restarts", str(restarts)] if restarts else []
    return launch([str(Path(sys.executable).with_name(SCRIPT)), *rest, *again])
