"""Command line of `grpo_mega.cli.watch`; `--help` describes it."""

import sys

from grpo_mega.cli.watch import main

if __name__ == "__main__":
    sys.exit(main())
