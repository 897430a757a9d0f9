"""The training loop: sample, score, compute advantages, update, sync weights. Every rank runs the same program.

The differences between backends, precisions and algorithms are inside the objects of a `TrainerState`. A step is a pure
function of the saved state (weights and optimizer of policy and critic, reference, `LoopState`) and of run.seed;
therefore a resumed run equals an uninterrupted one.
Asserted by tests/unit/trainer/test_loop.py and tests/e2e/test_resume.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from grpo_mega.checkpoint.manager import LoopState
from grpo_mega.config.schema import Config
from grpo_mega.data.row_plan import RolloutCost
from grpo_mega.interfaces import Critic, Policy
from grpo_mega.observe.summary import Evaluation
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.rollout.async_sampler import AsyncSampler
from grpo_mega.rollout.dynamic_sampling import GroupSource
from grpo_mega.rollout.evaluator import Evaluator
from grpo_mega.rollout.sampled_groups import SampledGroups
from grpo_mega.trainer.engine_probe import EngineProbe
from grpo_mega.trainer.engine_rebuilds import EngineRebuilds, RebuildableSync
from grpo_mega.trainer.learning import learn, mean_advantages
from grpo_mega.trainer.mismatch import ComparedTokens, Differences
from grpo_mega.trainer.mismatch_guard import MismatchGuard
from grpo_mega.trainer.objective import Objective
from grpo_mega.trainer.phases import Phases
from grpo_mega.trainer.reporter import Observer
from grpo_mega.trainer.rollout_transfer import RolloutTransfer
from grpo_mega.trainer.run_guard import RunGuard
from grpo_mega.trainer.run_trace import RunTrace
from grpo_mega.trainer.save_points import SavePoints
from grpo_mega.trainer.step_metrics import IsRight, StepResult
from grpo_mega.trainer.token_metrics import token_metrics
from grpo_mega.types import TokenValues
from grpo_mega.weight_sync.sync import SyncReport, WeightSync


@dataclass(frozen=True)
class TrainerState:
    """Objects of one run on this rank.

    `evaluator` is None without held-out prompts. `critic` is None unless `algorithm.advantage` is gae. `cost` has the
    operations of a rollout, by which the work is balanced. `background` is set if servers sample while the policy
    trains; then `probe` compares policy and engine in the steps without rollouts of the present weights.
    """

    config: Config
    ranks: Ranks
    groups: GroupSource
    policy: Policy
    critic: Critic | None
    objective: Objective
    phases: Phases
    sync: WeightSync | RebuildableSync
    engines: EngineRebuilds
    saves: SavePoints
    evaluator: Evaluator | None
    timers: PhaseTimer
    observer: Observer
    guard: RunGuard
    is_right: IsRight
    mismatch_guard: MismatchGuard
    transfer: RolloutTransfer
    trace: RunTrace
    cost: RolloutCost = field(default_factory=RolloutCost)
    background: AsyncSampler | None = None
    probe: EngineProbe | None = None


def train(job: TrainerState, state: LoopState) -> LoopState:
    """Train from `state` to `train.steps`. The engines must hold the policy's weights.

    Raises:
        Stopped: on every rank, with a complete checkpoint, if one rank has received a stop request.
        EngineMismatchError: on every rank, before the checkpoint of a step whose engine differs from the policy.
        GuardStopError, RollbackRequest: on every rank, before the checkpoint of a step in which a rule of `guard.rules`
            with this action held.
    """
    job.saves.start(state)
    for step in range(state.step + 1, job.config.train.steps + 1):
        with job.trace.step(step):
            state = train_step(job, state, step)
    return state


def train_step(job: TrainerState, state: LoopState, step: int) -> LoopState:
    """Make one step and return the state after it. Collective.

    Raises:
        Stopped, EngineMismatchError, GuardStopError, RollbackRequest: see `train`.
    """
    job.timers.start_step()
    job.guard.start_step(step)
    groups = sample_groups(job, state, step)
    job.saves.stop_before_updates(job.policy, state)
    job.guard.check_groups(groups, job.is_right)
    objective = job.objective.at(state.kl_coef)
    probed = probe_engine(job, state, groups, step)
    learned = learn(job, objective, groups, step, state.policy_version)
    batch, updates = learned.batch, learned.updates
    compared, gather = probed or compare(groups, learned.old_log_probs), job.transfer.collectives.gather
    if not job.guard.skipped_non_finite:  # the log-probs of the policy may not be finite
        job.mismatch_guard.check(step, compared, gather, job.sync.describe_checks())
    of_tokens = token_metrics(compared.differences, groups, batch, job.transfer)
    guarded = job.guard.finish_step(groups, updates, of_tokens, job.transfer.collectives.sum)
    carried = None if groups.carry is None else groups.carry.rollouts
    state = state.after(step, len(updates), objective.next_kl_coef(updates), carried)
    job.saves.after_updates(job.policy, state)  # before the sync: the engine still sleeps, and loses no weights
    synced = sync_weights(job, state)
    evaluate_if_due(job, state)
    kl_coef = objective.algorithm.kl_coef
    waited = job.saves.wait_seconds
    result = StepResult(
        step,
        groups,
        batch,
        learned.old_log_probs,
        mean_advantages(job, batch),
        updates,
        synced,
        kl_coef,
        of_tokens,
        learned.critic_updates,
        state_bytes(job),
        waited,
        guarded,
    )
    job.observer.step(result)
    job.saves.end_step(step)
    return state


def compare(groups: SampledGroups, old_log_probs: TokenValues) -> ComparedTokens:
    """Compare policy and engine on the tokens that the present weights sampled, of the rollouts of this rank."""
    version = None if groups.carry is None else groups.carry.policy_version
    return ComparedTokens(Differences.of(groups.tokens, old_log_probs, version), groups.table)


def probe_engine(job: TrainerState, state: LoopState, groups: SampledGroups, step: int) -> ComparedTokens | None:
    """Compare policy and engine on new samples; None if the step has enough tokens of the present weights. Collective.

    Args:
        job: objects of this rank.
        state: before the step.
        groups: of the step.
        step: its number.

    Raises:
        RuntimeError: see `EngineRebuilds.sample`.
    """
    probe, background = job.probe, job.background
    if probe is None or background is None or job.mismatch_guard.bound is None or not probe.is_needed(groups):
        return None

    def sample() -> SampledGroups:
        with job.phases.sampling(), job.timers.phase("rollout"), background.pausing_sampling():
            return probe.sample(groups, step)

    sampled = job.engines.sample(sample, lambda: send_weights(job, state))
    with job.phases.training(), job.timers.phase("log_probs"):
        return probe.compare(job.policy, sampled)


def sample_groups(job: TrainerState, state: LoopState, step: int) -> SampledGroups:
    """Sample the groups of a step; `state` is that before the step. Collective.

    Raises:
        RuntimeError: see `EngineRebuilds.sample`.
        WeightMismatchError: the weights of an engine have changed since the sync.
    """
    rollbacks = job.guard.rollbacks

    def sample() -> SampledGroups:
        with job.phases.sampling(), job.timers.phase("rollout"):
            prompts_step, attempt = rollbacks.prompts_step_of(step), rollbacks.attempt_of(step)
            return job.groups.sample(step, prompts_step, attempt, state.carried)

    groups = job.engines.sample(sample, lambda: send_weights(job, state))
    with job.timers.phase("sync"):
        job.engines.repeat_if_lost(job.sync.verify_after_sampling)  # before the engine sleeps
    return groups


def evaluate(job: TrainerState, state: LoopState) -> Evaluation | None:
    """Return the evaluation of the weights after `state`; None without held-out prompts. Collective.

    Raises:
        RuntimeError: see `EngineRebuilds.sample`.
    """
    evaluator = job.evaluator
    if evaluator is None:
        return None

    paused = nullcontext if job.background is None else job.background.evaluating

    def sample() -> Evaluation:
        with job.phases.sampling(), job.timers.phase("evaluation"), paused():
            return evaluator.evaluate()

    return job.engines.sample(sample, lambda: send_weights(job, state))


def state_bytes(job: TrainerState) -> dict[str, int]:
    """Return the bytes of parameters, gradients and optimizer state of policy and critic on this rank."""
    learners = {"policy": job.policy, "critic": job.critic}
    return {
        f"{name}_{part}": size
        for name, learner in learners.items()
        if learner is not None
        for part, size in learner.state_bytes().items()
    }


class SyncingJob(Protocol):
    """The part of a job that `push_weights` needs."""

    @property
    def config(self) -> Config:
        """Section weight_sync."""
        ...

    @property
    def phases(self) -> Phases:
        """State of the device."""
        ...

    @property
    def sync(self) -> WeightSync | RebuildableSync:
        """Connection of policy and engines."""
        ...

    @property
    def timers(self) -> PhaseTimer:
        """Timer of the phase `sync`."""
        ...


def push_weights(job: SyncingJob, state: LoopState) -> SyncReport:
    """Send the policy's weights to the engines, with the verification that `weight_sync.verify` selects.

    Raises:
        WeightMismatchError: an engine's weights differ from the policy's (names tensor, rank and slice).
        RuntimeError: a rank exited, timed out or failed.
    """
    verify = job.config.weight_sync.verify
    with job.phases.syncing(), job.timers.phase("sync"):
        return job.sync.push(
            state.policy_version, verify=verify == "every" or (verify == "first" and not job.sync.count)
        )


def send_weights(job: TrainerState, state: LoopState) -> SyncReport:
    """Send the policy's weights as `push_weights`, and again if an engine is lost meanwhile. Collective.

    Raises:
        WeightMismatchError, RuntimeError: see `push_weights` and `EngineRebuilds.repeat_if_lost`.
    """
    if job.config.engine.placement == "server":
        return job.engines.push_to_servers(lambda: push_weights(job, state))
    return job.engines.repeat_if_lost(lambda: push_weights(job, state))


def sync_weights(job: TrainerState, state: LoopState) -> SyncReport:
    """Send the policy's weights to the engines between two steps, as `send_weights`. Collective.

    Lost engines are replaced first. If the engines sample in the background, sampling is paused instead, between two
    slices. A server that is lost while it samples fails the pause, and one that is lost while it has nothing to sample
    fails the push; both are replaced.

    Raises:
        WeightMismatchError, RuntimeError: see `send_weights` and `EngineRebuilds.sample`.
    """
    if job.background is None:
        job.engines.replace_lost()
        return send_weights(job, state)
    paused = job.background.syncing

    def push() -> SyncReport:
        with paused():
            return send_weights(job, state)

    return job.engines.sample(push, lambda: send_weights(job, state))


def evaluate_if_due(job: TrainerState, state: LoopState) -> None:
    """Evaluate if `EvaluationConfig.is_due`."""
    if job.config.evaluation.is_due(state.step, job.config.train.steps):
        evaluation = evaluate(job, state)
        if evaluation is not None:
            job.observer.evaluated(evaluation)
