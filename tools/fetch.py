"""Command line of `grpo_mega.cli.fetch`; `--help` describes it."""

import sys

from grpo_mega.cli.fetch import main

if __name__ == "__main__":
    sys.exit(main())
