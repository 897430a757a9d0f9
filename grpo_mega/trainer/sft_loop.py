"""The loop of supervised fine-tuning: update on examples, evaluate. Every rank runs the same program.

A step is a pure function of the saved state (weights, optimizer, `LoopState`) and of run.seed, as in loop.py; therefore
a resumed run equals an uninterrupted one. Weights go to the engine only for an evaluation. Without an evaluation there
is no engine.
Asserted by tests/unit/trainer/test_sft_loop.py and tests/parallel/test_sft.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo_mega.algorithm.likelihood import LikelihoodLoss
from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.example_dataset import ExampleDataset
from grpo_mega.data.row_plan import RowShape
from grpo_mega.interfaces import Policy
from grpo_mega.observe.summary import Evaluation
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.rollout.evaluator import Evaluator
from grpo_mega.trainer.example_batch import build_example_batch
from grpo_mega.trainer.learning import update
from grpo_mega.trainer.loop import push_weights
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.reporter import Observer
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.trainer.run_trace import RunTrace
from grpo_mega.trainer.save_points import SavePoints
from grpo_mega.trainer.sft_metrics import ExampleStepResult
from grpo_mega.weight_sync.sync import WeightSync


@dataclass(frozen=True)
class EngineSide:
    """The objects of an evaluation; the engine is behind `phases`, `sync` and `evaluator`."""

    config: Config
    phases: Phases
    sync: WeightSync
    evaluator: Evaluator
    timers: PhaseTimer

    def evaluate(self, state: LoopState) -> Evaluation:
        """Send the policy's weights to the engines and evaluate them. Collective.

        Raises:
            WeightMismatchError, RuntimeError: see `push_weights`.
        """
        push_weights(self, state)
        with self.phases.sampling(), self.timers.phase("evaluation"):
            return self.evaluator.evaluate()


@dataclass(frozen=True)
class SftState:
    """Objects of one run on this rank. `engine_side` is None without held-out prompts."""

    config: Config
    ranks: Ranks
    examples: ExampleDataset
    policy: Policy
    phases: Phases
    saves: SavePoints
    timers: PhaseTimer
    observer: Observer
    guard: RunGuard
    engine_side: EngineSide | None
    trace: RunTrace
    loss: LikelihoodLoss = field(default_factory=LikelihoodLoss)

    def state_bytes(self) -> Mapping[str, int]:
        """Return the bytes of the policy's parameters, gradients and optimizer state on this rank."""
        return {f"policy_{part}": size for part, size in self.policy.state_bytes().items()}


def train_on_examples(job: SftState, state: LoopState) -> LoopState:
    """Train from `state` to `train.steps`; return the last state.

    Raises:
        Stopped: on every rank, with a complete checkpoint, if one rank has received a stop request.
        GuardStopError, RollbackRequest: a rule of `guard.rules` with this action holds for an update.
        RuntimeError: a checkpoint cannot be written.
    """
    job.saves.start(state)
    for step in range(state.step + 1, job.config.train.steps + 1):
        with job.trace.step(step):
            state = train_step(job, state, step)
    return state


def train_step(job: SftState, state: LoopState, step: int) -> LoopState:
    """Make one step and return the state after it. Collective.

    Raises:
        Stopped, GuardStopError, RollbackRequest, RuntimeError: see `train_on_examples`.
    """
    config, timers = job.config, job.timers
    shape = RowShape.of(config.parallel, config.precision)
    timers.start_step()
    job.guard.start_step(step)
    prompts_step = job.guard.rollbacks.prompts_step_of(step)
    examples = job.examples.batch(prompts_step - 1, config.data.prompts_per_step, config.run.seed)
    batch = build_example_batch(
        examples, config.train, dp=job.ranks.topology.dp, dp_rank=job.ranks.at.dp_rank, shape=shape
    )
    with job.phases.training(), timers.phase("train"):
        _, updates = update(job, job.loss, batch, state.policy_version)
    state = state.after(step, len(updates), None)
    job.saves.after_updates(job.policy, state)
    evaluate_if_due(job, state)
    waited = job.saves.wait_seconds
    result = ExampleStepResult(step, examples, updates, job.state_bytes(), waited, job.guard.report())
    job.guard.end_step(result.metrics())
    job.observer.example_step(result)
    job.saves.end_step(step)
    return state


def evaluate_if_due(job: SftState, state: LoopState) -> None:
    """Evaluate if `EvaluationConfig.is_due`."""
    if job.engine_side is not None and job.config.evaluation.is_due(state.step, job.config.train.steps):
        job.observer.evaluated(job.engine_side.evaluate(state))
