"""Start the engine server of grpo_mega/serve.py: `grpo-mega serve CONFIG ...`, as launch/serve.sh does."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega import serve
from grpo_mega.cli.environment import set_process_environment


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code. The server reads its arguments from `sys.argv`."""
    set_process_environment()
    serve.main()
    return 0
