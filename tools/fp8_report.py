"""Command line of `grpo_mega.cli.fp8_report`; `--help` describes it."""

import sys

from grpo_mega.cli.fp8_report import main

if __name__ == "__main__":
    sys.exit(main())
