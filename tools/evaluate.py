"""Command line of `grpo_mega.cli.evaluate`; `--help` describes it."""

import sys

from grpo_mega.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
