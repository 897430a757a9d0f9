"""The run folder: what lies where in it, and what a command finds there.

`open_run` decides whether a command starts afresh, continues or has nothing left to do. What it leaves behind agrees
with the checkpoint that training continues from: later lines of `metrics.jsonl` and later rollouts are removed, for the
continued run writes them again. Rank 0 calls it, before any other rank writes into the folder; the others are told.
It never deletes a run, and never touches the content of a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from grpo_mega.observe.atomic_files import TEMPORARY_SUFFIX, write_atomically
from grpo_mega.observe.summary import Summary, read_summary
from grpo_mega.types import UserError

CHANGEABLE = (
    "train.steps",
    "observe.*",
    "checkpoint.*",
    "parallel.*",
    "run.world_size",
    "engine.tp",
    "engine.dp",
    "engine.ep",
    "engine.placement",
    "engine.urls",
)
"""Keys (shell patterns) that may change between two commands of one run."""

_NEVER_COMPARED = ("run.overwrite", "run.dir")
_COMPLETE_MARK = "complete"
_STEP_NAME = re.compile(r"step_(\d{6,})")
# What a launcher, or a start that died before it wrote config.yaml, may have left: no run is lost by going on.
_NOT_YET_A_RUN = {"logs", "config.yaml" + TEMPORARY_SUFFIX}


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def fp8_report(self) -> Path:
        return self.path / "fp8_report.json"

    def rollouts_of(self, step: int) -> Path:
        """The rollouts of one step, a row each."""
        return self.rollouts / f"step_{step:06d}.jsonl"

    def experts_of(self, step: int) -> Path:
        """The experts of the tokens of these rollouts."""
        return self.rollouts / f"step_{step:06d}.experts.npz"

    def checkpoint_of(self, step: int) -> Path:
        """The checkpoint taken after `step` steps."""
        return self.checkpoints / f"step_{step:06d}"

    def complete_checkpoints(self) -> dict[int, Path]:
        """Step -> folder, oldest first. A checkpoint is complete when it holds the file `complete`, written last."""
        if not self.checkpoints.is_dir():
            return {}
        found = {step: path for path in self.checkpoints.iterdir() if (step := _checkpoint_step(path)) is not None}
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class RunState:
    """What a command found: `step` steps are done, by the weights of `checkpoint` (None: those of the base model).

    `fresh`: a new folder. `continued`: go on after `step`; where `step` has reached `train.steps` only the end is
    missing (last evaluation, export, summary). `finished`: nothing to do, `previous` is the run's summary.
    `previous` is otherwise what earlier commands of this run last wrote (its times and its first evaluation go on).
    `moved_to` is where `run.overwrite` put the folder that was there.
    """

    folder: RunFolder
    status: Literal["fresh", "continued", "finished"]
    step: int
    checkpoint: Path | None
    previous: Summary | None
    moved_to: Path | None


def open_run(
    path: Path,
    resolved: Mapping[str, Any],
    *,
    overwrite: bool,
    train_steps: int,
    changeable: Sequence[str] = CHANGEABLE,
    resume: str = "auto",
) -> RunState:
    """Apply the run-folder rule to `path` and leave the folder ready for the next step.

    Args:
        resolved: The resolved config, nested plain values; written to `config.yaml`.
        overwrite: Move what is there to `<name>.old-1`, `-2`, ... and start afresh.
        train_steps: A run is finished when its newest complete checkpoint has reached them and its summary was written
            at such a step (a run killed between the two is continued, to write it).
        changeable: Shell patterns of keys that may differ from the config in the folder.
        resume: `auto`; `never` (start only where no run is); or the checkpoint that a fresh run starts from.

    Raises:
        UserError: the folder holds something else, an unreadable config, or a run with a different config; `resume`
            does not fit.
    """
    folder = RunFolder(path)
    moved_to = None
    exists = _holds_run(folder)
    if exists and overwrite:
        moved_to = _move_aside(path)
        exists = False
    if not exists:
        return _start(folder, resolved, resume, moved_to)
    _require_same_config(folder, resolved, changeable)
    checkpoints = folder.complete_checkpoints()
    step = max(checkpoints, default=0)
    _require_resumable(folder, step, resume)
    previous = read_summary(folder.summary) if folder.summary.exists() else None
    ended = previous is not None and previous.status == "done" and previous.steps >= train_steps
    if step >= train_steps and ended:
        return RunState(folder, "finished", step, checkpoints[step], previous, None)
    checkpoint = checkpoints.get(step)
    if checkpoint is None and resume != "auto":
        step, checkpoint = _given_checkpoint(resume)
    _keep_until(folder, step)
    _write_config(folder, resolved)
    return RunState(folder, "continued", step, checkpoint, previous, None)


def check_run(path: Path, resolved: Mapping[str, Any], *, overwrite: bool) -> None:
    """What `open_run` would refuse for the config's sake, without touching the folder: any rank may ask, and early.

    Raises:
        UserError: as `open_run`.
    """
    if _holds_run(RunFolder(path)) and not overwrite:
        _require_same_config(RunFolder(path), resolved, CHANGEABLE)


def _holds_run(folder: RunFolder) -> bool:
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"run.dir={folder.path} is a file", remedy="name a folder, which is created")
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


def _start(folder: RunFolder, resolved: Mapping[str, Any], resume: str, moved_to: Path | None) -> RunState:
    step, checkpoint = (0, None) if resume in ("auto", "never") else _given_checkpoint(resume, moved_to, folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        _write_config(folder, resolved)
    except OSError as error:
        raise UserError(
            f"run.dir={folder.path} cannot be written: {error.strerror}", remedy="name a writable folder"
        ) from error
    return RunState(folder, "fresh", step, checkpoint, None, moved_to)


def _given_checkpoint(resume: str, moved_to: Path | None = None, folder: RunFolder | None = None) -> tuple[int, Path]:
    """Step and folder of `checkpoint.resume=PATH`, also when PATH lay in the folder that was just moved aside."""
    path = Path(resume)
    if moved_to is not None and folder is not None and path.absolute().is_relative_to(folder.path.absolute()):
        path = moved_to / path.absolute().relative_to(folder.path.absolute())
    step = _checkpoint_step(path)
    if step is None:
        raise UserError(
            f"checkpoint.resume={resume} is not a complete checkpoint (a folder step_NNNNNN that holds the file "
            f"`{_COMPLETE_MARK}`)",
            remedy="use auto, never, or the path of one",
        )
    return step, path


def _checkpoint_step(path: Path) -> int | None:
    named = _STEP_NAME.fullmatch(path.name)
    return int(named[1]) if named and (path / _COMPLETE_MARK).is_file() else None


def _require_resumable(folder: RunFolder, step: int, resume: str) -> None:
    """A run continues from its own newest checkpoint, so that the same command twice never loses a step."""
    if resume == "never":
        raise UserError(
            f"checkpoint.resume=never, but run.dir={folder.path} holds a run at step {step}",
            remedy="use another run.dir, checkpoint.resume=auto to continue it, or run.overwrite=true to move it aside",
        )
    own = Path(resume).absolute().parent == folder.checkpoints.absolute()
    if own and Path(resume).absolute() != folder.checkpoint_of(step).absolute():
        raise UserError(
            f"checkpoint.resume={resume} is not the newest complete checkpoint of its run, which is at step {step}",
            remedy="to go back, remove the later checkpoints and use auto, or start in another run.dir",
        )


def _move_aside(path: Path) -> Path:
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)
    return target


def _write_config(folder: RunFolder, resolved: Mapping[str, Any]) -> None:
    write_atomically(folder.config, yaml.safe_dump(dict(resolved), sort_keys=False))


def _require_same_config(folder: RunFolder, resolved: Mapping[str, Any], changeable: Sequence[str]) -> None:
    there = _flatten(_read_config(folder))
    # Through YAML and back, so that both sides went the same way (tuples become lists).
    now = _flatten(yaml.safe_load(yaml.safe_dump(dict(resolved), sort_keys=False)))
    patterns = (*changeable, *_NEVER_COMPARED)
    differences = [
        f"{key} ({_shown(there, key)} there, {_shown(now, key)} now)"
        for key in dict.fromkeys((*there, *now))
        if _shown(there, key) != _shown(now, key) and not any(fnmatchcase(key, pattern) for pattern in patterns)
    ]
    if differences:
        raise UserError(
            f"run.dir={folder.path} holds a run with a different config: {', '.join(differences)}",
            remedy="use another run.dir, the values of that run to continue it, or run.overwrite=true to move it aside",
        )


def _read_config(folder: RunFolder) -> dict[str, Any]:
    remedy = "repair it, use another run.dir, or run.overwrite=true to move the folder aside"
    try:
        config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"run.dir={folder.path}: its config.yaml cannot be read ({reason})", remedy=f"{remedy}"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"run.dir={folder.path}: its config.yaml holds no sections", remedy=f"{remedy}")
    return config


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; a list is a value, and so is an empty section."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "unset"


def _keep_until(folder: RunFolder, step: int) -> None:
    """Remove what was written after the checkpoint at `step`."""
    if folder.metrics.exists():
        lines = folder.metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for number, line in enumerate(lines) if _line_step(folder, lines, number) <= step]
        write_atomically(folder.metrics, "".join(f"{line}\n" for line in kept))
    if folder.rollouts.is_dir():
        for path in folder.rollouts.iterdir():
            named = _STEP_NAME.match(path.name)
            if named and (int(named[1]) > step or path.name.endswith(TEMPORARY_SUFFIX)):
                path.unlink()


def _line_step(folder: RunFolder, lines: Sequence[str], number: int) -> float:
    """The step of a line; infinity for a last line that a crash cut short."""
    try:
        return int(json.loads(lines[number])["step"])
    except (ValueError, KeyError, TypeError) as error:
        if number == len(lines) - 1:
            return float("inf")
        raise UserError(
            f"{folder.metrics}:{number + 1} is not a JSON object with a key `step`", remedy="repair or remove the line"
        ) from error
