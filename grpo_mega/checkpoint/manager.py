"""Atomic checkpoints of a run, of which the newest few are kept.

A checkpoint is a directory `step_000020` in Megatron's `torch_dist` format. It is written under a temporary name,
marked with a file `complete`, and renamed, so a kill at any moment leaves the previous checkpoint intact. It holds the
weights and the optimizer state of the policy, and of the critic if there is one, in a form that every layout can load,
and the counters of the training loop. It needs nothing else: prompts, sampling and shuffles are functions of
(run.seed, step).
Asserted by tests/parallel/test_checkpoint.py and tests/e2e/test_resume.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist

from grpo_mega.interfaces import Critic, Policy
from grpo_mega.types import UserError

_COMPLETE = "complete"
_CRITIC = "critic"


@dataclass(frozen=True)
class LoopState:
    """State that the training loop carries from one step to the next.

    Args:
        step: completed steps, which determine the position in the training prompts.
        policy_version: optimizer updates behind the weights.
        kl_coef: the current KL coefficient; None: that of the config.
        prompts_digest: digest of the training prompts.
    """

    step: int = 0
    policy_version: int = 0
    kl_coef: float | None = None
    prompts_digest: str | None = None

    def after(self, step: int, num_updates: int, kl_coef: float | None) -> LoopState:
        """Return the state after `step`."""
        return replace(self, step=step, policy_version=self.policy_version + num_updates, kl_coef=kl_coef)

    def over(self, prompts_digest: str, *, same_run: bool) -> LoopState:
        """Return this state with the digest of the training prompts. `same_run`: the run continues in its own folder.

        Raises:
            UserError: the continued run had other prompts so far, so its position in them is not valid.
        """
        if same_run and self.prompts_digest not in (None, prompts_digest):
            raise UserError(
                f"data.train holds other prompts than in the {self.step} steps so far; a continued run must have the "
                "same prompts",
                remedy="restore the files, or start again with run.overwrite=true",
            )
        return replace(self, prompts_digest=prompts_digest)


class CheckpointManager:
    """Manages the folder `checkpoints/` of a run. Every rank has one; only rank 0 creates, renames and deletes
    folders."""

    def __init__(self, folder: Path, keep: int, *, is_first: bool, critic: Critic | None = None) -> None:
        self._folder, self._keep, self._is_first, self._critic = folder, keep, is_first, critic

    def stage_if_due(self, policy: Policy, state: LoopState, every: int | None, last_step: int) -> Path | None:
        """Write a checkpoint that is not visible yet, every `every` steps and at the last step. Collective.

        Return its folder, or None if no checkpoint is due.
        """
        if state.step != last_step and (every is None or state.step % every):
            return None
        staged = self._folder / f"step_{state.step:06d}.tmp"

        def empty_folder() -> None:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)

        self._run_on_first(empty_folder)
        policy.save(staged, asdict(state))
        if self._critic is not None:
            self._run_on_first((staged / _CRITIC).mkdir)
            self._critic.save(staged / _CRITIC, {})
        return staged

    def publish(self, staged: Path) -> None:
        """Make the staged checkpoint visible, and delete the oldest ones. Collective."""
        self._run_on_first(lambda: self._rename(staged))

    def load(self, policy: Policy, checkpoint: Path) -> LoopState:
        """Load a checkpoint into the policy and the critic; return the state of the loop. Collective."""
        if self._critic is not None:
            self._critic.load(checkpoint / _CRITIC)
        return LoopState(**policy.load(checkpoint))

    def _rename(self, staged: Path) -> None:
        (staged / _COMPLETE).touch()
        final = staged.with_suffix("")
        if final.exists():
            shutil.rmtree(final)
        staged.rename(final)
        for old in sorted(p.parent for p in self._folder.glob(f"step_*/{_COMPLETE}"))[: -self._keep]:
            shutil.rmtree(old)

    def _run_on_first(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0. If it fails, raise RuntimeError on every rank, so that no rank waits for it."""
        message: list[str | None] = [None]
        if self._is_first:
            try:
                action()
            except OSError as error:
                message[0] = f"{error}"
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise RuntimeError(f"checkpoint in {self._folder}: {message[0]}")
