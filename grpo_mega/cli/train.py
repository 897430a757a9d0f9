"""`grpo-mega train [CONFIG] [section.key=value ...]`: what `launch/train.sh` does, without building an environment.

CONFIG is a file, or the name of a shipped config (`grpo-mega configs` lists them); default: quickstart. The ranks start
as `launch/train.sh --help` describes: one machine, several machines, Slurm, torchrun. Inside a Slurm allocation the
command that srun starts on each node is `grpo-mega-train`, this module's own console script.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_mega.cli.environment import set_process_environment
from grpo_mega.launch.main import main as launch

SCRIPT = "grpo-mega-train"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not arguments or "=" in arguments[0]:
        arguments.insert(0, "quickstart")
    set_process_environment()
    return launch([str(Path(sys.executable).with_name(SCRIPT)), *arguments])
