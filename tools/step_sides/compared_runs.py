"""Two runs of launch/train.sh that make their steps alternately (tools/bench_partial.py, tools/bench_async.py).

Both train the model of two_mean_lengths.py on one rank. Rewards are shuffled and the learning rate is tiny, so that
lengths do not change. Each run has its own run folder, which is continued in every round. The first steps are not
counted.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.step_sides.two_mean_lengths import GROUP, MAX_TOKENS, PER_STEP, write_model_and_prompts

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/quickstart.yaml"


@dataclass(frozen=True)
class CountedSteps:
    """Counted steps of a run: their lines of metrics.jsonl, and for each step [P, G] the lengths of its answers."""

    lines: Sequence[dict[str, Any]]
    lengths: Sequence[NDArray[np.int64]]

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [line["time/step_seconds"] for line in self.lines]

    @property
    def updates_per_hour(self) -> float:
        """Updates per hour; a step makes one."""
        return 3600.0 * len(self.lines) / sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second of the steps."""
        return float(sum(line["train/num_loss_tokens"] for line in self.lines) / sum(self.seconds))


class ComparedRuns:
    """Runs in `folder`, which gets their model and prompts.

    Args:
        folder: empty folder for all files.
        num_prompts: number of prompts, at least those of all steps.
        overrides: `section.key=value` overrides of all runs and servers.
    """

    def __init__(self, folder: Path, num_prompts: int, overrides: Sequence[str] = ()) -> None:
        model, prompts = write_model_and_prompts(folder, num_prompts)
        self._folder = folder
        self.arguments = [
            CONFIG,
            "run.world_size=1",
            "model.base=null",
            f"model.path={model}",
            f"data.train={prompts}",
            "data.eval=null",
            f"data.prompts_per_step={PER_STEP}",
            f"sampling.group_size={GROUP}",
            f"sampling.max_tokens={MAX_TOKENS}",
            "reward.terms=[{name: length, args: {limit: 60, buffer: 60, kind: target}}]",
            "reward.shuffle=true",
            "algorithm.kl_coef=0",
            "train.minibatches_per_epoch=1",
            "optimizer.lr=1.0e-9",
            "optimizer.min_lr=0",
            "checkpoint.every=1000",
            "observe.trackers=[]",
            *overrides,
        ]
        """Config and overrides."""

    def train_alternately(self, runs: Mapping[str, Sequence[str]], steps: Sequence[int]) -> None:
        """Continue each run up to a number of steps, and then up to the next one.

        Args:
            runs: name of the run -> further overrides.
            steps: number of steps at the end of each round.

        Raises:
            RuntimeError: a run failed.
        """
        for end in steps:
            for name, overrides in runs.items():
                run = [f"run.dir={self._folder / 'runs' / name}", f"train.steps={end}", *overrides]
                command = [str(ROOT / "launch" / "train.sh"), *self.arguments, *run]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"the {name} run failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")

    def counted_steps(self, name: str, num_warm: int, steps_per_round: int | None = None) -> CountedSteps:
        """Return the steps of a run after the first ones.

        Args:
            name: of the run.
            num_warm: number of steps that are not counted, at the start or in each round.
            steps_per_round: steps of a round; None: only the first steps of the run are left out.
        """
        from grpo_mega.observe.run_folder import RunFolder

        folder = RunFolder(self._folder / "runs" / name)
        lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
        period = steps_per_round or len(lines)
        lines = [line for line in lines if (line["step"] - 1) % period >= num_warm]
        return CountedSteps(lines, [np.array(list(_groups_of(folder.rollouts_of(line["step"])))) for line in lines])


def _groups_of(step: Path) -> Iterator[NDArray[np.int64]]:
    """Yield the lengths of the answers of each group."""
    import pyarrow.compute as pc

    from grpo_mega.observe.rollout_files.reader import read_step

    table = read_step(step, ["group", "completion_ids"]).table
    groups = table["group"].to_numpy()
    lengths = pc.list_value_length(table["completion_ids"]).to_numpy().astype(np.int64)
    for group in np.unique(groups):
        yield lengths[groups == group]
