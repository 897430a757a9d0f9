"""Check and measure everything that needs a GPU, in one command. No network is needed.

    python tools/gpu_proof.py --minutes 12 --wheels gpu-proof-kit          on a bare machine with a GPU
    python tools/gpu_proof.py [--parts bf16,fp8] [--size small|1b] [--gpu h200-141g] [--out gpu-proof] [--json]
    python tools/gpu_proof.py --rehearse --minutes 12                      without a GPU

--wheels installs the wheels of launch/gpu_proof_kit.sh into a temporary folder; an installed environment needs none.
Each part is a process of its own with its own time limit, and writes OUT/gpu_PART.json while it runs. A failure of one
part does not affect the others. With --minutes, a part that no longer fits is skipped, and its file says so.
OUT/gpu_check.json holds the results of all parts. The files of a GPU belong in docs/measurements/.

--rehearse runs the same parts on the CPU with tiny models. The clock of the deadline is simulated: every part takes its
expected time. Its files are rehearsal_PART.json, say "rehearsal": true, and never lie in docs/measurements/.

Exit code 0: every part was measured (or rehearsed), except parts that were not named and need a package that is not
installed; 1: a part failed or was skipped (its file contains the reason); 2: wrong input, or no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # a bare machine has the repository and no environment
    sys.path.insert(0, str(REPOSITORY))

from grpo_mega.cli.exit_codes import errors_as_exit_codes  # noqa: E402 - after the path of the repository
from grpo_mega.parallel.devices import num_visible_gpus  # noqa: E402
from grpo_mega.parallel.ports import free_port  # noqa: E402
from grpo_mega.types import UserError  # noqa: E402
from tools.gpu_checks import result_file  # noqa: E402
from tools.gpu_checks.deadline import Deadline, DeadlineClock, RealClock, SimulatedClock  # noqa: E402
from tools.gpu_checks.kit import install_kit  # noqa: E402
from tools.gpu_checks.part_process import run_limited  # noqa: E402
from tools.gpu_checks.parts import PARTS, CheckPart  # noqa: E402

PROGRAM = "tools.gpu_checks.run"
SIZES = ("small", "1b")
SUMMARY = "check.json"
_MEASUREMENTS = REPOSITORY / "docs" / "measurements"


@dataclass(frozen=True)
class CheckRun:
    """Settings that all parts of one run of the command share."""

    out: Path
    size: str
    gpu: str
    rehearsal: bool
    env: Mapping[str, str]

    def file(self, name: str) -> Path:
        """Return the path of a result file."""
        return self.out / f"{'rehearsal' if self.rehearsal else 'gpu'}_{name}"


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = _parser().parse_args(argv)
    parts = parts_named(args.parts, rehearsal=args.rehearse)
    deadline, clock = _deadline_of(args)
    out = _folder_of(args)
    if not args.rehearse and not has_gpu():
        raise UserError(
            "tools/gpu_proof.py measures on a GPU, and none was found on this machine",
            remedy="run it on a machine with a GPU, or rehearse it with --rehearse",
        )
    with tempfile.TemporaryDirectory(prefix="gpu_proof_") as work:
        site = Path(work) / "site"
        if args.wheels is not None:
            print(f"installed: {', '.join(install_kit(args.wheels.resolve(), site))}", flush=True)
        _check_name_of(args.gpu, site)
        size = "tiny" if args.rehearse else args.size
        run = CheckRun(out, size, args.gpu, args.rehearse, _environment(site, Path(work), args.rehearse))
        out.mkdir(parents=True, exist_ok=True)
        results = _run_parts(run, parts, deadline, clock)
    print(table_of(results))
    if args.json:
        print(json.dumps(results))
    named = args.parts is not None
    return int(any(not _is_good(result["status"], named) for result in results.values()))


def _parser() -> argparse.ArgumentParser:
    shown = "\n".join(f"  {part.name:14} {part.shows}" for part in PARTS.values())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{shown}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", help="names of parts, separated by commas (default: all but engine_sglang)")
    parser.add_argument("--minutes", type=float, help="time for the whole check (default: no limit)")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels that launch/gpu_proof_kit.sh wrote")
    parser.add_argument("--rehearse", action="store_true", help="run every part on the CPU with tiny models")
    parser.add_argument("--size", choices=SIZES, default="1b", help="model of bf16, fp8 and engine (default: 1b)")
    parser.add_argument("--gpu", default="", help="name of this GPU in tools/plan.py (default: found by its name)")
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default: gpu-proof, gpu-proof-rehearsal)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def parts_named(parts: str | None, *, rehearsal: bool) -> list[CheckPart]:
    """Return the parts named in a comma-separated list, in the order of the check; without a list the default ones.

    Raises:
        UserError: a name is not a part, there is no name, or a part has no rehearsal.
    """
    if parts is None:
        return [part for part in PARTS.values() if (part.rehearsable if rehearsal else part.default)]
    names = [name for name in parts.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise UserError(
            f"--parts={parts}: must name at least one part, and {', '.join(unknown) or 'an empty list'} is not a part",
            remedy=f"use {', '.join(PARTS)}",
        )
    chosen = [part for name, part in PARTS.items() if name in names]
    for part in chosen:
        if rehearsal and not part.rehearsable:
            raise UserError(
                f"--parts={parts}: {part.name} is not supported with --rehearse",
                remedy="run launch/test.sh tests/engine for engines on the CPU",
            )
    return chosen


def _deadline_of(args: argparse.Namespace) -> tuple[Deadline, DeadlineClock]:
    if args.minutes is not None and not 0 < args.minutes < float("inf"):
        raise UserError(f"--minutes={args.minutes}: must be positive", remedy="use --minutes 12")
    clock: DeadlineClock = SimulatedClock() if args.rehearse else RealClock()
    return Deadline(args.minutes, clock), clock


def _folder_of(args: argparse.Namespace) -> Path:
    """Return the output folder.

    Raises:
        UserError: a rehearsal would write beside measurements.
    """
    out = (args.out or Path("gpu-proof-rehearsal" if args.rehearse else "gpu-proof")).resolve()
    if args.rehearse and out.is_relative_to(_MEASUREMENTS):
        raise UserError(
            f"--out={args.out}: --rehearse must not write into docs/measurements, which holds numbers of GPUs",
            remedy="use another folder",
        )
    return out


def _check_name_of(gpu: str, site: Path) -> None:
    """Check `--gpu` against the planner's devices; the planner needs the packages of the kit.

    Raises:
        UserError: the planner has no device of this name.
    """
    if not gpu:
        return
    if site.is_dir():
        sys.path.insert(0, str(site))
    from grpo_mega.planner.hardware import gpu_named

    gpu_named(gpu)


def has_gpu() -> bool:
    """Return whether this machine has a GPU. A container may hide the driver's list; then PyTorch is asked."""
    if num_visible_gpus(os.environ):
        return True
    import torch

    return torch.cuda.is_available()


