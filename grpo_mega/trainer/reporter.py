"""Rank 0's account of a run: the display, the lines of metrics, the rollouts on disk and the summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpo_mega.config.schema import Config
from grpo_mega.observe.memory import PhasePeaks
from grpo_mega.observe.metrics import MetricsWriter
from grpo_mega.observe.progress import Progress
from grpo_mega.observe.rollouts import rollout_rows, write_experts
from grpo_mega.observe.run_folder import RunState
from grpo_mega.observe.summary import Evaluation, Summary, add_seconds, versions, write_summary
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.stop_signal import Stopped
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.step_metrics import StepResult
from grpo_mega.types import Reward


class Observer:
    """Exists on rank 0 only. `is_right` says whether a reward means a right answer."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        run: RunState,
        timers: PhaseTimer,
        peaks: PhasePeaks,
        progress: Progress,
        is_right: Callable[[Reward], bool],
    ) -> None:
        self._topology, self._run, self._timers, self._peaks = topology, run, timers, peaks
        self._progress, self._is_right = progress, is_right
        self._metrics = MetricsWriter(
            run.folder,
            first_step=run.step + 1,
            tensorboard=config.observe.tensorboard,
            rollouts_shown=config.observe.rollouts_shown,
        )
        self._held_out: dict[str, float] = {}
        axes = ("world_size", "tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp")
        layout = {name: int(getattr(topology, name)) for name in axes}
        self.summary = Summary(
            status="interrupted",  # until the end says otherwise: a killed run cannot
            steps=run.step,
            eval_before=run.previous.eval_before if run.previous else None,
            layout={**layout, "engine_tp": topology.engine_tp, "engine_replicas": topology.num_replicas},
            versions=versions(),
        )

    def started(self, policy_digest: str, eval_before: Evaluation | None) -> None:
        """The first sync is done and the base is evaluated."""
        if eval_before is not None:
            self._metrics.write_curves(self._run.step, _as_metrics(eval_before))
            self._progress.note(f"held-out accuracy before training: {eval_before.accuracy:.3f}")
        self._write(eval_before=eval_before or self.summary.eval_before, policy_digest=policy_digest)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Its numbers go into the line of the present step."""
        self._held_out = _as_metrics(evaluation)

    def step(self, result: StepResult) -> None:
        """Rollouts first, then the step's line: a line on disk means that its rollouts are there."""
        rows = rollout_rows(result.groups.rollouts, result.batch.mean_advantages, result.old_log_probs)
        self._metrics.write_rollouts(result.step, rows)
        write_experts(self._run.folder.experts_of(result.step), result.groups.rollouts)
        metrics = result.metrics(self._topology.num_replicas, self._is_right)
        times = self._timers.step_metrics()
        tokens = sum(r.num_tokens for r in result.groups.rollouts)
        speed = {
            "throughput/tokens_per_second": tokens / times["time/step_seconds"],
            "throughput/rollout_tokens_per_second": metrics["rollout/tokens"] / times["time/rollout_seconds"],
        }
        line = {**metrics, **times, **speed, **self._peaks.step_metrics(), **self._held_out}
        self._held_out = {}
        self._metrics.write(result.step, line)
        self._progress.step(result.step, line)
        self._write(steps=result.step, policy_digest=result.sync.policy_digest)

    def finished(self, evaluation: Evaluation | None) -> None:
        """The run has reached its last step."""
        if evaluation is not None:
            self._metrics.write_curves(self.summary.steps, _as_metrics(evaluation))
        self._write(status="done", eval_after=evaluation)

    def failed(self, error: BaseException) -> None:
        """Keeps what is known; the summary says why it ended."""
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit | Stopped)
        self._write(status="interrupted" if interrupted else "failed", error=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Flush curves."""
        self._metrics.close()

    def _write(self, **changes: Any) -> None:
        seconds = add_seconds(self._run.previous, self._timers.total_seconds())
        self.summary = replace(self.summary, seconds=seconds, **changes)
        write_summary(self._run.folder.summary, self.summary)


def _as_metrics(evaluation: Evaluation) -> dict[str, float]:
    found = {f"eval/{name}": value for name, value in evaluation.numbers().items() if name != "num_prompts"}
    for of_set, part in evaluation.sets.items():
        found |= {f"eval/set/{of_set}/{name}": v for name, v in part.numbers().items() if name != "num_prompts"}
    return found
