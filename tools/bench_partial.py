"""Measure updates per hour with partial rollouts, next to synchronous steps of the same model.

    python tools/bench_partial.py [--rounds 3] [--json]

Both sides train the same random model of the quickstart's size. It ends an answer at every token with a probability
that depends on the last token of the prompt: three quarters of the answers have a mean length of 36 tokens, and one
quarter of 90, so that p99/p50 is about 8. Rewards are shuffled and the learning rate is tiny, so that lengths do not
change. The sides make their steps alternately, each in its own run folder that is continued in every round. The start
of the processes and the first steps of each side are not counted: a partial run begins with short answers only.
`measured` is the updates per hour with partial rollouts, `reference` those without.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.step_sides.model_folder import make_model  # noqa: E402
from tools.step_sides.two_mean_lengths import (  # noqa: E402
    GROUP,
    MAX_TOKENS,
    PER_STEP,
    SHAPE,
    SHORT_MEAN,
    give_two_mean_lengths,
    write_prompts,
)

TARGET = 1.3
WARM_STEPS = 4
PARTIAL = "sampling.partial={oversubmit: 2.0, slice_tokens: 16, max_staleness: 16}"


@dataclass(frozen=True)
class MeasuredSide:
    """Steps of one side after the first ones.

    Attributes:
        seconds: of each step.
        rollout_seconds: of its sampling.
        tokens: numbers of trained tokens of each step.
        staleness: mean over the tokens of each step, in updates.
        lengths: of all completions, in tokens.
    """

    seconds: Sequence[float]
    rollout_seconds: Sequence[float]
    tokens: Sequence[float]
    staleness: Sequence[float]
    lengths: Sequence[int]

    @property
    def updates_per_hour(self) -> float:
        """Updates per hour; a step makes one."""
        return 3600.0 * len(self.seconds) / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second of the steps."""
        return sum(self.tokens) / sum(self.seconds)

    def as_json(self) -> dict[str, Any]:
        """Return means and quantiles."""
        p50, p99 = np.percentile(self.lengths, (50, 99)).tolist()
        return {
            "steps": len(self.seconds),
            "updates_per_hour": self.updates_per_hour,
            "tokens_per_second": self.tokens_per_second,
            "step_seconds_median": statistics.median(self.seconds),
            "rollout_seconds_median": statistics.median(self.rollout_seconds),
            "tokens_per_update": statistics.mean(self.tokens),
            "staleness_mean": statistics.mean(self.staleness),
            "length_p50": p50,
            "length_p99": p99,
            "p99_over_p50": p99 / p50,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Run both sides alternately and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps per round (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="bench_partial_"))
    try:
        make_model(folder / "model", SHAPE, SHORT_MEAN)
        give_two_mean_lengths(folder / "model")
        write_prompts(folder / "prompts.jsonl", 2000)
        for done in range(1, options.rounds + 1):
            for name, more in (("synchronous", ()), ("partial", (PARTIAL,))):
                _train(folder, name, WARM_STEPS + done * options.steps, more)
        partial, synchronous = (_read(folder / "runs" / name) for name in ("partial", "synchronous"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {
        "name": "partial_rollouts",
        "measured": partial.updates_per_hour,
        "reference": synchronous.updates_per_hour,
        "ratio": partial.updates_per_hour / synchronous.updates_per_hour,
        "ratio_tokens_per_second": partial.tokens_per_second / synchronous.tokens_per_second,
        "unit": "updates/hour",
        "target": TARGET,
        "partial": partial.as_json(),
        "synchronous": synchronous.as_json(),
        "conditions": f"{options.rounds} rounds of {options.steps} steps, {PER_STEP} prompts x {GROUP} rollouts, "
        f"{PARTIAL}, vLLM, 1 rank, {platform.processor() or platform.machine()}",
    }
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))


def _train(folder: Path, name: str, steps: int, more: Sequence[str]) -> None:
    arguments = [
        "configs/quickstart.yaml",
        f"run.dir={folder / 'runs' / name}",
        "run.world_size=1",
        "model.base=null",
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'prompts.jsonl'}",
        "data.eval=null",
        f"data.prompts_per_step={PER_STEP}",
        f"sampling.group_size={GROUP}",
        f"sampling.max_tokens={MAX_TOKENS}",
        "reward.terms=[{name: length, args: {limit: 60, buffer: 60, kind: target}}]",
        "reward.shuffle=true",
        "algorithm.kl_coef=0",
        "train.minibatches_per_epoch=1",
        f"train.steps={steps}",
        "optimizer.lr=1.0e-9",
        "optimizer.min_lr=0",
        "checkpoint.every=1000",
        "observe.trackers=[]",
        *more,
    ]
    done = subprocess.run([ROOT / "launch" / "train.sh", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the {name} run failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")


def _read(run: Path) -> MeasuredSide:
    from grpo_mega.observe.rollout_files.reader import read_step
    from grpo_mega.observe.run_folder import RunFolder

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["step"] > WARM_STEPS]
    tables = [read_step(RunFolder(run).rollouts_of(line["step"]), ["completion_ids"]).table for line in lines]
    return MeasuredSide(
        [line["time/step_seconds"] for line in lines],
        [line["time/rollout_seconds"] for line in lines],
        [line["train/num_loss_tokens"] for line in lines],
        [line.get("rollout/staleness_mean", 0.0) for line in lines],
        [len(row) for table in tables for row in table["completion_ids"].to_pylist()],
    )


if __name__ == "__main__":
    main()
