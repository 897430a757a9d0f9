"""Command line of `grpo_mega.cli.rollouts`; `--help` describes it."""

import sys

from grpo_mega.cli.rollouts import main

if __name__ == "__main__":
    sys.exit(main())
