"""Returns a run to its last verified checkpoint, in the processes that are running. Collective.

Order: saves and writes in flight are completed; the newest whole checkpoint is found (damaged ones are moved aside);
the rollback is recorded in rollbacks.jsonl, from which a killed run continues in the same way; metrics and rollouts of
later steps move to `discarded/`; policy, critic and reference are loaded; history, alarms and curves begin again after
the checkpoint. The caller then sends the weights to the engines.
Asserted by tests/e2e/test_guard.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.checkpoint.verification import verify_checkpoints
from grpo_mega.formats.checkpoint_manifest import describe_model
from grpo_mega.interfaces import Policy
from grpo_mega.models.parameter_tables import hf_shapes
from grpo_mega.models.spec import ModelSpec
from grpo_mega.observe.config_changes import ConfigChange
from grpo_mega.observe.discarded_steps import DiscardedSteps, set_aside_after
from grpo_mega.observe.history import read_lines
from grpo_mega.observe.rollbacks import Rollback, Rollbacks, record_rollback
from grpo_mega.observe.run_folder import CheckpointsToVerify, RunState
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks, agreed
from grpo_mega.trainer.reporter import Observer
from grpo_mega.trainer.run_guard import RollbackRequest, RunGuard
from grpo_mega.trainer.save_points import SavePoints

log = logging.getLogger(__name__)
_KL_KEYS = ("algorithm.kl_coef", "algorithm.kl_target")


@dataclass(frozen=True)
class _Target:
    """The checkpoint of a rollback, and what rank 0 found and wrote for it. Equal on every rank."""

    step: int
    rollbacks: Rollbacks
    lines: Sequence[tuple[int, Mapping[str, float]]]
    discarded: DiscardedSteps | None


class GuardedJob(Protocol):
    """The part of a training job that a rollback needs."""

    @property
    def ranks(self) -> Ranks:
        """Coordinates of this rank."""
        ...

    @property
    def policy(self) -> Policy:
        """Policy of this rank."""
        ...

    @property
    def saves(self) -> SavePoints:
        """Points at which the run saves."""
        ...

    @property
    def guard(self) -> RunGuard:
        """Rules on each step."""
        ...

    @property
    def observer(self) -> Observer:
        """Observer of this rank."""
        ...

    @property
    def timers(self) -> PhaseTimer:
        """Timers of this rank."""
        ...


@dataclass(frozen=True)
class Rollbacker:
    """Executes rollbacks of one run on this rank.

    Attributes:
        ranks: coordinates of this rank.
        run: the open run folder.
        policy: loaded from the checkpoint; with `checkpoints` also the critic.
        checkpoints: of the run.
        saves: points at which the run saves.
        guard: asks for rollbacks.
        observer: of this rank.
        timers: measure the load, in the phase `checkpoint`.
        model: description of the model in the manifests.
    """

    ranks: Ranks
    run: RunState
    policy: Policy
    checkpoints: CheckpointManager
    saves: SavePoints
    guard: RunGuard
    observer: Observer
    timers: PhaseTimer
    model: str

    @classmethod
    def of(cls, job: GuardedJob, run: RunState, checkpoints: CheckpointManager, spec: ModelSpec) -> Rollbacker:
        """Return the object for a job, whose attributes it shares.

        Args:
            job: objects of this rank.
            run: the open run folder.
            checkpoints: of the run.
            spec: the model.
        """
        model = describe_model(hf_shapes(spec))
        return cls(job.ranks, run, job.policy, checkpoints, job.saves, job.guard, job.observer, job.timers, model)

    def train_to_end(
        self, train: Callable[[LoopState], LoopState], state: LoopState, after_load: Callable[[LoopState], object]
    ) -> LoopState:
        """Train to the end, from a checkpoint again after each rollback; return the last state.

        Args:
            train: the training loop.
            state: first state.
            after_load: called with the state of a checkpoint that was loaded, to send the weights to the engines.
        """
        while True:
            try:
                return train(state)
            except RollbackRequest as raised:
                request = RollbackRequest(raised.step, raised.rule, raised.reason)  # without the step's frames
            loaded = self.roll_back(request)
            assert state.prompts_digest is not None, "the first state has the digest of the prompts"
            state = loaded.over(state.prompts_digest, same_run=True)
            after_load(state)

    def start(self, state: LoopState) -> None:
        """Give the guard the steps so far, and save `state` if a rollback needs it and it is in no own checkpoint.

        The phase of the device is `checkpointing` afterwards: the engines have no weights until the next sync.
        """
        folder = self.run.folder
        self.guard.returned(self.run.rollbacks, agreed(lambda: tuple(read_lines(folder.metrics)), self.ranks))
        if self.guard.may_roll_back and not self.run.has_checkpoint:
            self.saves.save_now(self.policy, state)

    def roll_back(self, request: RollbackRequest) -> LoopState:
        """Return to the last verified checkpoint; return its state.

        Raises:
            UserError: no checkpoint of the run is whole.
            RuntimeError: files cannot be written, or the checkpoint cannot be loaded.
        """
        self.saves.complete_writes()
        newest_first = agreed(lambda: tuple(reversed(self.run.folder.all_checkpoints().values())), self.ranks)
        verify_checkpoints(CheckpointsToVerify(newest_first), self.model, self.ranks)
        target = agreed(lambda: self._rewind_files(request), self.ranks)
        with self.timers.phase("checkpoint"):
            loaded = self.checkpoints.load(self.policy, self.run.folder.checkpoint_of(target.step))
        self.guard.returned(target.rollbacks, target.lines)
        self.observer.rolled_back(target.step)
        if self.ranks.is_first:
            log.warning(
                "%s: the run returned to the checkpoint after step %d and continues with the prompts after those of "
                "step %d (rollback %d)%s",
                request,
                target.step,
                request.step,
                len(target.rollbacks.each),
                "" if target.discarded is None else f"; later metrics and rollouts are in {target.discarded.folder}",
            )
        return with_changed_kl(loaded, self.run.changes if target.step == self.run.step else ())

    def _rewind_files(self, request: RollbackRequest) -> _Target:
        """Record the rollback, and move files of steps after the checkpoint aside. On rank 0."""
        folder = self.run.folder
        step = max(folder.complete_checkpoints())
        rollback = Rollback(request.step, step, request.rule, request.reason)
        rollbacks = record_rollback(folder.rollbacks, self.guard.rollbacks, rollback)
        discarded = set_aside_after(step, folder.metrics, folder.rollouts, folder.discarded)
        return _Target(step, rollbacks, tuple(read_lines(folder.metrics)), discarded)


def with_changed_kl(state: LoopState, changes: Sequence[ConfigChange]) -> LoopState:
    """Return the state without the KL coefficient that was adapted so far, if `changes` after it have another one."""
    if any(change.key in _KL_KEYS for change in changes):
        return replace(state, kl_coef=None)
    return state
