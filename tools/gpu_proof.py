"""What has to be measured on a GPU, in one command on a machine with one; no network is needed.

    python tools/gpu_proof.py [--parts bf16,fp8,engine,engine_fp8|engine_sglang] [--size small|1b] [--gpu h100-80g]
                              [--out gpu-proof] [--json]

  bf16     Megatron's step: seconds, MFU, peak memory against the planner's, offload and what it leaves behind, NCCL
  fp8      the same for every recipe of Transformer Engine that this GPU has, and how far its log-probs are from bf16's
  engine   vLLM: sleep and wake and what they leave behind, the sync's GB/s against a device-to-device copy, the
           mismatch of its log-probs with the policy's
  engine_fp8  the same with weights that the engine holds in FP8, and how far these are from the policy's
  engine_sglang  as `engine`, with SGLang: only where it is named, in an environment of its own (launch/setup.sh --with
           sglang)

Each part is a process of its own and writes OUT/gpu_PART.json, with the machine, the versions and the command: a
missing package or a failure in one leaves the others whole. The files belong into docs/measurements/.

Exit code 0: every part was measured; 1: one was not (its file says why); 2: wrong input, or no GPU here. Without a GPU
nothing is printed or written but that message: there is no dry run.
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
UNLESS_NAMED = PARTS[:4]  # a CUDA environment has one engine
PROGRAM = "tools.proof.run"
SIZES = ("small", "1b")
LIMIT_SECONDS = 1800.0
REPOSITORY = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(UNLESS_NAMED), help="names, separated by commas")
    parser.add_argument("--size", choices=SIZES, default="1b", help="of the random model")
    parser.add_argument("--gpu", default="h100-80g", help="as tools/plan.py calls it: its peak speed and its memory")
    parser.add_argument("--out", type=Path, default=Path("gpu-proof"), help="folder of the JSON files")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    args = parser.parse_args(argv)
    try:
        parts = wanted(args.parts)
        gpu_named(args.gpu)
        if not num_visible_gpus(os.environ):
            raise UserError(
                "tools/gpu_proof.py measures on a GPU, and this machine has none", remedy="run it where one is"
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


def wanted(parts: str) -> list[str]:
    """Raises UserError: a name that is no part."""
    names = [name for name in parts.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise UserError(
            f"--parts={parts}: {', '.join(unknown) or 'nothing'} is no part", remedy=f"use {', '.join(PARTS)}"
        )
    return names


def run_part(part: str, size: str, gpu: str, out: Path) -> dict[str, Any]:
    """Runs one in a process of its own; its file says what was measured, or why not."""
    answer = out / f"gpu_{part}.json"
    answer.unlink(missing_ok=True)  # an older run's numbers must not stand for this one's
    command = [sys.executable, "-m", PROGRAM, part, size, gpu, str(answer)]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    paths = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    why = ""
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **rank, **meeting, "PYTHONPATH": paths, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            stdout=subprocess.DEVNULL,  # the numbers are in the file
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        sys.stderr.write(done.stderr)
        if done.returncode:
            why = f"exit code {done.returncode}: " + "\n".join(done.stderr.strip().splitlines()[-20:])
    except subprocess.TimeoutExpired:
        why = f"not done within {LIMIT_SECONDS:g} s"
    if not why and answer.is_file():
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return result
    failed = {"part": part, "status": "failed", "why": why or "it wrote no answer"}
    answer.write_text(json.dumps(failed, indent=2) + "\n", encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
