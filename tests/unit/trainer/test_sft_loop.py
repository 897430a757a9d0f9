"""The loop of supervised fine-tuning: order of its parts, evaluations, the stop signal, and its metrics."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.checkpoint.schedule import CheckpointSchedule
from grpo_mega.config.guard_section import GuardConfig
from grpo_mega.config.policy_sections import OptimizerConfig, ParallelConfig, PrecisionConfig
from grpo_mega.config.rollout_sections import EvaluationConfig
from grpo_mega.config.schema import CheckpointConfig, ObserveConfig, RunConfig, TrainConfig
from grpo_mega.data.example_dataset import Example, ExampleDataset, ExampleSet
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.metric_table import require_known
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import Stopped
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.trainer.run_trace import RunTrace
from grpo_mega.trainer.save_points import SavePoints
from grpo_mega.trainer.sft_loop import SftState, train_on_examples
from grpo_mega.trainer.sft_metrics import ExampleStepResult
from grpo_mega.types import UpdateStats

EXAMPLES = tuple(Example(i, array("i", [2, 3 + i, 4]), bytes([0, 1, 1])) for i in range(4))


class Recorder:
    """Records the calls of the loop on its policy, phases, checkpoints, engine and observer."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.staged: str | None = None
        self.stop_code = 0
        self.wait_seconds = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        self.calls.append("device")
        yield

    def update(self, microbatches: Any, loss: Any, rate: float, allows: Any) -> tuple[UpdateStats, None]:
        trained = sorted(t for m in microbatches for t in m.labels[m.loss_mask].tolist())
        self.calls.append(("update", len(trained), rate))
        return UpdateStats(2.0, rate, {"loss": math.log(3), "entropy": 0.5}, {"entropy": 0.5}), None

    def state_bytes(self) -> dict[str, int]:
        return {"params": 7}

    def stage_if_due(self, policy: Any, state: LoopState, *, is_due: bool) -> None:
        self.staged = f"checkpoint {state.step} of version {state.policy_version}" if is_due else None

    def publish(self, *, wait: bool) -> None:
        if self.staged is not None:
            self.calls.append(f"{self.staged}{', waited' if wait else ''}")

    def wait_for_removal(self) -> None:
        self.calls.append("old checkpoints deleted")

    def training_starts(self) -> None:
        self.calls.clear()

    def wanted(self) -> int:
        return self.stop_code

    def evaluate(self, state: LoopState) -> str:
        self.calls.append(f"evaluate {state.step}")
        return "evaluation"

    def evaluated(self, evaluation: str) -> None:
        self.calls.append(evaluation)

    def example_step(self, result: ExampleStepResult) -> None:
        self.calls.append(("step", result.step, [example.index for example in result.examples]))


def job_of(recorder: Recorder, *, with_engine: bool = True) -> SftState:
    topology = Topology(1)
    config = SimpleNamespace(
        run=RunConfig(seed=3),
        data=SimpleNamespace(prompts_per_step=2),
        train=TrainConfig(objective="sft", steps=4, max_tokens_per_microbatch=8),
        optimizer=OptimizerConfig(lr=1.0, decay_updates=10),
        parallel=ParallelConfig(),
        precision=PrecisionConfig(dtype="fp32"),
        checkpoint=CheckpointConfig(every=3),
        evaluation=EvaluationConfig(every=2),
    )
    one: Any = recorder
    ranks = Ranks(topology, topology.coordinates(0), torch.device("cpu"))
    timers = PhaseTimer()
    return SftState(
        cast("Any", config),
        ranks,
        ExampleDataset((ExampleSet("examples", EXAMPLES),)),
        one,
        one,
        SavePoints(ranks, one, CheckpointSchedule(3, None, last_step=4), one, timers, 4, BackgroundWriter()),
        timers,
        one,
        RunGuard(GuardConfig(), ranks),
        one if with_engine else None,
        RunTrace(ObserveConfig(), RunFolder(Path("unused")), ranks, ExitStack()),  # records nothing
    )


def test_a_step_updates_then_evaluates_then_reports_then_publishes_its_checkpoint() -> None:
    recorder = Recorder()
    state = train_on_examples(job_of(recorder), LoopState())
    assert (state.step, state.policy_version) == (4, 4)
    names = [call if isinstance(call, str) else call[0] for call in recorder.calls]
    assert names == [
        *("device", "update", "step"),
        *("device", "update", "evaluate 2", "evaluation", "step"),
        *("device", "update", "step", "checkpoint 3 of version 3"),
        *("device", "update", "step", "checkpoint 4 of version 4, waited", "old checkpoints deleted"),
    ], "the last evaluation is outside of the loop"
    assert [call[1:] for call in recorder.calls if call[0] == "update"] == [(4, r) for r in (1.0, 0.9, 0.8, 0.7)]
    first_epoch = [i for call in recorder.calls if call[0] == "step" for i in call[2]][:4]
    assert sorted(first_epoch) == [0, 1, 2, 3]


def test_a_resumed_loop_continues_with_the_next_examples_and_the_next_rate() -> None:
    whole, resumed = Recorder(), Recorder()
    train_on_examples(job_of(whole, with_engine=False), LoopState())
    train_on_examples(job_of(resumed, with_engine=False), LoopState(step=2, policy_version=2))
    assert resumed.calls == whole.calls[6:]


def test_a_stop_request_ends_the_run_after_a_step_with_its_checkpoint() -> None:
    recorder = Recorder()
    recorder.stop_code = 143
    with pytest.raises(Stopped, match="after step 1") as caught:
        train_on_examples(job_of(recorder), LoopState())
    assert caught.value.code == 143
    assert recorder.calls[-1] == "checkpoint 1 of version 1, waited"


def test_the_metrics_of_a_step_are_known_and_count_tokens() -> None:
    updates = [UpdateStats(2.0, 0.1, {"loss": math.log(3), "entropy": 0.5}, {"entropy": 0.5})]
    metrics = ExampleStepResult(1, EXAMPLES, updates, {"policy_params": 7}).metrics()
    require_known(metrics)
    assert metrics["train/perplexity"] == pytest.approx(3.0)
    assert (metrics["train/num_tokens"], metrics["train/num_loss_tokens"]) == (12, 8)
    assert "train/clip_fraction" not in metrics
    assert math.isfinite(
        ExampleStepResult(1, EXAMPLES, [UpdateStats(1.0, 0.1, {"loss": 1e6, "entropy": 0.0}, {})]).metrics()[
            "train/perplexity"
        ]
    )