def _environment(site: Path, work: Path, rehearsal: bool) -> dict[str, str]:
    """Return the environment of every part. Compiled kernels are shared by the parts."""
    paths = [str(REPOSITORY), *([str(site)] if site.is_dir() else []), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton"),
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    if rehearsal:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return env


def _run_parts(
    run: CheckRun, parts: list[CheckPart], deadline: Deadline, clock: DeadlineClock
) -> dict[str, dict[str, Any]]:
    """Run the parts one after the other and return their results, which are also in their files."""
    for part in parts:  # results of an earlier run must not be taken for this one's
        run.file(f"{part.name}.json").unlink(missing_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for part in parts:
        results[part.name] = _result_of(run, part, deadline)
        if results[part.name]["status"] not in (result_file.NOT_INSTALLED, result_file.SKIPPED):
            clock.after(part)
        result_file.write_json(run.file(SUMMARY), {"rehearsal": run.rehearsal, "parts": results})
        print(f"{part.name}: {results[part.name]['status']}", flush=True)
    return results


def _result_of(run: CheckRun, part: CheckPart, deadline: Deadline) -> dict[str, Any]:
    """Run one part and return its result."""
    path, rehearsal = run.file(f"{part.name}.json"), run.rehearsal
    missing = part.needs if part.needs and not rehearsal and not _is_installed(part.needs, run.env) else ""
    skipped = deadline.reason_to_skip(part)
    if missing or skipped:
        result = result_file.ResultFile(path, part.name, rehearsal=rehearsal)
        status, why = (
            (result_file.NOT_INSTALLED, f"{missing} is not installed") if missing else (result_file.SKIPPED, skipped)
        )
        result.put(status=status, why=why, seconds=0.0)
        return result.content
    command = [sys.executable, "-m", PROGRAM, part.name, run.size, run.gpu or "auto", str(path)]
    if rehearsal:
        command.append("--rehearse")
    env = {**run.env, "MASTER_PORT": str(free_port())}
    ended = run_limited(command, env, REPOSITORY, run.file(f"{part.name}.log"), deadline.limit_of(part))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"part": part.name}
    found |= {"seconds": round(ended.seconds, 1), "rehearsal": rehearsal}
    finished = (result_file.REHEARSED if rehearsal else result_file.MEASURED, result_file.FAILED)
    if ended.reason or found.get("status") not in finished:
        found |= {"status": result_file.FAILED}
        found["why"] = "; ".join(filter(None, [found.get("why"), ended.reason or "the part wrote no complete result"]))
    result_file.write_json(path, found)
    return found


def _is_installed(module: str, env: Mapping[str, str]) -> bool:
    """Return whether a part can import a top-level module. Nothing is imported."""
    return PathFinder.find_spec(module, [*env["PYTHONPATH"].split(os.pathsep), *sys.path]) is not None


def _is_good(status: str, named: bool) -> bool:
    """Return whether a status leaves exit code 0. A part that was named must run."""
    good = {result_file.MEASURED, result_file.REHEARSED}
    return status in (good if named else good | {result_file.NOT_INSTALLED})


def table_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table that the command prints: part, status, seconds, main number or reason."""
    rows = [("part", "status", "seconds", "main result")]
    for name, result in results.items():
        lines = (result.get("why") or result.get("main") or "").splitlines() or [""]
        text = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"  # the last line of a traceback
        rows.append((name, result["status"], f"{result['seconds']:.1f}", text))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
