"""Command line of `grpo_mega.cli.hf_to_megatron`; `--help` describes it."""

import sys

from grpo_mega.cli.hf_to_megatron import main

if __name__ == "__main__":
    sys.exit(main())
