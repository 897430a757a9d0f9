"""Starts one part of tools/gpu_proof.py: `python -m tools.proof.run PART SIZE GPU ANSWER`. Looks for a GPU before the
heavy imports."""

from __future__ import annotations

import importlib
import os
import sys

from grpo_mega.parallel.devices import num_visible_gpus

MODULES = {
    "bf16": "tools.proof.policy",
    "fp8": "tools.proof.policy",
    "engine": "tools.proof.engine",
    "engine_fp8": "tools.proof.engine",
    "engine_sglang": "tools.proof.engine",
}


def main() -> None:
    """Exit code 1 and one line without a GPU."""
    if not num_visible_gpus(os.environ):
        sys.exit("no CUDA device: the GPU proof measures on a GPU only")
    importlib.import_module(MODULES[sys.argv[1]]).main()


if __name__ == "__main__":
    main()
