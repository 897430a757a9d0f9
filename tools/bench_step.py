"""Measure rollouts per second of a whole GRPO step, for this project and TRL's GRPOTrainer on the same model.

    python tools/bench_step.py [--rounds 3] [--json]

`measured` is this project, `reference` is TRL. `ratio` is seconds per rollout, TRL / ours; `ratio_per_token` is the
same per completion token, because each side samples its own lengths. Two more comparisons: training only, on given
completions; and whole steps with completions of equal length, without cost of padding or of the longest completion.
`fraction_of_gemm` is the time of the same matrix products alone over that of our training
(step_sides/matrix_products.py).

Each side is one process with the same number of threads. The sides make their steps alternately. TRL runs in its own
environment, which this script builds once (runs/bench/trl-venv).
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDES = ROOT / "tools" / "step_sides"
TRL_PINS = ("trl==1.16.0", "transformers==5.19.0", "accelerate==1.15.0", "datasets==5.2.0")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # index of PyTorch; PyPI may have CUDA builds only
TARGETS = {"ratio": 8.0, "ratio_train_only": 4.5, "ratio_equal_length": 1.4, "fraction_of_gemm": 0.6}
MEAN_LENGTH, EQUAL_LENGTH = 48.0, 64  # tokens
PROMPT_TOKENS = range(24, 41)


@dataclass(frozen=True)
class SideTime:
    """One step of one side."""

    seconds: float  # wall clock
    cpu_seconds: float  # of the side's process; the value that other programs change least
    num_rollouts: int
    num_tokens: int  # completion tokens
    phases: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Steps of both sides for one kind of work, in the order in which they ran."""

    ours: Sequence[SideTime]
    trl: Sequence[SideTime]

    @property
    def ratio(self) -> float:
        """Median seconds per rollout, TRL / ours."""
        return _median_per(self.trl, "num_rollouts") / _median_per(self.ours, "num_rollouts")

    @property
    def ratio_per_token(self) -> float:
        """Median seconds per completion token, TRL / ours."""
        return _median_per(self.trl, "num_tokens") / _median_per(self.ours, "num_tokens")

    @property
    def cpu_ratio(self) -> float:
        """Median CPU seconds per rollout, TRL / ours."""
        trl, ours = (
            statistics.median(s.cpu_seconds / s.num_rollouts for s in steps) for steps in (self.trl, self.ours)
        )
        return trl / ours

    def as_json(self) -> dict[str, Any]:
        """Return the ratios, and the seconds and median phases of each side."""
        ratios = {"ratio": self.ratio, "ratio_per_token": self.ratio_per_token, "cpu_ratio": self.cpu_ratio}
        return ratios | {
            name: {
                "seconds_median": statistics.median(s.seconds for s in steps),
                "seconds_min": min(s.seconds for s in steps),
                "cpu_seconds_median": statistics.median(s.cpu_seconds for s in steps),
                "tokens": [s.num_tokens for s in steps],
                "phases": {phase: statistics.median(s.phases[phase] for s in steps) for phase in steps[0].phases},
            }
            for name, steps in (("ours", self.ours), ("trl", self.trl))
        }


def _median_per(steps: Sequence[SideTime], unit: str) -> float:
    return float(statistics.median(step.seconds / getattr(step, unit) for step in steps))


def gemm_fraction(steps: Sequence[SideTime]) -> float:
    """Return the CPU seconds of the matrix products alone over those of the training, median of the steps."""
    return float(statistics.median(step.phases["matrix_products_cpu"] / step.cpu_seconds for step in steps))


def length_spread(lengths: Sequence[int]) -> dict[str, float]:
    """Return mean, p50, p95 (nearest rank), max and p95 / p50 of completion lengths."""
    ordered = sorted(lengths)
    p50, p95 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95))
    return {"mean": statistics.mean(ordered), "p50": p50, "p95": p95, "max": ordered[-1], "p95_over_p50": p95 / p50}


