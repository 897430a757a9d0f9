"""Runs one rank of a command that compares layouts: `python -m grpo_mega.cli.layout_worker WORKER JOB`.

It calls `measure` of the module WORKER. JOB is a JSON file with the config and the inputs of the worker.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch

from grpo_mega.config.schema import Config
from grpo_mega.parallel.ranks import init_ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.types import UserError


def main() -> int:
    """Run the worker; return exit code 2 if its input is invalid."""
    worker = importlib.import_module(sys.argv[1])
    job = json.loads(Path(sys.argv[2]).read_text())
    config = Config.model_validate_json(json.dumps(job["config"]))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = init_ranks(Topology.of(config, int(os.environ["WORLD_SIZE"])), config.guard.timeout_seconds)
    try:
        worker.measure(job, config, ranks)
    except UserError as error:
        if ranks.is_first:
            sys.stderr.write(f"error: {error}\n")
        return 2
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
