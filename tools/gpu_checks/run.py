"""Runs one part of tools/gpu_proof.py: `python -m tools.gpu_checks.run PART SIZE GPU ANSWER [--rehearse]`.

Checks that there is a GPU before the slow imports.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from grpo_mega.parallel.devices import num_visible_gpus
from tools.gpu_checks.parts import PARTS
from tools.gpu_checks.result_file import ResultFile


def main() -> None:
    """Run the part that the command line names; without a GPU, exit with code 1 and one line."""
    part, size, gpu, answer, *options = sys.argv[1:]
    rehearsal = options == ["--rehearse"]
    if not rehearsal and not num_visible_gpus(os.environ):
        import torch

        if not torch.cuda.is_available():
            sys.exit("no CUDA device: tools/gpu_proof.py measures on GPUs only")
    result = ResultFile(Path(answer), part, rehearsal=rehearsal)
    from tools.gpu_checks.part_job import PartJob

    job = PartJob.start(part, size, gpu, result, rehearsal=rehearsal)
    importlib.import_module(f"tools.gpu_checks.{PARTS[part].module}").main(job)
    result.close()


if __name__ == "__main__":
    main()
