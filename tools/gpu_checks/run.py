"""Runs one part of tools/gpu_proof.py: `python -m tools.gpu_checks.run PART SIZE GPU ANSWER`.

Checks that there is a GPU before the slow imports.
"""

from __future__ import annotations

import importlib
import os
import sys

from grpo_mega.parallel.devices import num_visible_gpus

MODULES = {
    "bf16": "tools.gpu_checks.policy",
    "fp8": "tools.gpu_checks.policy",
    "engine": "tools.gpu_checks.engine",
    "engine_fp8": "tools.gpu_checks.engine",
    "engine_sglang": "tools.gpu_checks.engine",
}


def main() -> None:
    """Run the part that the command line names; without a GPU, exit with code 1 and one line."""
    if not num_visible_gpus(os.environ):
        sys.exit("no CUDA device: tools/gpu_proof.py measures on GPUs only")
    importlib.import_module(MODULES[sys.argv[1]]).main()


if __name__ == "__main__":
    main()
