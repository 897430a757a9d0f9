"""Reports a run: rank 0 has the progress display, the metrics and the summary, other ranks send their measurements.

The first rank of each prompt shard writes its rollouts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from grpo_mega.config.load import resolved
from grpo_mega.config.schema import Config
from grpo_mega.data.chat import load_tokenizer
from grpo_mega.data.token_texts import TokenTextCache
from grpo_mega.observe.alarm_command import AlarmCommand
from grpo_mega.observe.alarms import Alarms
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.hardware.host import disk_free_fraction
from grpo_mega.observe.history import read_lines
from grpo_mega.observe.memory import PhasePeaks
from grpo_mega.observe.metrics import MetricsWriter
from grpo_mega.observe.progress import Progress
from grpo_mega.observe.rank_reports import RankReport, RankReporter, append_timeline, report_metrics
from grpo_mega.observe.run_folder import RunState
from grpo_mega.observe.summary import Evaluation, Summary, add_seconds, render, versions, write_summary
from grpo_mega.observe.tensorboard import TensorBoardWriter
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.observe.trackers.tracker import open_tracker
from grpo_mega.observe.tuning import tuning_advice
from grpo_mega.observe.verdict import verdict
from grpo_mega.parallel.stop_signal import Interrupted, Stopped
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.quarantine import quarantine_reason, write_reason
from grpo_mega.trainer.rollout_parts import RolloutParts, groups_of
from grpo_mega.trainer.sft_metrics import ExampleStepResult
from grpo_mega.trainer.step_metrics import IsRight, StepResult
from grpo_mega.trainer.work_metrics import WorkMetrics

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Receiver of a run's events, in this order: started, then per step evaluated (if due) and step, then finished.

    In supervised fine-tuning a step is `example_step`.
    """

    def started(self, policy_digest: str, eval_before: Evaluation | None) -> None:
        """Handle the end of the first weight sync and evaluation; None: no evaluation was made."""
        ...

    def evaluated(self, evaluation: Evaluation) -> None:
        """Handle an evaluation during the current step."""
        ...

    def step(self, result: StepResult) -> None:
        """Handle a completed step."""
        ...

    def example_step(self, result: ExampleStepResult) -> None:
        """Handle a completed step of supervised fine-tuning."""
        ...

    def rolled_back(self, step: int) -> None:
        """Handle a return to the checkpoint after `step`; the files of later steps are moved already."""
        ...

    def finished(self, evaluation: Evaluation | None, policy_digest: str | None = None) -> None:
        """Handle the end of the last step; `evaluation` is the last evaluation.

        `policy_digest` is given where the steps have none.
        """
        ...

    def failed(self, error: BaseException) -> None:
        """Handle the exception that ends the run."""
        ...


class RankObserver:
    """Observer of all ranks but rank 0: sends the measurements of each step to rank 0 and ignores the rest.

    The first rank of a prompt shard also writes the rollouts of the shard.
    """

    def __init__(self, ranks: RankReporter, parts: RolloutParts | None) -> None:
        self._ranks, self._parts = ranks, parts

    def started(self, policy_digest: str, eval_before: Evaluation | None) -> None:
        """Ignore the event."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Ignore the event."""

    def step(self, result: StepResult) -> None:
        """Send the measurements of the step, and queue its rollouts. Collective.

        Raises:
            RolloutFileError: the rollouts of an earlier step could not be written.
        """
        shown = None
        if self._parts is not None:
            shown = groups_of(self._parts.write(result), self._parts.shown_groups(result))
        self._ranks.gather(shown)

    def example_step(self, result: ExampleStepResult) -> None:
        """Send the measurements of the step. Collective."""
        self._ranks.gather()

    def rolled_back(self, step: int) -> None:
        """Ignore the event."""

    def finished(self, evaluation: Evaluation | None, policy_digest: str | None = None) -> None:
        """Ignore the event."""

    def failed(self, error: BaseException) -> None:
        """Ignore the event."""


class TrainingData(Protocol):
    """The training data of a run, prompts or examples."""

    def metrics(self, steps: int, num_prompts: int, /) -> dict[str, float]:
        """Return the metrics after `steps` steps of `num_prompts` prompts or examples each."""
        ...


