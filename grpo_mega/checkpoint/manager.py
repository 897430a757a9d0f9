"""Atomic checkpoints of a run, of which the newest few are kept.

A checkpoint is a directory `step_000020` in Megatron's `torch_dist` format. It is written under a temporary name, read
back and compared with the live state (written_state.py), described by a manifest (formats/checkpoint_manifest.py),
flushed to disk, and renamed, so a kill at any moment leaves the previous checkpoint intact. With `background` the files
are written while training continues (background.py), and the rest follows at a later step. A checkpoint holds the
weights and the optimizer state of the policy, and of the critic if there is one, in a form that every layout can load,
and the counters of the training loop. It needs nothing else: prompts, sampling and shuffles are functions of
(run.seed, step). Only partial rollouts are carried from step to step; they are files of the checkpoint
(carried_parts.py).
Asserted by tests/parallel/test_checkpoint.py and tests/e2e/test_resume.py.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from grpo_mega.checkpoint.background import BackgroundSaves, any_rank
from grpo_mega.checkpoint.carried_parts import CARRIED, CarriedParts, SavedPart
from grpo_mega.checkpoint.removal import CheckpointRemoval
from grpo_mega.checkpoint.written_state import WrittenFiles, compare_with_live, read_back, share_small_files
from grpo_mega.formats.checkpoint_manifest import (
    COMPLETE,
    DamagedCheckpointError,
    Manifest,
    damaged,
    read_manifest,
    sync_folder,
    write_manifest,
)
from grpo_mega.formats.file_parts import CopiedFiles, DirectFiles
from grpo_mega.interfaces import Critic, LearnerMemory, Policy
from grpo_mega.models.digest import digest_threads
from grpo_mega.parallel.ranks import first_error
from grpo_mega.types import CheckpointWriteError, FileSink, TensorRecord, UserError

_CRITIC, _STAGED = "critic", ".tmp"
_CLOSE_SECONDS, _POLL_SECONDS = 2.0, 0.05
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopState:
    """State that the training loop carries from one step to the next.

    Args:
        step: completed steps, which determine the position in the training prompts.
        policy_version: optimizer updates behind the weights.
        kl_coef: the current KL coefficient; None: that of the config.
        prompts_digest: digest of the training prompts.
        carried: rollouts that are not complete, of this rank's prompt shard; None without partial rollouts.
    """

    step: int = 0
    policy_version: int = 0
    kl_coef: float | None = None
    prompts_digest: str | None = None
    carried: SavedPart | None = None

    @property
    def counters(self) -> dict[str, Any]:
        """All fields but `carried`, which has files of its own."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "carried"}

    def after(self, step: int, num_updates: int, kl_coef: float | None, carried: SavedPart | None = None) -> LoopState:
        """Return the state after `step`."""
        version = self.policy_version + num_updates
        return replace(self, step=step, policy_version=version, kl_coef=kl_coef, carried=carried)

    def over(self, prompts_digest: str, *, same_run: bool) -> LoopState:
        """Return this state with the digest of the training prompts. `same_run`: the run continues in its own folder.

        Another run, which starts from this state, begins without carried rollouts.

        Raises:
            UserError: the continued run had other prompts so far, so its position in them is not valid.
        """
        if same_run and self.prompts_digest not in (None, prompts_digest):
            raise UserError(
                f"data.train holds other prompts than in the {self.step} steps so far; a continued run must have the "
                "same prompts",
                remedy="restore the files, or start again with run.overwrite=true",
            )
        return replace(self, prompts_digest=prompts_digest, carried=self.carried if same_run else None)


@dataclass
class _Save:
    """A save whose checkpoint is not visible yet. `in_background`: its files are still being written."""

    folder: Path
    step: int
    live: dict[str, Mapping[str, TensorRecord]]
    in_background: bool


