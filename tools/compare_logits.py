"""Command line of `grpo_mega.cli.compare_logits`; `--help` describes it."""

import sys

from grpo_mega.cli.compare_logits import main

if __name__ == "__main__":
    sys.exit(main())
