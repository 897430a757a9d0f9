"""Command line of `grpo_mega.cli.plan`; `--help` describes it."""

import sys

from grpo_mega.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
