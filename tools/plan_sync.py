"""Command line of `grpo_mega.cli.plan_sync`; `--help` describes it."""

import sys

from grpo_mega.cli.plan_sync import main

if __name__ == "__main__":
    sys.exit(main())