class RunReporter:
    """Observer of rank 0.

    Args:
        config: section observe.
        topology: layout, for the summary and the metrics of each replica.
        run: the open run folder.
        timers: seconds of each phase.
        peaks: peak device memory of each phase, in bytes.
        progress: display on the terminal.
        data: training prompts or examples.
        is_right: returns True for each rollout whose reward means a right answer.
        ranks: measurements of all ranks and nodes.
        work: operations of the updates, and MFU.
        writer: writes the files in the background.
        parts: writes the rollouts of this rank; None in supervised fine-tuning.
        model_folder: folder of the tokenizer with which TensorBoard shows tokens; None: it shows none.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        run: RunState,
        timers: PhaseTimer,
        peaks: PhasePeaks,
        progress: Progress,
        data: TrainingData,
        is_right: IsRight,
        ranks: RankReporter,
        work: WorkMetrics,
        writer: BackgroundWriter,
        parts: RolloutParts | None = None,
        model_folder: Path | None = None,
    ) -> None:
        self._topology, self._run, self._timers, self._peaks = topology, run, timers, peaks
        self._progress, self._is_right = progress, is_right
        names = [source.label for source in config.data.train_sets]
        self._sets = names if len(names) > 1 else []
        self._data, self._prompts_per_step = data, config.data.prompts_per_step
        self._held_out: dict[str, float] = {}
        self._ranks, self._work = ranks, work
        self._writer, self._parts = writer, parts
        self._config, self._model_folder = config, model_folder
        self._alarms = self._read_alarms()
        self._metrics = self._open_metrics(run.step + 1)
        self._show_held_out()
        command = config.observe.alarm_command
        self._alarm_command = None if command is None else AlarmCommand(command)
        axes = ("world_size", "tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp")
        layout = {name: int(getattr(topology, name)) for name in axes}
        self.summary = Summary(
            status="interrupted",  # replaced at the end of the run; a killed run cannot replace it
            steps=run.step,
            eval_before=run.previous.eval_before if run.previous else None,
            layout={**layout, "engine_tp": topology.engine_tp, "engine_replicas": topology.num_replicas},
            versions=versions(),
        )

    def started(self, policy_digest: str, eval_before: Evaluation | None) -> None:
        """Write the first evaluation and the policy's digest."""
        if eval_before is not None:
            self._metrics.write_evaluation(self._run.step, "before", _as_metrics(eval_before))
            self._progress.note(f"held-out accuracy before training: {eval_before.accuracy:.3f}")
            self._progress.held_out(self._run.step, eval_before.accuracy)
        self._write(eval_before=eval_before or self.summary.eval_before, policy_digest=policy_digest)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Keep the evaluation's numbers for the metrics line of the current step."""
        self._held_out = _as_metrics(evaluation)

    def step(self, result: StepResult) -> None:
        """Write the rollouts, then the metrics line: if the line is on disk, so are the rollouts of this rank."""
        times = self._timers.step_metrics()
        columns = None if self._parts is None else self._parts.write(result)
        order = [] if self._parts is None else self._parts.shown_groups(result)
        reports = self._ranks.gather(None if columns is None else groups_of(columns, order))
        if columns is not None:
            shown = [report.shown for report in reports if report.shown is not None]
            self._metrics.show_rollouts(columns, shown, order, result.ratio_counts)
        metrics = result.metrics(self._topology.num_replicas, self._is_right, self._sets)
        sampled = {"throughput/rollout_tokens_per_second": metrics["rollout/tokens"] / times["time/rollout_seconds"]}
        lengths = result.groups.table.num_tokens
        trained = lengths[result.batch.is_trained].tolist()
        work = self._work.of_step(trained, result.batch.plan.num_rows, times)
        if result.guard.quarantined is not None:
            folder = self._run.folder.quarantine_of(result.step)
            reason = quarantine_reason(result, self._config.run.seed, self.summary.policy_digest)
            self._writer.submit(lambda: write_reason(folder, reason))
        data = self._data.metrics(result.guard.prompts_step or result.step, self._prompts_per_step)
        self._write_line(result.step, int(lengths.sum()), {**metrics, **sampled, **work, **data}, times, reports)
        carry = result.groups.carry
        carried = None if carry is None else {"groups": carry.num_groups, "tokens": carry.num_tokens}
        self._write(steps=result.step, policy_digest=result.sync.policy_digest, carried=carried)

    def example_step(self, result: ExampleStepResult) -> None:
        """Write the metrics line. The digest of the policy is computed at the ends of the run only."""
        times, reports = self._timers.step_metrics(), self._ranks.gather()
        work = self._work.of_step([len(example.token_ids) for example in result.examples], (), times)
        data = self._data.metrics(result.guard.prompts_step or result.step, self._prompts_per_step)
        self._write_line(result.step, result.num_tokens, {**result.metrics(), **work, **data}, times, reports)
        self._write(steps=result.step, policy_digest=None)

    def rolled_back(self, step: int) -> None:
        """Continue metrics, curves and alarms after `step`."""
        self._metrics.close()
        self._alarms, self._held_out = self._read_alarms(), {}
        self._metrics = self._open_metrics(step + 1)
        self._write(steps=step)

    def finished(self, evaluation: Evaluation | None, policy_digest: str | None = None) -> None:
        """Write the last evaluation and the final summary, and log the summary."""
        if evaluation is not None:
            self._metrics.write_evaluation(self.summary.steps, "after", _as_metrics(evaluation))
            self._progress.held_out(self.summary.steps, evaluation.accuracy)
        self._metrics.finish()
        ended = verdict(self._alarms.history, self._alarms.raised, self.summary.eval_before, evaluation)
        policy_digest = policy_digest or self.summary.policy_digest
        tuning = tuning_advice(self._alarms.history, self._alarms.raised)
        self._write(status="done", eval_after=evaluation, verdict=ended, policy_digest=policy_digest, tuning=tuning)
        self._writer.flush()
        log.info("%s", render(self.summary, self._run.folder.path))

    def failed(self, error: BaseException) -> None:
        """Write a summary with the status and the exception, and log it if the user stopped the run."""
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit | Stopped | Interrupted)
        status = "interrupted" if interrupted else "failed"
        self._writer.wait()  # for the summary of the step, which would replace this one
        self._update_summary(status=status, error=f"{type(error).__name__}: {error}")
        write_summary(self._run.folder.summary, self.summary)
        if interrupted:
            log.info("%s", render(self.summary, self._run.folder.path))

    def close(self) -> None:
        """Flush the TensorBoard curves, and wait for alarm commands."""
        self._metrics.close()
        if self._alarm_command is not None:
            self._alarm_command.close()

    def _show_held_out(self) -> None:
        """Show the held-out accuracies of earlier commands of this run: the first and the last one."""
        previous, found = self._run.previous, list[tuple[int, float]]()
        if (latest := self._alarms.history.latest("eval/accuracy")) is not None:
            found.append(latest)
        if previous is not None and previous.eval_after is not None:
            found.append((previous.steps, previous.eval_after.accuracy))
        if previous is not None and previous.eval_before is not None:
            self._progress.held_out(0, previous.eval_before.accuracy)
        if found:
            self._progress.held_out(*max(found))

    def _read_alarms(self) -> Alarms:
        """Return the alarms of the steps in metrics.jsonl."""
        alarms = Alarms() if self._config.observe.alarms else Alarms(rules=())
        for step, line in read_lines(self._run.folder.metrics):
            alarms.step(step, line)
        return alarms

    def _open_metrics(self, first_step: int) -> MetricsWriter:
        """Open the files of the metrics for the steps from `first_step` on."""
        folder, config, model_folder = self._run.folder, self._config, self._model_folder
        tensorboard = token_texts = None
        if "tensorboard" in config.observe.trackers:
            token_texts = None if model_folder is None else TokenTextCache(load_tokenizer(model_folder))
            known = self._alarms.history.names("")
            tensorboard = TensorBoardWriter(
                folder.tensorboard, first_step=first_step, names=known, config=resolved(config)
            )
        others = [open_tracker(n, folder.path, resolved(config)) for n in config.observe.trackers if n != "tensorboard"]
        return MetricsWriter(
            folder,
            self._writer,
            first_step=first_step,
            tensorboard=tensorboard,
            token_texts=token_texts,
            trackers=others,
        )

    def _raise_alarms(self, step: int, line: Mapping[str, float]) -> None:
        raised = self._alarms.step(step, line)
        for alarm in raised:
            log.warning("alarm: %s", alarm)
            if self._alarm_command is not None:
                self._alarm_command.start(alarm)
        if raised:
            self._metrics.write_alarms(step, [str(alarm) for alarm in raised])

    def _write_line(
        self,
        step: int,
        num_tokens: int,
        metrics: Mapping[str, float],
        times: Mapping[str, float],
        reports: Sequence[RankReport],
    ) -> None:
        """Write the metrics line and the phases of the ranks, and show the line."""
        line = {
            **metrics,
            **times,
            "throughput/tokens_per_second": num_tokens / times["time/step_seconds"],
            **report_metrics(reports),
            "host/memory_bytes": reports[0].process["rank_memory_bytes"],
            "host/disk_free_fraction": disk_free_fraction(self._run.folder.path),
            **self._peaks.step_metrics(),
            **self._held_out,
        }
        self._held_out = {}
        timeline = self._run.folder.timeline
        self._writer.submit(lambda: append_timeline(timeline, step, reports))
        changes = self._run.changes if step == self._run.step + 1 else ()
        self._metrics.write(step, line, [f"{each.key}: {each.before} -> {each.now}" for each in changes])
        self._progress.step(step, line)
        self._raise_alarms(step, line)

    def _write(self, **changes: Any) -> None:
        self._update_summary(**changes)
        path, summary = self._run.folder.summary, self.summary
        self._writer.submit(lambda: write_summary(path, summary))

    def _update_summary(self, **changes: Any) -> None:
        changes["alarms"] = [asdict(alarm) for alarm in self._alarms.raised]
        seconds = add_seconds(self._run.previous, self._timers.total_seconds())
        self.summary = replace(self.summary, seconds=seconds, **changes)


def _as_metrics(evaluation: Evaluation) -> dict[str, float]:
    found = {f"eval/{name}": value for name, value in evaluation.numbers().items() if name != "num_prompts"}
    for of_set, part in evaluation.sets.items():
        found |= {f"eval/set/{of_set}/{name}": v for name, v in part.numbers().items() if name != "num_prompts"}
    return found
