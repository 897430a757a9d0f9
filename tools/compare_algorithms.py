"""Train one config with several algorithms on the same prompts and with the same budget, and compare the results.

    python tools/compare_algorithms.py [CONFIG] [--algorithms grpo,dr_grpo,dapo,rloo,ppo] [--out DIR] [key=value ...]

Each run is `launch/train.sh CONFIG algorithm.name=NAME observe.memory_peaks=true key=value ...` in DIR/NAME. A finished
run in that folder is read and not repeated. Writes DIR/table.md and DIR/curves.png (which needs matplotlib, part of the
extra `dev`): held-out accuracy, bytes of trainable state (weights, gradients and optimizer of policy and critic on rank
0), peak memory of each phase, seconds per step.

Exit code 0: done; 1: a run failed; 2: the input is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.config.algorithm_presets import AlgorithmName
from grpo_mega.config.load import load_config
from grpo_mega.types import UserError

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = "grpo,dr_grpo,dapo,rloo,ppo"
PHASES = ("rollout", "log_probs", "critic", "train", "sync")
STATE = ("params", "grads", "optimizer")
SMOOTHED = 5  # steps of the running mean of a curve


@dataclass(frozen=True)
class AlgorithmResult:
    """Result of one run.

    `curve` has the training accuracy of each step. `peak_bytes` is the maximum over all steps except the first, which
    includes one-time allocations. `discarded_groups` counts the groups that dynamic sampling replaced.
    """

    algorithm: str
    accuracy_before: float
    accuracy: float
    greedy_accuracy: float | None
    trainable_bytes: int
    policy_bytes: dict[str, int]
    critic_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    step_seconds: float
    phase_seconds: dict[str, float]
    discarded_groups: int
    curve: list[float]


def run(name: str, arguments: Sequence[str], out: Path, *, quiet: bool) -> Path:
    """Train unless the run is finished; return the run folder.

    Raises:
        RuntimeError: the run failed; its message is on the screen.
    """
    folder = out / name
    command = [sys.executable, "-m", "grpo_mega.launch", str(ROOT / "launch" / "train.sh"), *arguments]
    command += ["observe.memory_peaks=true", f"algorithm.name={name}", f"run.dir={folder}"]
    stream = subprocess.DEVNULL if quiet else None
    if subprocess.run(command, cwd=ROOT, stdout=stream, check=False).returncode != 0:
        raise RuntimeError(f"the run of algorithm.name={name} failed; its message is above")
    return folder


def read(name: str, folder: Path) -> AlgorithmResult:
    """Read the result of a finished run from its folder."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "evaluation" not in line]
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    last, steady = lines[-1], lines[1:] or lines
    policy, critic = ({p: int(last.get(f"memory/{who}_{p}_bytes", 0)) for p in STATE} for who in ("policy", "critic"))

    def largest(phase: str) -> int:
        return int(max(line.get(f"memory/peak_{phase}_bytes", 0) for line in steady))

    def median_seconds(phase: str) -> float:
        return float(statistics.median(line.get(f"time/{phase}_seconds", 0.0) for line in steady))

    return AlgorithmResult(
        algorithm=name,
        accuracy_before=summary["eval_before"]["accuracy"],
        accuracy=summary["eval_after"]["accuracy"],
        greedy_accuracy=summary["eval_after"].get("greedy_accuracy"),
        trainable_bytes=sum(policy.values()) + sum(critic.values()),
        policy_bytes=policy,
        critic_bytes=critic,
        peak_bytes={phase: size for phase in PHASES if (size := largest(phase))},
        step_seconds=median_seconds("step"),
        phase_seconds={phase: seconds for phase in PHASES if (seconds := median_seconds(phase))},
        discarded_groups=int(sum(line["group/discarded"] for line in lines)),
        curve=[line["reward/accuracy"] for line in lines],
    )


