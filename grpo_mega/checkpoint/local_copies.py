"""Checkpoints on the disks, or in the memory, of the machines of a job (`checkpoint.local_every`).

Each rank writes its files into the folder of its own machine. Writer, manifest and comparison with the live state are
those of every checkpoint (manager.py). Local checkpoints survive if processes are killed, but not if a machine is lost.

When a run continues, it uses the newest local checkpoint that is newer than the newest undamaged one of the run folder,
and of which the machines together hold all files. Its files are copied into the run folder, and the run continues from
there as from any checkpoint. If a local checkpoint cannot be used, the log has the reason. If it cannot be copied, the
run ends with an error, and the local checkpoint is kept.

The name of a run's local folder is a random number, which is stored in the run folder. A later run in the same run
folder has another number, so it never finds the checkpoints of an earlier run.
Asserted by tests/parallel/test_local_copies.py and tests/e2e/test_local_checkpoints.py.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from grpo_mega.checkpoint.manager import CheckpointManager
from grpo_mega.checkpoint.verification import find_damage, move_to_damaged
from grpo_mega.formats.checkpoint_manifest import (
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    differences,
    read_manifest,
    sync_folder,
    write_manifest,
)
from grpo_mega.observe.atomic_files import write_atomically
from grpo_mega.observe.run_folder import RunFolder, checkpoint_step
from grpo_mega.parallel.ranks import Ranks, agreed, first_error
from grpo_mega.types import CheckpointWriteError

log = logging.getLogger(__name__)
_LEADER = "leader_"
_NUMBER = re.compile(r"[0-9a-f]{16}")


class _SharedFolderError(Exception):
    """Several machines have the same folder."""


@dataclass(frozen=True)
class LocalSaves:
    """Local checkpoints of a run.

    Attributes:
        manager: writes them into the folder of this machine.
        every: `checkpoint.local_every`.
    """

    manager: CheckpointManager
    every: int


@dataclass(frozen=True)
class _LocalPart:
    """The part of a local checkpoint that one machine holds.

    Attributes:
        manifest: digest of its manifest.
        whole: names of the files that are present and equal the manifest.
        problem: why the part cannot be used; empty if it can.
    """

    manifest: str
    whole: frozenset[str]
    problem: str = ""


@dataclass(frozen=True)
class _Machine:
    """Local checkpoints of one machine; `parts` has them by step. Empty on ranks that do not lead a machine."""

    name: str = ""
    parts: dict[int, _LocalPart] = field(default_factory=dict)


@dataclass(frozen=True)
class _CopyPlan:
    """Manifest of a local checkpoint, and the name of the machine that copies each of its files."""

    manifest: Manifest
    holders: Mapping[str, str]


def leads_machine() -> bool:
    """Return True on the first rank of each machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def open_local_folder(local_dir: Path, run: RunFolder, ranks: Ranks, *, leads: bool) -> Path:
    """Return the folder of a run's local checkpoints, and remove those of earlier runs in this run folder. Collective.

    Args:
        local_dir: `checkpoint.local_dir`.
        run: folder of the run.
        ranks: coordinates of this rank.
        leads: True on the first rank of each machine.

    Raises:
        RuntimeError: on every rank, if a folder cannot be made, or is the same on several machines (names rank and
            folder).
    """

    def read_or_make_number() -> str:
        if found := read_number(run):
            return found
        made = secrets.token_hex(8)
        write_atomically(run.local_id, made)
        return made

    folder = local_folder(local_dir, run, agreed(read_or_make_number, ranks))

    def act(action: Callable[[], None]) -> None:
        failure = ""
        if leads:
            try:
                action()
            except OSError as error:
                failure = f"cannot be written ({error.strerror})"
            except _SharedFolderError:
                failure = "is the same folder on several machines"
        if failure := first_error(failure):
            raise RuntimeError(
                f"checkpoint.local_dir={local_dir}: {failure}; name a folder of a disk or the memory of each machine"
            )

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{_LEADER}{ranks.rank}").touch()
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)

    def require_own() -> None:
        if len(list(folder.glob(f"{_LEADER}*"))) > 1:
            raise _SharedFolderError

    def forget_leader() -> None:
        (folder / f"{_LEADER}{ranks.rank}").unlink()

    act(make)
    try:
        act(require_own)
    finally:
        act(forget_leader)
    return folder


def local_folder(local_dir: Path, run: RunFolder, number: str) -> Path:
    """Return the local folder of the run with this number. All runs of one run folder have the same parent folder."""
    place = xxhash.xxh3_64_hexdigest(os.fsencode(run.path.absolute()))
    return local_dir / f"{run.path.name}-{place}" / number


def read_number(run: RunFolder) -> str:
    """Return the number of the run, which names its local folders; empty if it has none.

    A file with anything else counts as none: its content would become a path, of which the other folders are removed.
    """
    if not run.local_id.exists():
        return ""
    found = run.local_id.read_bytes().decode(errors="replace")
    if _NUMBER.fullmatch(found):
        return found
    log.warning("%s is damaged: the local checkpoints of this run cannot be found any more", run.local_id)
    return ""


