"""Command line of `grpo_mega.cli.compare_layouts`; `--help` describes it."""

import sys

from grpo_mega.cli.compare_layouts import main

if __name__ == "__main__":
    sys.exit(main())