def table(results: Sequence[AlgorithmResult]) -> str:
    """Return the comparison as a Markdown table."""
    phases = [p for p in PHASES if any(p in r.peak_bytes for r in results)]
    head = ["algorithm", "before", "after", "greedy", "trainable MB", "/ first", "s/step", "discarded groups"]
    rows = [[*head, *(f"peak {p}, MiB" for p in phases)]]
    for r in results:
        greedy = "" if r.greedy_accuracy is None else f"{r.greedy_accuracy:.3f}"
        rows.append(
            [
                f"`{r.algorithm}`",
                f"{r.accuracy_before:.3f}",
                f"{r.accuracy:.3f}",
                greedy,
                f"{r.trainable_bytes / 1e6:.2f}",
                f"{r.trainable_bytes / results[0].trainable_bytes:.2f}",
                f"{r.step_seconds:.2f}",
                f"{r.discarded_groups}",
                *(f"{r.peak_bytes[p] / 2**20:.0f}" if p in r.peak_bytes else "" for p in phases),
            ]
        )
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def plot(results: Sequence[AlgorithmResult], path: Path) -> None:
    """Plot training accuracy by step, and trainable state.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise UserError(
            "curves.png needs matplotlib, which is not installed", remedy="pip install 'grpo_mega[dev]'"
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1), layout="constrained")
    for r in results:
        window = [r.curve[max(0, i - SMOOTHED + 1) : i + 1] for i in range(len(r.curve))]
        curves.plot(range(1, len(window) + 1), [statistics.fmean(w) for w in window], label=r.algorithm)
    curves.set(xlabel="step", ylabel=f"training accuracy, mean of {SMOOTHED} steps")
    curves.legend()
    bottom = [0.0] * len(results)
    for who in ("policy", "critic"):
        for part in STATE:
            sizes = [getattr(r, f"{who}_bytes")[part] / 1e6 for r in results]
            bars.bar([r.algorithm for r in results], sizes, bottom=bottom, label=f"{who}: {part}")
            bottom = [b + s for b, s in zip(bottom, sizes, strict=True)]
    bars.set(ylabel="trainable state, MB")
    bars.tick_params(axis="x", rotation=45)
    bars.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def compare(args: argparse.Namespace) -> list[AlgorithmResult]:
    """Make all runs, one after the other, and write the table and the plot.

    Raises:
        UserError: an algorithm is unknown, there are no held-out prompts, or the config is wrong; before any run.
        RuntimeError: a run failed.
    """
    names = [name.strip() for name in args.algorithms.split(",") if name.strip()]
    for name in names:
        if name not in get_args(AlgorithmName):
            raise UserError(f"--algorithms: {name!r} must be one of {', '.join(get_args(AlgorithmName))}")
    if not names:
        raise UserError(
            f"--algorithms={args.algorithms!r} must name at least one", remedy=f"use for example {ALGORITHMS}"
        )
    for name in names:
        config = load_config(args.config, [*args.overrides, f"algorithm.name={name}"])
        if config.data.eval is None:
            raise UserError("data.eval=null: algorithms are compared by held-out accuracy", remedy="set data.eval")
    args.out.mkdir(parents=True, exist_ok=True)
    results = [read(name, run(name, [str(args.config), *args.overrides], args.out, quiet=args.json)) for name in names]
    (args.out / "table.md").write_text(table(results), encoding="utf-8")
    plot(results, args.out / "curves.png")
    return results


@errors_as_exit_codes(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--algorithms", default=ALGORITHMS, help=f"default: {ALGORITHMS}")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare_algorithms"), help="folder of the runs, the table and the plot"
    )
    parser.add_argument("--json", action="store_true", help="print the list of results as JSON on the last line")
    args = parser.parse_intermixed_args(argv)
    if "=" in str(args.config):  # CONFIG may be omitted, as with launch/train.sh
        args.overrides, args.config = [str(args.config), *args.overrides], parser.get_default("config")
    args.out = args.out.resolve()
    results = compare(args)
    print(table(results), end="")
    if args.json:
        print(json.dumps([asdict(result) for result in results]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
