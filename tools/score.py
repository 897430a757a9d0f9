"""Command line of `grpo_mega.cli.score`; `--help` describes it."""

import sys

from grpo_mega.cli.score import main

if __name__ == "__main__":
    sys.exit(main())