def copy_newest(local_dir: Path, run: RunFolder, model: str, ranks: Ranks, *, leads: bool) -> bool:
    """Copy the newest complete local checkpoint into the run folder, if none there is as new and undamaged. Collective.

    Args:
        local_dir: `checkpoint.local_dir`.
        run: folder of the run that continues.
        model: result of `describe_model` for this run's model.
        ranks: coordinates of this rank.
        leads: True on the first rank of each machine.

    Returns:
        True if one was copied. It is then the newest checkpoint of the run folder, and was verified there.

    Raises:
        CheckpointWriteError: on every rank, if it cannot be copied (names both checkpoints). It is not changed.
    """
    number, own = agreed(lambda: (read_number(run), run.all_checkpoints()), ranks)
    if not number:
        return False
    folder, newest = local_folder(local_dir, run, number), max(own, default=0)
    mine = _Machine(f"{socket.gethostname()}:{folder}", _inspect(folder, model)) if leads else _Machine()
    machines = [each for each in _gather_machines(mine) if each.name]
    steps = sorted({step for each in machines for step in each.parts}, reverse=True)
    if not steps or steps[0] <= newest:
        log.info("no machine holds a local checkpoint after step %d (checkpoint.local_dir=%s)", newest, local_dir)
    damages: dict[Path, str] = {}
    for step in steps:
        for newer in sorted((each for each in own if each >= step), reverse=True):
            path = own.pop(newer)
            if (damage := find_damage(path, model, ranks)) is None:
                return False
            damages[path] = damage
        older = f"the checkpoint of step {max(own)} in the run folder" if own else "its start"
        local, final = folder / f"step_{step:06d}", run.checkpoint_of(step)
        plan = _plan_copy(step, machines, local, ranks)
        if isinstance(plan, str):
            log.warning(
                "the local checkpoint of step %d is not used: %s. The run continues from an older local checkpoint, if "
                "there is one, or from %s",
                step,
                plan,
                older,
            )
            continue
        failure = _copy(plan, mine.name, local, final, damages, ranks) or find_damage(final, model, ranks)
        if failure:
            raise CheckpointWriteError(
                f"the local checkpoint of step {step} cannot be copied to {final}: {failure}; it is unchanged in "
                f"{local} of each machine, and the run continues from it after this is repaired. Delete it to continue "
                f"from {older} instead"
            )
        log.info("the local checkpoint of step %d was copied to %s", step, final)
        return True
    return False


def _plan_copy(step: int, machines: list[_Machine], local: Path, ranks: Ranks) -> _CopyPlan | str:
    """Return which machine copies which file of a local checkpoint, or why it cannot be used. Collective."""
    if reason := _reason(step, machines):
        return reason
    manifest = agreed(lambda: read_manifest(local), ranks)
    if manifest is None:
        return f"{local / MANIFEST} is missing"
    holders = {name: next((m.name for m in machines if name in m.parts[step].whole), "") for name in manifest.files}
    missing = next((name for name, holder in holders.items() if not holder), "")
    return f"no machine has its file {missing}" if missing else _CopyPlan(manifest, holders)


def _inspect(folder: Path, model: str) -> dict[int, _LocalPart]:
    """Return this machine's part of each local checkpoint."""
    parts = {}
    for path in folder.glob("step_*"):
        step = checkpoint_step(path)
        if step is None:
            continue
        try:
            manifest = read_manifest(path)
        except DamagedCheckpointError as error:
            parts[step] = _LocalPart("", frozenset(), str(error))
            continue
        if manifest is None or manifest.step != step or manifest.model not in (model, ""):
            parts[step] = _LocalPart("", frozenset(), f"{path}: is not a checkpoint of this step and model")
            continue
        present = [name for name in manifest.files if (path / name).exists()]
        damages = differences(path, manifest, present)
        whole = {name for name in present if not any(str(path / name) in damage for damage in damages)}
        digest = xxhash.xxh3_128_hexdigest(repr(manifest).encode())
        parts[step] = _LocalPart(digest, frozenset(whole), damages[0] if damages else "")
    return parts


def _reason(step: int, machines: list[_Machine]) -> str:
    """Return why a local checkpoint cannot be used, or an empty string. Equal on every rank."""
    for machine in machines:
        if step not in machine.parts:
            return f"{machine.name} has no part of it"
        if machine.parts[step].problem:
            return f"{machine.parts[step].problem} (on {machine.name})"
    if len({machine.parts[step].manifest for machine in machines}) > 1:
        return "the machines have parts of different saves"
    return ""


def _copy(plan: _CopyPlan, own: str, source: Path, final: Path, damages: dict[Path, str], ranks: Ranks) -> str:
    """Copy the parts of all machines into the run folder; return what failed, or an empty string. Collective.

    Args:
        plan: of the copy.
        own: name of this machine on its first rank; empty on the others.
        source: this machine's part.
        final: its folder in the run folder.
        damages: damaged checkpoints of the run folder that are as new or newer, which are moved aside.
        ranks: coordinates of this rank.
    """
    manifest, staged = plan.manifest, final.with_suffix(".tmp")

    def act(is_mine: bool, action: Any) -> str:
        failure = ""
        if is_mine:
            try:
                action()
            except OSError as error:
                failure = f"{error.filename2 or error.filename or staged}: {error.strerror}"
        return first_error(failure)

    def make_folders() -> None:
        shutil.rmtree(staged, ignore_errors=True)
        for name in manifest.files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)

    def copy_own() -> None:
        for name, holder in plan.holders.items():
            if holder == own:
                shutil.copyfile(source / name, staged / name)
                with (staged / name).open("rb") as file:
                    os.fsync(file.fileno())

    def publish() -> None:
        write_manifest(staged, manifest)
        move_to_damaged(damages)
        staged.rename(final)
        sync_folder(final.parent)

    failure = act(ranks.is_first, make_folders) or act(bool(own), copy_own) or act(ranks.is_first, publish)
    if failure and ranks.is_first:
        shutil.rmtree(staged, ignore_errors=True)
    return failure


def _gather_machines(mine: _Machine) -> list[_Machine]:
    if dist.get_world_size() == 1:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
