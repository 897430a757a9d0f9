"""Command line of `grpo_mega.cli.megatron_to_hf`; `--help` describes it."""

import sys

from grpo_mega.cli.megatron_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