def ensure_trl(venv: Path) -> Path:
    """Build TRL's environment with the torch version of this one, if needed; return its Python.

    Raises:
        RuntimeError: a package could not be installed; the end of pip's output is the message.
    """
    torch_pin = f"torch=={importlib.metadata.version('torch')}"
    wanted = "\n".join((torch_pin, *TRL_PINS))
    python, marker = venv / "bin" / "python", venv / "complete.txt"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with venv.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.exists() or marker.read_text() != wanted:
            print(f"installing TRL into {venv}", file=sys.stderr)
            shutil.rmtree(venv, ignore_errors=True)
            _run(sys.executable, "-m", "venv", str(venv))
            pip = (str(python), "-m", "pip", "install", "--no-input", "--quiet")
            try:
                _run(*pip, "--no-deps", torch_pin)
            except RuntimeError:
                _run(*pip, "--no-deps", "--index-url", TORCH_CPU_INDEX, torch_pin)
            _run(*pip, torch_pin, *TRL_PINS)
            marker.write_text(wanted)
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


class Side:
    """Child process that makes one step per command."""

    def __init__(self, python: Path, script: Path, settings: dict[str, Any], log: Path) -> None:
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(script), json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        self.peak_bytes = 0
        started = self._answer()
        if started["threads"] != settings["threads"]:
            self.close()
            raise RuntimeError(f"{script.name} uses {started['threads']} threads instead of {settings['threads']}")

    def step(self, completions: list[list[int]] | None = None) -> tuple[SideTime, list[list[int]]]:
        """Make a whole step; with given `completions`, without sampling."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"completions": completions}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        made = answer["completions"]
        num_tokens = sum(len(ids) for ids in made)
        return SideTime(answer["seconds"], answer["cpu_seconds"], len(made), num_tokens, answer["phases"]), made

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"a side exited with code {self._process.returncode}:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        self.peak_bytes = answer["peak_bytes"]
        return answer

    def close(self) -> None:
        """Close the command stream, which ends the process."""
        self._process.communicate()


@contextmanager
def both_sides(trl_python: Path, work: Path, settings: dict[str, Any]) -> Iterator[tuple[Side, Side]]:
    """Start our side and TRL's side, one after the other."""
    from grpo_mega.parallel.ports import free_port

    with ExitStack() as stack:
        sides = []
        for name, python in (("our", Path(sys.executable)), ("trl", trl_python)):
            own = settings | {"run_dir": str(work / f"{name}_run"), "port": str(free_port())}
            sides.append(Side(python, SIDES / f"{name}_side.py", own, work / f"{name}.log"))
            stack.callback(sides[-1].close)
        yield sides[0], sides[1]


def alternate(sides: tuple[Side, Side], rounds: int, given: list[list[int]] | None = None) -> Comparison:
    """Make `rounds` steps of each side; the side that starts alternates."""
    times: tuple[list[SideTime], list[SideTime]] = ([], [])
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            step, _ = sides[which].step(given)
            times[which].append(step)
            name = ("ours", "TRL")[which]
            seconds = f"{step.seconds:7.2f} s ({step.cpu_seconds:7.2f} s CPU)"
            print(f"  {name:5}{seconds} {step.num_tokens:6} tokens", file=sys.stderr)
    return Comparison(*times)


