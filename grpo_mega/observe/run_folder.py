"""Paths of the run folder, and the decision whether a command starts, continues or finds a finished run.

`open_run` makes the decision on rank 0, before any rank writes into the folder; the result is broadcast. Afterwards the
folder agrees with the checkpoint from which training continues: later lines of `metrics.jsonl` and later rollouts move
to `discarded/`, because the continued run makes these steps again. Nothing is deleted, and no checkpoint is changed.
Asserted by tests/unit/observe/test_run_folder.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from grpo_mega.observe.atomic_files import TEMPORARY_SUFFIX, write_atomically
from grpo_mega.observe.config_changes import ConfigChange, compare_configs, record_changes
from grpo_mega.observe.discarded_steps import DiscardedSteps, move_aside, set_aside_after
from grpo_mega.observe.rollbacks import Rollbacks, read_rollbacks
from grpo_mega.observe.summary import Summary, read_summary
from grpo_mega.types import UserError

_COMPLETE_MARK = "complete"
_STEP_NAME = re.compile(r"step_(\d{6,})")
# Files of a launcher, or of a start that failed before it wrote config.yaml: not a run, so the folder can be used.
_NOT_YET_A_RUN = {"logs", "config.yaml" + TEMPORARY_SUFFIX}


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved config, `config.yaml`."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Metrics, one line per step."""
        return self.path / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        """Phases of the ranks, `timeline.jsonl`, one line per step."""
        return self.path / "timeline.jsonl"

    @property
    def config_changes(self) -> Path:
        """Keys that changed while the run continued, `config_changes.jsonl`."""
        return self.path / "config_changes.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        """Folder of the rollouts."""
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def local_id(self) -> Path:
        """Number of the run by which its local checkpoints are found (`checkpoint.local_every`)."""
        return self.path / "local_id"

    @property
    def discarded(self) -> Path:
        """Folder of metrics and rollouts of steps that were made again, in one folder per start."""
        return self.path / "discarded"

    @property
    def rollbacks(self) -> Path:
        """Returns to a checkpoint that a rule of `guard.rules` asked for, `rollbacks.jsonl`."""
        return self.path / "rollbacks.jsonl"

    @property
    def quarantine(self) -> Path:
        """Folder of the rollouts that rules of `guard.rules` put aside."""
        return self.path / "quarantine"

    def quarantine_of(self, step: int) -> Path:
        """Folder of the rollouts of one step in quarantine, with the reason."""
        return self.quarantine / f"step_{step:06d}"

    @property
    def logs(self) -> Path:
        """Folder of the rank logs."""
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        """Summary of the run, `summary.json`."""
        return self.path / "summary.json"

    @property
    def fp8_report(self) -> Path:
        """Report of quantization errors, `fp8_report.json`."""
        return self.path / "fp8_report.json"

    @property
    def traces(self) -> Path:
        """Traces of the ranks, one file each (`observe.trace`)."""
        return self.path / "trace"

    @property
    def trace(self) -> Path:
        """Trace of all ranks."""
        return self.path / "trace.json.gz"

    def profile_of(self, step: int) -> Path:
        """Return the folder of the torch profiles of a step (`observe.profile_steps`)."""
        return self.path / "profile" / f"step_{step:06d}"

    def rollouts_of(self, step: int) -> Path:
        """Folder of the rollouts of one step, with one Parquet part per prompt shard."""
        return self.rollouts / f"step_{step:06d}"

    def checkpoint_of(self, step: int) -> Path:
        """Path of the checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:06d}"

    def complete_checkpoints(self) -> dict[int, Path]:
        """Return {step: folder}, oldest first. A complete checkpoint contains the file `complete`, written last."""
        return {step: path for step, path in self.all_checkpoints().items() if (path / _COMPLETE_MARK).is_file()}

    def all_checkpoints(self) -> dict[int, Path]:
        """Return {step: path} of everything with the name of a checkpoint, damaged or not, oldest first.

        Raises:
            UserError: `checkpoints` is not a folder, or cannot be read.
        """
        try:
            entries = list(self.checkpoints.iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(
                f"{self.checkpoints}: cannot be read ({error.strerror})",
                remedy="restore the folder, or start again with run.overwrite=true",
            ) from error
        found = {step: path for path in entries if (step := checkpoint_step(path)) is not None}
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class CheckpointsToVerify:
    """Checkpoints from which a command could continue, newest first; the first whole one is used.

    `named_by_user`: it is the one of `checkpoint.resume=PATH`, and no other may take its place.
    """

    newest_first: tuple[Path, ...] = ()
    named_by_user: bool = False


@dataclass(frozen=True)
class RunState:
    """State of a run when a command starts.

    Attributes:
        folder: the run folder.
        status: `fresh`: a new folder. `continued`: train after `step`; if `step` has reached `train.steps`, only the
            last evaluation, the export and the summary remain. `finished`: nothing to do.
        step: completed steps.
        checkpoint: weights after `step` steps; None: the base model.
        previous: last summary of earlier commands of this run, whose times and first evaluation are kept; or None.
        moved_to: new path of the folder that `run.overwrite` moved aside, or None.
        changes: keys that have another value from the next step on.
        discarded: steps after `step` that an earlier command made, and the folder that holds them now; or None.
        rollbacks: rollbacks of earlier commands of this run.
    """

    folder: RunFolder
    status: Literal["fresh", "continued", "finished"]
    step: int
    checkpoint: Path | None
    previous: Summary | None
    moved_to: Path | None
    changes: tuple[ConfigChange, ...] = ()
    discarded: DiscardedSteps | None = None
    rollbacks: Rollbacks = field(default_factory=Rollbacks)

    @property
    def has_checkpoint(self) -> bool:
        """True if `checkpoint` is in this run's own folder."""
        return self.checkpoint is not None and self.checkpoint.parent.absolute() == self.folder.checkpoints.absolute()


def checkpoints_to_verify(
    path: Path, resolved: Mapping[str, Any], *, overwrite: bool, train_steps: int, resume: str = "auto"
) -> CheckpointsToVerify:
    """Return the checkpoints that must be verified before `open_run`. The arguments are those of `open_run`.

    Raises:
        UserError: see `open_run`. Nothing was changed.
    """
    folder = RunFolder(path)
    if _holds_run(folder) and not overwrite:
        _allowed_changes(folder, resolved)
        _require_allowed(folder, max(folder.complete_checkpoints(), default=0), resume)
        own = folder.all_checkpoints()
        if _is_finished(folder, train_steps):
            return CheckpointsToVerify()
        if own:
            return CheckpointsToVerify(tuple(reversed(own.values())))
    if resume in ("auto", "never"):
        return CheckpointsToVerify()
    return CheckpointsToVerify((_given_checkpoint(resume, train_steps)[1],), named_by_user=True)


def open_run(
    path: Path,
    resolved: Mapping[str, Any],
    *,
    overwrite: bool,
    train_steps: int,
    resume: str = "auto",
) -> RunState:
    """Determine the state of the run in `path` and prepare the folder for the next step.

    Args:
        path: `run.dir`.
        resolved: the resolved config as nested plain values; written to `config.yaml`.
        overwrite: move an existing folder to `<name>.old-1`, `-2`, ... and start a new run.
        train_steps: a run is finished if its newest complete checkpoint and its summary have reached this step. A run
            that was killed between the two is continued, to write the summary.
        resume: `auto`; `never` (the folder must not contain a run); or the checkpoint from which a new run starts.

    Raises:
        UserError: the folder contains other files, an unreadable config, or a run with a different config; or `resume`
            is not a checkpoint that this run can use, or has reached `train_steps`.
    """
    folder = RunFolder(path)
    moved_to = None
    exists = _holds_run(folder)
    if exists and overwrite:
        moved_to = move_aside(path)
        exists = False
    if not exists:
        return _start_new(folder, resolved, resume, train_steps, moved_to)
    changes = _allowed_changes(folder, resolved)
    checkpoints = folder.complete_checkpoints()
    step = max(checkpoints, default=0)
    _require_resumable(folder, step, resume)
    previous = read_summary(folder.summary) if folder.summary.exists() else None
    if _is_finished(folder, train_steps):
        return RunState(folder, "finished", step, checkpoints[step], previous, None)
    checkpoint = checkpoints.get(step)
    if checkpoint is None and resume != "auto":
        step, checkpoint = _given_checkpoint(resume, train_steps)
    rollbacks = read_rollbacks(folder.rollbacks)
    discarded = set_aside_after(step, folder.metrics, folder.rollouts, folder.discarded)
    changes = record_changes(folder.config_changes, step, changes)
    _write_config(folder, resolved)
    return RunState(folder, "continued", step, checkpoint, previous, None, changes, discarded, rollbacks)


def _is_finished(folder: RunFolder, train_steps: int) -> bool:
    """Return True if the newest complete checkpoint and the summary have reached `train_steps`."""
    previous = read_summary(folder.summary) if folder.summary.exists() else None
    ended = previous is not None and previous.status == "done" and previous.steps >= train_steps
    return ended and max(folder.complete_checkpoints(), default=0) >= train_steps


def check_run(path: Path, resolved: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check the config against the run in the folder, without changing the folder. Any rank may call it.

    Raises:
        UserError: see `open_run`.
    """
    if _holds_run(RunFolder(path)) and not overwrite:
        _allowed_changes(RunFolder(path), resolved)


def _holds_run(folder: RunFolder) -> bool:
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"run.dir={folder.path} is a file", remedy="name a folder; it is created if it does not exist")
    if folder.config.is_file():
        return True
    if not folder.path.exists():
        return False
    foreign = sorted(entry.name for entry in folder.path.iterdir() if entry.name not in _NOT_YET_A_RUN)
    if foreign:
        raise UserError(
            f"run.dir={folder.path} holds {foreign[0]} but no config.yaml, so it is not a run",
            remedy="name a new folder",
        )
    return False


def _start_new(
    folder: RunFolder, resolved: Mapping[str, Any], resume: str, train_steps: int, moved_to: Path | None
) -> RunState:
    step, checkpoint = 0, None
    if resume not in ("auto", "never"):
        step, checkpoint = _given_checkpoint(resume, train_steps, moved_to, folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _write_config(folder, resolved)
    except OSError as error:
        raise UserError(
            f"run.dir={folder.path} cannot be written: {error.strerror}", remedy="name a writable folder"
        ) from error
    return RunState(folder, "fresh", step, checkpoint, None, moved_to)


def _given_checkpoint(
    resume: str, train_steps: int, moved_to: Path | None = None, folder: RunFolder | None = None
) -> tuple[int, Path]:
    """Return step and folder of `checkpoint.resume=PATH`, also if PATH was in the folder that was just moved aside."""
    path = Path(resume)
    if moved_to is not None and folder is not None and path.absolute().is_relative_to(folder.path.absolute()):
        path = moved_to / path.absolute().relative_to(folder.path.absolute())
    step = checkpoint_step(path)
    if step is None or not (path / _COMPLETE_MARK).is_file():
        raise UserError(
            f"checkpoint.resume={resume} is not a complete checkpoint (a folder step_NNNNNN that contains the file "
            f"`{_COMPLETE_MARK}`)",
            remedy="use auto, never, or the path of a complete checkpoint",
        )
    if step >= train_steps:
        raise UserError(
            f"checkpoint.resume={resume} is at step {step}, which has reached train.steps={train_steps} already",
            remedy=f"use train.steps={step + train_steps} to train {train_steps} more steps",
        )
    return step, path


def checkpoint_step(path: Path) -> int | None:
    """Return the step in the name of a checkpoint, or None for other names."""
    named = _STEP_NAME.fullmatch(path.name)
    return int(named[1]) if named else None


def _require_allowed(folder: RunFolder, step: int, resume: str) -> None:
    """Check that `checkpoint.resume` lets a command continue the run in the folder."""
    if resume == "never":
        raise UserError(
            f"checkpoint.resume=never, but run.dir={folder.path} holds a run at step {step}",
            remedy="use another run.dir, checkpoint.resume=auto to continue it, or run.overwrite=true to move it aside",
        )


def _require_resumable(folder: RunFolder, step: int, resume: str) -> None:
    """Check that a run continues from its own newest checkpoint, so that a repeated command never loses a step."""
    _require_allowed(folder, step, resume)
    own = Path(resume).absolute().parent == folder.checkpoints.absolute()
    if own and Path(resume).absolute() != folder.checkpoint_of(step).absolute():
        raise UserError(
            f"checkpoint.resume={resume} is not the newest complete checkpoint of its run, which is at step {step}",
            remedy="to go back, remove the later checkpoints, also those in checkpoint.local_dir, and use auto, or "
            "start in another run.dir",
        )


def _write_config(folder: RunFolder, resolved: Mapping[str, Any]) -> None:
    write_atomically(folder.config, yaml.safe_dump(dict(resolved), sort_keys=False))


def _allowed_changes(folder: RunFolder, resolved: Mapping[str, Any]) -> tuple[ConfigChange, ...]:
    """Return the changes that take effect in later steps.

    Raises:
        UserError: a key differs that must not change within a run.
    """
    changes = compare_configs(_read_config(folder), resolved)
    if changes.frozen:
        raise UserError(
            f"run.dir={folder.path} holds a run with a different config: {', '.join(map(str, changes.frozen))}",
            remedy="use the values of that run to continue it, another run.dir with checkpoint.resume=PATH to branch"
            " from one of its checkpoints, or run.overwrite=true to move it aside and start again",
        )
    return changes.future


def _read_config(folder: RunFolder) -> dict[str, Any]:
    remedy = "repair it, use another run.dir, or run.overwrite=true to move the folder aside"
    try:
        config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"run.dir={folder.path}: its config.yaml cannot be read ({reason})", remedy=remedy) from error
    if not isinstance(config, dict):
        raise UserError(f"run.dir={folder.path}: its config.yaml has no sections", remedy=remedy)
    return config