class CheckpointManager:
    """Manages the folder `checkpoints/` of a run. Every rank has one; only rank 0 creates, renames and deletes
    folders."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        on_device: Callable[[LearnerMemory], AbstractContextManager[None]],
        *,
        is_first: bool,
        critic: Critic | None = None,
        model: str = "",
        layout: str = "",
        background: BackgroundSaves | None = None,
        carried: CarriedParts | None = None,
        each_machine: bool = False,
    ) -> None:
        """Create the manager of this rank.

        Args:
            folder: `checkpoints/` of the run.
            keep: number of checkpoints to keep.
            on_device: phase of the device in which policy or critic can be saved and loaded.
            is_first: True on the rank that creates, renames and deletes the folders: rank 0; if every machine has a
                folder of its own, the first rank of each machine.
            critic: critic of this rank, if any.
            model: description of the model, for the manifest.
            layout: parallel layout of the ranks, for the manifest.
            background: writes the files while training continues; None: a save ends when they are written.
            carried: files of carried rollouts; None without partial rollouts.
            each_machine: every machine has a folder of its own, which holds the files of its ranks. Such checkpoints
                are not loaded from there (local_copies.py).
        """
        self._each_machine = each_machine
        self._folder, self._keep, self._is_first, self._critic = folder, keep, is_first, critic
        self._on_device, self._model, self._layout, self._background = on_device, model, layout, background
        self._carried = carried
        self._removal = CheckpointRemoval()
        self._save: _Save | None = None
        self.published_step = 0
        """Step of the last checkpoint that became visible; 0 before the first one, and after `delete_all`."""
        self.wait_seconds = 0.0
        """Time for which the last call of `stage_if_due` waited for the save before."""
        self._has_waited = False

    def stage_if_due(self, policy: Policy, state: LoopState, *, is_due: bool) -> None:
        """Save if `is_due`, which must be equal on all ranks. Collective.

        The checkpoint is visible after `publish`. A save that is still being written is published first; if another one
        is due, this waits for it.

        Raises:
            RuntimeError: the disk is full or read-only, or what was written differs from the live state, now or in the
                save before. The previous checkpoints are not changed.
        """
        self.wait_seconds = 0.0
        self.publish(wait=False)
        if not is_due:
            return
        if self._save is not None:
            self._publish_late(self._save)
        self.wait_for_removal()  # there may be no space for another checkpoint before
        staged = self.path_of(state.step).with_suffix(_STAGED)

        def empty_folder() -> None:
            for path in self._folder.glob(f"step_*{_STAGED}"):  # of a run that was killed
                shutil.rmtree(path)
            staged.mkdir(parents=True)

        self._run_on_first(empty_folder)
        files = DirectFiles() if self._background is None else self._background.new_files()
        written: WrittenFiles | None = None
        with self._writing(staged, files):
            with self._on_device(policy):
                live = dict(policy.save(staged, state.counters, files))
            if self._carried is not None and state.carried is not None:
                self._run_on_first((staged / CARRIED).mkdir)
                self._carried.write(staged, state.carried, files)
            if self._critic is not None:
                self._run_on_first((staged / _CRITIC).mkdir)
                with self._on_device(self._critic):
                    live[_CRITIC] = self._critic.save(staged / _CRITIC, {}, files)["."]
            if self._each_machine:
                share_small_files(staged, leads=self._is_first)
            if isinstance(files, DirectFiles):
                written = read_back(staged, live, files, threads=digest_threads())
                written.require_flushed()
        save = _Save(staged, state.step, live, in_background=written is None)
        if written is not None:
            self._describe(save, written)
        elif isinstance(files, CopiedFiles) and self._background is not None:
            self._background.start(files, staged, live)
        self._save = save

    def publish(self, *, wait: bool) -> None:
        """Make a saved checkpoint visible, and delete the oldest ones. Collective.

        Args:
            wait: wait for files that are still being written; otherwise do nothing yet.

        Raises:
            RuntimeError: on every rank, if they could not be written or differ from the state that was saved.
        """
        save = self._save
        if save is None:
            return
        if save.in_background:
            assert self._background is not None, "the save was started by it"
            try:
                with self._writing(save.folder):
                    written = self._background.result(wait=wait)
                    if written is not None:
                        written.require_flushed()
            except RuntimeError:
                self._save = None
                raise
            if written is None:
                return
            self._save = None
            self._describe(save, written)
        self._save = None
        self._run_on_first(lambda: self._rename(save.folder))
        self.published_step = save.step

    def delete_all(self) -> None:
        """Delete all checkpoints in the folder, and the folder. Collective."""
        self.published_step = 0
        self.wait_for_removal()
        self._run_on_first(lambda: shutil.rmtree(self._folder, ignore_errors=True))

    def wait_for_removal(self) -> None:
        """Wait until old checkpoints are deleted. Collective; the ranks exchange messages all the time."""
        while any(any_rank(self._removal.is_running)):
            time.sleep(_POLL_SECONDS)

    def path_of(self, step: int) -> Path:
        """Return the folder of the visible checkpoint after `step` steps."""
        return self._folder / f"step_{step:06d}"

    def close(self) -> None:
        """Stop a save in flight, and wait a short time for deletions. Not collective: another rank may have failed."""
        if self._background is not None:
            self._background.stop()
        self._removal.wait(_CLOSE_SECONDS)

    def _publish_late(self, save: _Save) -> None:
        """Wait for a save although the next one is due, and measure how long."""
        if not self._has_waited and self._is_first:
            log.warning(
                "the checkpoint of step %d is still being written although the next one is due, so the run waits for"
                " it (time/checkpoint_wait_seconds, here and in later steps); a longer checkpoint.every avoids this",
                save.step,
            )
        self._has_waited = True
        begin = time.monotonic()
        self.publish(wait=True)
        self.wait_seconds = time.monotonic() - begin

    def _describe(self, save: _Save, written: WrittenFiles) -> None:
        """Compare what was written with the live state, and write the manifest. Collective."""
        files = compare_with_live(save.folder, save.live, written)
        manifest = Manifest(save.step, self._model, self._layout, files, save.live)
        self._run_on_first(lambda: write_manifest(save.folder, manifest))

    def load(self, policy: Policy, checkpoint: Path) -> LoopState:
        """Load a checkpoint into the policy and the critic; return the state of the loop. Collective.

        Afterwards the live weights are compared with the manifest; in another layout also master weights and moments.

        Raises:
            UserError: the checkpoint is damaged or of another model.
            RuntimeError: the loaded tensors differ from the saved ones (names them).
        """
        try:
            manifest = read_manifest(checkpoint)
        except DamagedCheckpointError as error:
            raise damaged(str(error)) from None
        with_optimizer = manifest is not None and manifest.layout != self._layout
        of_critic = None
        if self._critic is not None:
            with self._on_device(self._critic):
                self._critic.load(checkpoint / _CRITIC)
                of_critic = self._critic.live_records(with_optimizer=with_optimizer)["."]
        with self._on_device(policy):
            carried = None if self._carried is None else self._carried.load(checkpoint)
            state = LoopState(**policy.load(checkpoint), carried=carried)
            live = dict(policy.live_records(with_optimizer=with_optimizer))
        if manifest is None:
            return state
        if of_critic is not None:
            live[_CRITIC] = of_critic
        differing = [
            f"{place}/{name}"
            for place, records in live.items()
            for name, record in records.items()
            if not _same_values(record, manifest.tensors.get(place, {}).get(name))
        ]
        if differing or state.step != manifest.step:
            raise RuntimeError(
                f"{checkpoint}: step {state.step} was loaded, with {len(differing)} tensors that differ from the"
                f" saved state of step {manifest.step}: {', '.join(differing[:3])}"
            )
        return state

    def _rename(self, staged: Path) -> None:
        final = staged.with_suffix("")
        replaced = final.with_suffix(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.rename(replaced)
        staged.rename(final)
        sync_folder(self._folder)
        found = (path.parent for path in self._folder.glob(f"step_*/{COMPLETE}"))
        complete = sorted((path for path in found if not path.suffix), key=_step_of)
        old = [path for path in complete[: -self._keep] if path != final]
        replaced_ones = [path for path in self._folder.glob("step_*.replaced") if path.with_suffix("").exists()]
        self._removal.start(self._folder, [*old, *replaced_ones])

    @contextmanager
    def _writing(self, staged: Path, files: FileSink | None = None) -> Iterator[None]:
        """Say what could not be written and how much space there is, and remove what was written. A failure ends the
        run with the checkpoints of earlier steps unchanged. `files`: sink that is closed then."""
        try:
            yield
        except (OSError, RuntimeError, AssertionError, CheckpointException) as error:
            if files is not None:
                files.abandon()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason, needed = lines[-1] if lines else type(error).__name__, ""
            free = shutil.disk_usage(self._folder).free
            if self._is_first:
                earlier = [path for path in self._folder.glob("step_*") if path.suffix == ""]
                sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in earlier]
                needed = f", and an earlier checkpoint has {max(sizes)} bytes" if sizes else ""
                shutil.rmtree(staged, ignore_errors=True)
            raise CheckpointWriteError(
                f"checkpoint {staged} cannot be written: its file system has {free} bytes free{needed} ({reason}); "
                "earlier checkpoints are unchanged: after freeing space, the same command continues from the newest"
            ) from error

    def _run_on_first(self, action: Callable[[], object]) -> None:
        """Run `action` where `is_first` holds. If it fails, raise RuntimeError on every rank: no rank waits for it."""
        failure = ""
        if self._is_first:
            try:
                action()
            except OSError as error:
                failure = str(error)
        if failure := first_error(failure):
            raise CheckpointWriteError(f"checkpoint in {self._folder}: {failure}")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_").partition(".")[0])


def _same_values(live: TensorRecord, saved: TensorRecord | None) -> bool:
    """Return True if a loaded tensor has the saved values. A fork may load them in another dtype."""
    if saved is None or saved.shape != live.shape:
        return False
    return saved.dtype != live.dtype or saved.digest == live.digest
