"""Command line of `grpo_mega.cli.doctor`; `--help` describes it."""

import sys

from grpo_mega.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
