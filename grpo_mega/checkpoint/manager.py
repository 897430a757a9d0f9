"""Writes checkpoints of a run so that each is whole or not there, and keeps the newest few.

A checkpoint is a directory `step_000020` in Megatron's `torch_dist` format, written under a temporary name, marked with
a file `complete` and renamed: a kill at any moment leaves the previous one. It holds the policy's weights, the
optimizer's state in a form that any layout can load, those of the critic where there is one, and the loop's counters.
Nothing else moves: prompts, sampling and
shuffles are functions of (run.seed, step).
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
    """What the loop carries from one step to the next: steps done, which is the position in the training prompts; the
    optimizer updates behind the weights; the KL coefficient where it is not the config's; and the digest of the prompts
    that the position is in."""

    step: int = 0
    policy_version: int = 0
    kl_coef: float | None = None
    prompts_digest: str | None = None

    def after(self, step: int, num_updates: int, kl_coef: float | None) -> LoopState:
        """The state of the next step."""
        return replace(self, step=step, policy_version=self.policy_version + num_updates, kl_coef=kl_coef)

    def over(self, prompts_digest: str, *, same_run: bool) -> LoopState:
        """The state of a run over these prompts; `same_run`: it goes on in its own folder.

        Raises:
            UserError: the run had other prompts so far, so that it would not get those that it has not seen.
        """
        if same_run and self.prompts_digest not in (None, prompts_digest):
            raise UserError(
                f"data.train holds other prompts than in the {self.step} steps so far, and a run that continues takes "
                "up where it stopped in the same ones",
                remedy="put the files back, or start again with run.overwrite=true",
            )
        return replace(self, prompts_digest=prompts_digest)


class CheckpointManager:
    """The folder `checkpoints/` of a run. Every rank constructs one; rank 0 touches names."""

    def __init__(self, folder: Path, keep: int, *, is_first: bool, critic: Critic | None = None) -> None:
        self._folder, self._keep, self._is_first, self._critic = folder, keep, is_first, critic

    def stage_if_due(self, policy: Policy, state: LoopState, every: int | None, last_step: int) -> Path | None:
        """Collective; every `every` steps and at the last one, writes a checkpoint that is not visible yet."""
        if state.step != last_step and (every is None or state.step % every):
            return None
        staged = self._folder / f"step_{state.step:06d}.tmp"

        def make_room() -> None:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)

        self._on_first(make_room)
        policy.save(staged, asdict(state))
        if self._critic is not None:
            self._on_first((staged / _CRITIC).mkdir)
            self._critic.save(staged / _CRITIC, {})
        return staged

    def publish(self, staged: Path) -> None:
        """Collective; afterwards the checkpoint is whole and visible, and old ones are gone."""
        self._on_first(lambda: self._rename(staged))

    def load(self, policy: Policy, checkpoint: Path) -> LoopState:
        """Collective."""
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

    def _on_first(self, action: Callable[[], object]) -> None:
        """Run on rank 0; what fails there fails on every rank instead of leaving the others waiting."""
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
