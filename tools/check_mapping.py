"""Command line of `grpo_mega.cli.check_mapping`; `--help` describes it."""

import sys

from grpo_mega.cli.check_mapping import main

if __name__ == "__main__":
    sys.exit(main())
