"""Measure everything that needs a GPU, in one command. No network is needed.

    python tools/gpu_proof.py [--parts bf16,fp8,engine,engine_fp8|engine_sglang] [--size small|1b] [--gpu h100-80g]
                              [--out gpu-proof] [--json]

  bf16     a Megatron step: seconds, MFU, peak memory next to the planner's, memory left after an offload, NCCL
  fp8      the same for every Transformer Engine recipe that this GPU supports, and the difference to bf16 log-probs
  engine   vLLM: memory left after sleep and wake, GB/s of a sync next to a device-to-device copy, and the mismatch
           between its log-probs and the policy's
  engine_fp8     the same with the engine's weights in FP8, and their difference to the policy's weights
  engine_sglang  as `engine`, with SGLang; runs only if it is named, in an environment of its own
                 (launch/setup.sh --with sglang)

Each part is a process of its own and writes OUT/gpu_PART.json with the machine, the versions and the command. A missing
package or a failure in one part does not affect the others. The files belong in docs/measurements/.

Exit code 0: every part was measured; 1: a part was not measured (its file contains the reason); 2: wrong input, or no
GPU. Without a GPU the command only prints this error and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_mega.parallel.devices import num_visible_gpus
from grpo_mega.parallel.ports import free_port
from grpo_mega.planner.hardware import gpu_named
from grpo_mega.types import UserError

PARTS = ("bf16", "fp8", "engine", "engine_fp8", "engine_sglang")
DEFAULT_PARTS = PARTS[:4]  # an environment has one engine
PROGRAM = "tools.gpu_checks.run"
SIZES = ("small", "1b")
LIMIT_SECONDS = 1800.0
REPOSITORY = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(DEFAULT_PARTS), help="names of parts, separated by commas")
    parser.add_argument("--size", choices=SIZES, default="1b", help="size of the random model (default: 1b)")
    parser.add_argument(
        "--gpu", default="h100-80g", help="name of this GPU in tools/plan.py, for its peak speed and memory"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-proof"), help="folder of the JSON files")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    try:
        parts = parts_named(args.parts)
        gpu_named(args.gpu)
        if not num_visible_gpus(os.environ):
            raise UserError(
                "tools/gpu_proof.py measures on a GPU, and none was found on this machine",
                remedy="run it on a machine with a GPU",
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for part in parts:
        results[part] = run_part(part, args.size, args.gpu, args.out.resolve())
        print(f"{part}: {results[part]['status']}", flush=True)
    if args.json:
        print(json.dumps(results))
    return int(any(result["status"] != "measured" for result in results.values()))


def parts_named(parts: str) -> list[str]:
    """Return the parts named in a comma-separated list.

    Raises:
        UserError: a name is not a part, or there is no name.
    """
    names = [name for name in parts.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise UserError(
            f"--parts={parts}: must name at least one part, and {', '.join(unknown) or 'an empty list'} is not a part",
            remedy=f"use {', '.join(PARTS)}",
        )
    return names


def run_part(part: str, size: str, gpu: str, out: Path) -> dict[str, Any]:
    """Run one part in a process of its own and return its result, which is also in its file."""
    answer = out / f"gpu_{part}.json"
    answer.unlink(missing_ok=True)  # a result of an earlier run must not be taken for this one's
    command = [sys.executable, "-m", PROGRAM, part, size, gpu, str(answer)]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    paths = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    reason = ""
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **rank, **rendezvous, "PYTHONPATH": paths, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdout=subprocess.DEVNULL,  # the numbers are in the file
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        sys.stderr.write(done.stderr)
        if done.returncode:
            reason = f"exit code {done.returncode}: " + "\n".join(done.stderr.strip().splitlines()[-20:])
    except subprocess.TimeoutExpired:
        reason = f"timed out after {LIMIT_SECONDS:g} s"
    if not reason and answer.is_file():
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result
    failed = {"part": part, "status": "failed", "why": reason or "the part wrote no result"}
    answer.write_text(json.dumps(failed, indent=2) + "\n", encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
