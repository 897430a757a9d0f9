"""Command line of `grpo_mega.cli.chaos`; `--help` describes it."""

import sys

from grpo_mega.cli.chaos import main

if __name__ == "__main__":
    sys.exit(main())
