"""One rank of tools/measure_memory.py."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from grpo_mega.parallel.ranks import init_ranks
from grpo_mega.parallel.topology import Topology
from tools.memory.cases import CASES, measured


def main() -> None:
    """Measure one case and write the result beside the model."""
    number, folder, work = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    case = CASES[number]
    torch.set_num_threads(1)
    ranks = init_ranks(Topology.of(case.config(folder), case.world), 120.0)
    found = measured(case, folder, ranks)
    (work / f"case_{number}_rank_{ranks.rank}.json").write_text(json.dumps(asdict(found)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
