"""Builds the observer of a rank: rank 0 reports the run, the other ranks send their measurements to it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from grpo_mega.config.schema import Config
from grpo_mega.models.spec import ModelSpec
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.engine_metrics import EngineWork
from grpo_mega.observe.memory import PhasePeaks
from grpo_mega.observe.progress import Progress
from grpo_mega.observe.rank_reports import MeasureWork, RankReporter, RankWork
from grpo_mega.observe.run_folder import RunState
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.planner.hardware import device_peak_flops
from grpo_mega.policy.learner import MegatronLearner
from grpo_mega.rollout.answer_times import AnswerSeconds, AnswerTimes
from grpo_mega.trainer.reporter import Observer, RankObserver, RunReporter, TrainingData
from grpo_mega.trainer.rollout_parts import RolloutParts, writes_rollouts
from grpo_mega.trainer.step_metrics import IsRight
from grpo_mega.trainer.work_metrics import WorkMetrics


@dataclass(frozen=True)
class Shown:
    """Sources of the report of a run, besides its steps; `progress` is None on all ranks but rank 0."""

    config: Config
    run: RunState
    timers: PhaseTimer
    peaks: PhasePeaks
    progress: Progress | None
    data: TrainingData
    is_right: IsRight
    spec: ModelSpec
    writer: BackgroundWriter
    """Writes metrics and rollouts of this rank."""
    model_folder: Path | None = None
    """Folder of the tokenizer with which TensorBoard shows tokens."""


def make_observer(shown: Shown, ranks: Ranks, stack: ExitStack, measure_work: MeasureWork) -> Observer:
    """Return the observer of this rank; `stack` closes it. It measures the node on one rank of each node.

    Args:
        shown: timers and the parts of the report.
        ranks: coordinates of this rank.
        stack: closes the observer.
        measure_work: measures the work of this rank.
    """
    num_gpus = torch.cuda.device_count() if ranks.device.type == "cuda" else 0
    reporter = RankReporter(
        ranks.rank, ranks.topology.world_size, shown.timers, num_gpus=num_gpus, measure_work=measure_work
    )
    stack.callback(reporter.close)
    parts = None
    if writes_rollouts(ranks) and not shown.config.is_sft:
        parts = RolloutParts(shown.config, shown.run.folder, ranks, shown.writer)
    if shown.progress is None:
        return RankObserver(reporter, parts)
    report = RunReporter(
        shown.config, ranks.topology, shown.run, shown.timers, shown.peaks, shown.progress, shown.data, shown.is_right,
        reporter, _work_metrics(shown, ranks), shown.writer, parts, shown.model_folder,
    )  # fmt: skip
    stack.callback(report.close)
    return report


def _work_metrics(shown: Shown, ranks: Ranks) -> WorkMetrics:
    peak = device_peak_flops(torch.cuda.get_device_name()) if ranks.device.type == "cuda" else None
    return WorkMetrics(shown.spec, ranks.topology, shown.config.train.epochs_per_rollout, peak)


def own_work(
    policy: MegatronLearner,
    ranks: Ranks,
    critic: MegatronLearner | None = None,
    answers: AnswerTimes | None = None,
) -> MeasureWork:
    """Return the function that measures the work of this rank.

    Args:
        policy: measures its passes.
        ranks: coordinates of this rank.
        critic: measures its passes, if there is one.
        answers: times of this rank's rollouts, if it samples any.
    """

    def measure() -> RankWork:
        passes = policy.take_work_seconds() + (0.0 if critic is None else critic.take_work_seconds())
        found, engine = AnswerSeconds(), None
        if answers is not None:
            found, (gauges, errors) = answers.take(), answers.take_gauges()
            if ranks.at.engine_tp_rank == 0:
                engine = EngineWork(ranks.at.replica, gauges, errors.failures, errors.tool_errors)
        return RankWork(passes, found.sampling, found.last_answers, engine)

    return measure
