"""Run `python -m grpo_mega.launch SCRIPT [arguments]`."""

import sys

from grpo_mega.launch.main import main

sys.exit(main(sys.argv[1:]))