def measure(arguments: argparse.Namespace, trl_python: Path, work: Path) -> dict[str, Any]:
    """Make all comparisons; return the JSON object of the last line."""
    sys.path.insert(0, str(SIDES))
    from model_folder import Architecture, make_model, write_prompts

    shape = Architecture()
    num_parameters = make_model(work / "natural", shape, MEAN_LENGTH)
    make_model(work / "endless", shape, None)
    write_prompts(work / "prompts.jsonl", shape, arguments.prompts, PROMPT_TOKENS)
    settings = {
        "prompts": str(work / "prompts.jsonl"),
        "num_prompts": arguments.prompts,
        "group_size": arguments.group_size,
        "max_prompt_tokens": PROMPT_TOKENS[-1],
        "threads": arguments.threads,
        "max_tokens_per_microbatch": arguments.max_tokens_per_microbatch,
        "trl_microbatch": arguments.trl_microbatch,
    }
    load_before = os.getloadavg()[0]
    natural = settings | {"model": str(work / "natural"), "max_tokens": arguments.max_tokens}
    equal = settings | {"model": str(work / "endless"), "max_tokens": EQUAL_LENGTH}
    (work / "a").mkdir()
    with both_sides(trl_python, work / "a", natural) as sides:
        _, given = sides[0].step()  # each side warms up with a whole step
        sides[1].step()
        print("whole step", file=sys.stderr)
        whole = alternate(sides, arguments.rounds)
        print("training only", file=sys.stderr)
        train_only = alternate(sides, arguments.rounds, given)
        peaks = {"ours": sides[0].peak_bytes, "trl": sides[1].peak_bytes}
    (work / "b").mkdir()
    with both_sides(trl_python, work / "b", equal) as sides:
        print(f"whole step, every completion {EQUAL_LENGTH} tokens", file=sys.stderr)
        for side in sides:
            side.step()
        equal_length = alternate(sides, arguments.rounds)
    rates = [1 / _median_per(steps, "num_rollouts") for steps in (whole.ours, whole.trl)]
    return {
        "name": "grpo_step",
        "measured": rates[0],
        "reference": rates[1],
        "ratio": whole.ratio,
        "unit": "rollouts per second",
        "ratio_per_token": whole.ratio_per_token,
        "ratio_train_only": train_only.ratio,
        "ratio_equal_length": equal_length.ratio,
        "fraction_of_gemm": gemm_fraction(train_only.ours),
        "whole": whole.as_json(),
        "train_only": train_only.as_json(),
        "equal_length": equal_length.as_json(),
        "lengths": length_spread([len(ids) for ids in given]),
        "peak_bytes": peaks,
        "conditions": conditions(arguments, vars(shape), num_parameters, load_before),
    }


def conditions(
    arguments: argparse.Namespace, architecture: dict[str, Any], num_parameters: int, load_before: float
) -> dict[str, Any]:
    """Return the conditions under which the numbers hold."""
    return {
        "prompts": arguments.prompts,
        "group_size": arguments.group_size,
        "max_tokens": arguments.max_tokens,
        "prompt_tokens": [PROMPT_TOKENS[0], PROMPT_TOKENS[-1]],
        "architecture": architecture,
        "num_parameters": num_parameters,
        "dtype": "float32",
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "max_tokens_per_microbatch": arguments.max_tokens_per_microbatch,
        "trl_microbatch": arguments.trl_microbatch,
        "targets": TARGETS,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_before_after": [load_before, os.getloadavg()[0]],
        "torch": importlib.metadata.version("torch"),
        "trl_environment": list(TRL_PINS),
    }


def table(result: dict[str, Any]) -> str:
    """Return the comparisons as text."""
    lines = [f"{'':14} {'ours':>8} {'TRL':>8}  TRL / ours: per rollout, per token, CPU per rollout"]
    for kind in ("whole", "train_only", "equal_length"):
        found = result[kind]
        seconds = [found[side]["seconds_median"] for side in ("ours", "trl")]
        ratios = ", ".join(f"{found[key]:.2f}" for key in ("ratio", "ratio_per_token", "cpu_ratio"))
        lines.append(f"{kind:14} {seconds[0]:6.2f} s {seconds[1]:6.2f} s  {ratios}")
        for side in ("ours", "trl"):
            phases = ", ".join(f"{name} {value:.2f}" for name, value in found[side]["phases"].items())
            lines.append(f"    {side}: {phases}")
    reached = ", ".join(f"{name} {result[name]:.2f} of {target}" for name, target in TARGETS.items())
    return "\n".join([*lines, reached])


def main() -> int:
    """Print a table and one JSON line; return 1 if a target is not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="steps of each side (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=16, help="rollouts per prompt (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest completion (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument("--max-tokens-per-microbatch", type=int, default=4096, help="row budget of our side")
    parser.add_argument("--trl-microbatch", type=int, default=8, help="rollouts per backward pass of TRL")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    arguments = parser.parse_args()
    trl_python = ensure_trl(ROOT / "runs" / "bench" / "trl-venv")
    with tempfile.TemporaryDirectory(prefix="bench_step_") as work:
        result = measure(arguments, trl_python, Path(work))
    if not arguments.json:
        print(table(result))
    print(json.dumps(result))
    return 0 if all(result[name] >= target for name, target in TARGETS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
