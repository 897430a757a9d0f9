"""Compare the planner's bytes with real runs of tiny models on CPU and gloo: nine layouts, or one rank.

    python tools/measure_memory.py [--one-rank] [--json]

Weights, gradients and optimizer state are the bytes of the policy's buffers. Activations are the peak of the distinct
storages that autograd keeps during an update (saved-tensor hooks). For each pipeline stage the table has the maximum
over its ranks; for activations it has the mean, because experts get unequal numbers of tokens.

Exit code 0: every value is within its tolerance (3%, activations 10%); 1: a value is not, or a rank failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.launch.node import Node
from grpo_mega.launch.supervisor import run_ranks
from tools.memory.cases import CASES, ONE_RANK_CASES, Bytes, Case, make_model, measured, predicted

BARS = {"weights": 0.03, "gradients": 0.03, "optimizer": 0.03, "activations": 0.10}


@errors_as_exit_codes(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--one-rank", action="store_true", help="every family, precision and recomputation, in one rank"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # libraries warn about missing optional features
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="measure_memory_") as work:
        for name in sorted({case.model for case in CASES}):
            make_model(Path(work) / name, name)
        for number, case in enumerate(ONE_RANK_CASES if args.one_rank else CASES):
            folder = Path(work) / case.model
            found = [run_alone(case, folder)] if args.one_rank else run_case(number, folder, Path(work))
            rows += compared(case, predicted(case, folder), found)
            for row in rows[-(case.config(folder).parallel.pp) :]:
                print(line_of(row), flush=True)
    if args.json:
        print(json.dumps({"bars": BARS, "rows": rows}))
    return int(any(abs(row["ratio"][key] - 1) > bar for row in rows for key, bar in BARS.items()))


def run_alone(case: Case, folder: Path) -> Bytes:
    """Return the bytes of a job of one rank, which runs in this process."""
    import torch
    import torch.distributed as dist

    from grpo_mega.parallel.ranks import Ranks
    from grpo_mega.parallel.topology import Topology

    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        topology = Topology(1)
        return measured(case, folder, Ranks(topology, topology.coordinates(0), torch.device("cpu")))
    finally:
        dist.destroy_process_group()


def run_case(number: int, folder: Path, work: Path) -> list[Bytes]:
    """Return the bytes that each rank measured.

    Raises:
        RuntimeError: a rank failed.
    """
    case = CASES[number]
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "tools.memory.worker", str(number), str(folder), str(work)]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    common = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    ranks = Node.of_whole_job(case.world).environments({**os.environ, **common})
    if run_ranks(command, ranks) != 0:
        raise RuntimeError(f"a rank of {case.name!r} failed; its message is above")
    answers = [work / f"case_{number}_rank_{rank}.json" for rank in range(case.world)]
    return [Bytes(**json.loads(answer.read_text())) for answer in answers]


def compared(case: Case, stages: list[Bytes], ranks: list[Bytes]) -> list[dict[str, Any]]:
    """Return a row for each pipeline rank."""
    each = len(ranks) // len(stages)
    rows = []
    for pp_rank, wanted in enumerate(stages):
        members = ranks[pp_rank * each : (pp_rank + 1) * each]
        measured = {key: max(getattr(m, key) for m in members) for key in BARS}
        measured["activations"] = sum(m.activations for m in members) / each
        ratio = {key: getattr(wanted, key) / measured[key] for key in BARS}
        rows.append(
            {"case": case.name, "pp_rank": pp_rank, "measured": measured, "predicted": asdict(wanted), "ratio": ratio}
        )
    return rows


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a Markdown table line, as in docs/measurements/planner.md."""
    cells = [f"{row['measured'][key]:,.0f} ({row['ratio'][key] - 1:+.1%})" for key in BARS]
    return f"| {row['case']} | {row['pp_rank']} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
