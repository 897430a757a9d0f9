"""The points of a step at which a run saves or stops, agreed on by all ranks.

A stop request that one rank has received stops all ranks at the same point, with the same checkpoint.
Asserted by tests/unit/trainer/test_save_points.py and tests/e2e/test_resume.py.
"""

from __future__ import annotations

import logging

from grpo_mega.checkpoint.local_copies import LocalSaves
from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.checkpoint.schedule import CheckpointSchedule
from grpo_mega.interfaces import Policy
from grpo_mega.observe.background_writer import BackgroundWriter
from grpo_mega.observe.log import FILE_ONLY
from grpo_mega.observe.timers import PhaseTimer
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.stop_signal import Stopped, StopRequests, largest_on_all

log = logging.getLogger(__name__)


class SavePoints:
    """Saves the state of a run when a checkpoint is due or a stop is requested. Every method is collective."""

    def __init__(
        self,
        ranks: Ranks,
        checkpoints: CheckpointManager,
        schedule: CheckpointSchedule,
        stops: StopRequests,
        timers: PhaseTimer,
        last_step: int,
        writer: BackgroundWriter,
        local: LocalSaves | None = None,
    ) -> None:
        """Create the object of this rank.

        Args:
            ranks: coordinates of this rank.
            checkpoints: writes checkpoints.
            schedule: says when one is due.
            stops: stop requests of this process.
            timers: measures the time of the phase `checkpoint`.
            last_step: `train.steps`.
            writer: writes the rollouts and the metrics of this rank.
            local: local checkpoints; None: there are none.
        """
        self._local, self._local_step = local, 0
        self._ranks, self._checkpoints, self._schedule, self._stops = ranks, checkpoints, schedule, stops
        self._timers, self._last_step, self._writer = timers, last_step, writer
        self._saved_step = 0
        self._stop_code = 0

    @property
    def wait_seconds(self) -> float:
        """Time for which the last save waited for the one before."""
        return self._checkpoints.wait_seconds

    def start(self, state: LoopState) -> None:
        """Note that training starts from `state`, which is on disk or is the base model."""
        self._saved_step = state.step
        self._delete_local()
        self._stops.training_starts()
        log.info("training starts after step %d: a stop request is now a save", state.step, extra=FILE_ONLY)

    def save_now(self, policy: Policy, state: LoopState) -> None:
        """Save `state`, and wait until the checkpoint is visible."""
        with self._timers.phase("checkpoint"):
            self._checkpoints.stage_if_due(policy, state, is_due=True)
            self._checkpoints.publish(wait=True)

    def complete_writes(self) -> None:
        """Wait until a save in flight is visible, and rollouts and metrics of all ranks are on disk.

        Local checkpoints are deleted: the run may go back to a step before them.

        Raises:
            RuntimeError: on every rank, if something cannot be written.
        """
        self._require_written()
        self._delete_local()
        with self._timers.phase("checkpoint"):
            self._checkpoints.publish(wait=True)

    def stop_before_updates(self, policy: Policy, state: LoopState) -> None:
        """If a stop is requested, save `state`, that of the last complete step, unless it is on disk.

        The rollouts of the present step are dropped: the continued run samples the same ones again.

        Raises:
            Stopped: on every rank.
            RuntimeError: on every rank, if rollouts or metrics of a rank cannot be written.
        """
        (stop_code,) = largest_on_all((self._stops.wanted(),), self._ranks)
        if not stop_code:
            return
        self._require_written()
        with self._timers.phase("checkpoint"):
            self._checkpoints.stage_if_due(policy, state, is_due=state.step != self._saved_step)
            self._checkpoints.publish(wait=True)
        raise Stopped(f"stopped after step {state.step}, before the updates of step {state.step + 1}", stop_code)

    def after_updates(self, policy: Policy, state: LoopState) -> None:
        """Save `state` if a checkpoint is due or a stop is requested. The checkpoint is not visible yet."""
        time_is_up = self._ranks.is_first and self._schedule.time_is_up()
        stop_code, due = largest_on_all((self._stops.wanted(), int(time_is_up)), self._ranks)
        self._stop_code = stop_code if state.step < self._last_step else 0  # else the run is complete
        save = self._schedule.is_due(state.step, time_is_up=bool(self._stop_code or due))
        with self._timers.phase("checkpoint"):
            self._checkpoints.stage_if_due(policy, state, is_due=save)
            if self._local is not None and not save and state.step % self._local.every == 0:
                self._local.manager.stage_if_due(policy, state, is_due=True)
                self._local_step = state.step
        if save:
            self._schedule.saved()
            self._saved_step = state.step

    def end_step(self, step: int) -> None:
        """Make the checkpoint visible, and stop if it was requested. Call when the files of the step are submitted.

        Raises:
            Stopped: on every rank, with a complete checkpoint.
            RuntimeError: on every rank, if rollouts or metrics of a rank cannot be written.
        """
        if step in (self._saved_step, self._local_step):
            self._require_written()
        self._checkpoints.publish(wait=bool(self._stop_code) or step == self._last_step)
        if step == self._last_step:
            self._checkpoints.wait_for_removal()
        if self._local is not None:
            self._local.manager.publish(wait=True)
            if self._checkpoints.published_step > self._local.manager.published_step > 0:
                self._delete_local()
        if self._stop_code:
            raise Stopped(f"stopped after step {step}", self._stop_code)

    def _delete_local(self) -> None:
        if self._local is not None:
            self._local.manager.delete_all()

    def _require_written(self) -> None:
        """Wait until the rollouts and the metrics of all ranks are on disk. Collective.

        Raises:
            RuntimeError: on every rank, if a write failed. The rank that failed raises the exception of the write.
        """
        failure = None
        try:
            self._writer.flush()
        except Exception as error:  # raised below, after the other ranks know of it
            failure = error
        (failed_rank,) = largest_on_all((0 if failure is None else self._ranks.rank + 1,), self._ranks)
        if failure is not None:
            raise failure
        if failed_rank:
            raise RuntimeError(
                f"rank {failed_rank - 1} could not write the rollouts or the metrics of a step (its message says which "
                "file): the checkpoint of the step is not published"
            )
