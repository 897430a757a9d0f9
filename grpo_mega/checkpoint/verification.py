"""Verification of checkpoints before a run continues from one of them. Collective.

The newest checkpoint of a run is compared with its manifest, file by file; the ranks share the files. If it differs, it
is named in the log, and the one before it is tried. Damaged checkpoints are moved to `checkpoints/damaged/`, and only
once a whole one was found: a run whose checkpoints are all damaged stops with an error at every start, and never begins
again from the first step.
Asserted by tests/parallel/test_damaged_checkpoints.py and tests/e2e/test_damaged_checkpoint.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from grpo_mega.formats.checkpoint_manifest import (
    DamagedCheckpointError,
    Manifest,
    damaged,
    differences,
    read_manifest,
    sync_folder,
    unlisted_files,
)
from grpo_mega.observe.run_folder import CheckpointsToVerify, checkpoint_step
from grpo_mega.parallel.ranks import Ranks, agreed
from grpo_mega.types import UserError

DAMAGED = "damaged"
log = logging.getLogger(__name__)


def verify_checkpoints(wanted: CheckpointsToVerify, model: str, ranks: Ranks) -> None:
    """Verify the newest checkpoint that a run would continue from, or the one that the user named. Collective.

    Args:
        wanted: the checkpoints, newest first.
        model: `describe_model` of the model of this run.
        ranks: coordinates of this rank.

    Raises:
        UserError: none of them is whole (names each with the reason), or the named one is damaged.
    """
    reasons: dict[Path, str] = {}
    for path in wanted.newest_first:
        reason = find_damage(path, model, ranks)
        if reason is None:
            if reasons:
                agreed(lambda: move_to_damaged(reasons), ranks)
                log.warning("continuing from the checkpoint before, %s", path)
            return
        if wanted.named_by_user:
            raise damaged(f"checkpoint.resume={path}: {reason}")
        log.warning("a checkpoint is damaged: %s", reason)
        reasons[path] = reason
    if reasons:
        raise UserError(
            f"none of the {len(reasons)} checkpoints of this run is whole: {'; '.join(reasons.values())}",
            remedy="restore one of them from a copy, start another run from an older checkpoint"
            " (checkpoint.resume=PATH with a new run.dir), or start again with run.overwrite=true",
        )


def find_damage(path: Path, model: str, ranks: Ranks) -> str | None:
    """Compare a checkpoint with its manifest; return the file and what differs, or None if it can be used. Collective.

    Args:
        path: folder of the checkpoint.
        model: `describe_model` of the model of this run.
        ranks: coordinates of this rank.
    """

    def read() -> Manifest | None:
        manifest = read_manifest(path)
        if manifest is None:
            log.warning("%s has no manifest.json: an older version wrote it, so it cannot be verified", path)
        return manifest

    try:
        manifest = agreed(read, ranks)
    except DamagedCheckpointError as error:
        return str(error)
    if manifest is None:
        return None
    if manifest.step != checkpoint_step(path):
        return f"{path}: its name is not that of step {manifest.step}, of which it is the checkpoint"
    if manifest.model not in (model, ""):
        return f"{path}: is a checkpoint of another model ({manifest.model}; this run: {model})"
    names = list(manifest.files)[ranks.rank :: ranks.topology.world_size]
    found = differences(path, manifest, names)
    if ranks.is_first:
        found += unlisted_files(path, manifest)
    every: list[Any] = [found]
    if ranks.topology.world_size > 1:
        every = [None] * ranks.topology.world_size
        dist.all_gather_object(every, found)
    all_found: Sequence[str] = sorted(each for part in every for each in part)
    if not all_found:
        return None
    return all_found[0] + (f" (and {len(all_found) - 1} more files)" if len(all_found) > 1 else "")


def move_to_damaged(reasons: dict[Path, str]) -> None:
    """Move damaged checkpoints of a run to `checkpoints/damaged/`; `reasons` has the message for each."""
    for path in reasons:
        folder = path.parent / DAMAGED
        folder.mkdir(exist_ok=True)
        target, number = folder / path.name, 1
        while target.exists() or target.is_symlink():
            target, number = folder / f"{path.name}-{number}", number + 1
        path.rename(target)
        log.warning("moved to %s: %s", target, reasons[path])
        sync_folder(path.parent)
