"""A save is written while training continues; whatever happens to its writer is an error at the next step, and no
incomplete checkpoint is ever visible."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from grpo_mega.checkpoint import background as background_module
from grpo_mega.checkpoint.background import BackgroundSaves
from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.formats.checkpoint_manifest import MANIFEST, require_undamaged
from grpo_mega.formats.file_parts import CopiedFiles
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.trainer.phases import Phases
from tests.helpers.checkpointed_training import RATES, resume_training, state_bytes, train_on
from tests.helpers.recorded_rollouts import ONE, Layout, Recorded, open_policy
from tests.parallel.conftest import Laboratory

DP2, TP2 = Layout(2), Layout(2, tp=2)


class HeldWriter:
    """Holds the writers of this process until `release` is set, or makes them fail before or after they write."""

    def __init__(self, before: str = "", after: str = "") -> None:
        self.release = threading.Event()
        self._before, self._after, self._write = before, after, CopiedFiles.write

    def write(self, files: CopiedFiles, written: Any) -> None:
        self.release.wait(60)
        if self._before:
            raise ValueError(self._before)
        self._write(files, written)
        if self._after:
            raise ValueError(self._after)

    def __enter__(self) -> HeldWriter:
        held = self

        def write(files: CopiedFiles, written: Any) -> None:
            held.write(files, written)

        self._patch = mock.patch.object(CopiedFiles, "write", write)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._patch.stop()


def open_manager(
    rank: int,
    recorded: Recorded,
    layout: Layout,
    folder: Path,
    *,
    keep: int = 2,
    timeout_seconds: float = 60.0,
    in_background: bool = True,
) -> tuple[Any, CheckpointManager]:
    """Return a policy after one update, and a manager that saves in the background, or while training waits."""
    policy = open_policy(rank, recorded, layout)
    train_on(rank, policy, recorded, layout, RATES[:1])
    background = BackgroundSaves(timeout_seconds) if in_background else None
    manager = CheckpointManager(
        folder,
        keep,
        Phases(policy).checkpointing,
        is_first=rank == 0,
        layout=str(layout),
        background=background,
    )
    return policy, manager


def names_in(folder: Path) -> list[str]:
    torch.distributed.barrier()
    names = sorted(path.name for path in folder.glob("step_*"))
    torch.distributed.barrier()
    return names


def save_while_training(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> dict[str, Any]:
    """Save after the second update, and update twice before a byte is written."""
    policy, manager = open_manager(rank, recorded, layout, folder)
    waiting = CheckpointManager(
        folder.parent / "waiting", 2, Phases(policy).checkpointing, is_first=rank == 0, layout=str(layout)
    )
    train_on(rank, policy, recorded, layout, RATES[1:2])
    waiting.stage_if_due(policy, LoopState(1, 2), is_due=True)
    waiting.publish(wait=True)
    policy.reload("params", "grads", "optimizer")
    with HeldWriter() as held:
        manager.stage_if_due(policy, LoopState(1, 2), is_due=True)
        manager.publish(wait=False)
        policy.reload("params", "grads", "optimizer")
        stats = train_on(rank, policy, recorded, layout, RATES[2:])
        manager.stage_if_due(policy, LoopState(2, 4), is_due=False)
        in_flight = names_in(folder)
        held.release.set()
        manager.publish(wait=True)
    policy.reload("params", "grads", "optimizer")
    return {"in_flight": in_flight, "published": names_in(folder), "stats": stats, "state": state_bytes(policy)}


@pytest.mark.parametrize("layout", [DP2, TP2], ids=str)
def test_a_checkpoint_holds_the_state_of_its_step_although_training_continued(
    laboratory: Laboratory, tmp_path: Path, layout: Layout
) -> None:
    recorded, folder = laboratory.recorded("qwen3"), RunFolder(tmp_path).checkpoints
    runs = laboratory.pool.call(2, save_while_training, recorded, layout, folder)
    for run in runs:
        assert run["in_flight"] == ["step_000001.tmp"]
        assert run["published"] == ["step_000001"]
    checkpoint = folder / "step_000001"
    require_undamaged(checkpoint)
    ours, theirs = (
        json.loads((path / MANIFEST).read_text()) for path in (checkpoint, tmp_path / "waiting/step_000001")
    )
    assert ours["tensors"] == theirs["tensors"]
    shards = [name for name in ours["files"] if name.endswith(".distcp")]
    assert len(shards) == 2
    assert [ours["files"][name] for name in shards] == [theirs["files"][name] for name in shards]
    for run, (loop, stats, state) in zip(
        runs, laboratory.pool.call(2, resume_training, recorded, layout, checkpoint), strict=True
    ):
        assert loop == LoopState(1, 2)
        assert stats == run["stats"]
        assert state == run["state"]


def save_before_the_last_is_written(
    rank: int, recorded: Recorded, layout: Layout, folder: Path
) -> tuple[list[float], list[list[str]], list[str]]:
    """Save at steps 1, 2 and 3, while a slow writer takes half a second. Return waits, folders, and warnings."""
    policy, manager = open_manager(rank, recorded, layout, folder, keep=1)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grpo_mega.checkpoint.manager").addHandler(handler)
    waits, names = [], []
    try:
        for step in (1, 2, 3):
            with HeldWriter() as held:
                timer = threading.Timer(0.5, held.release.set)
                timer.start()
                manager.stage_if_due(policy, LoopState(step, step), is_due=True)
                timer.join()
            waits.append(manager.wait_seconds)
            names.append(names_in(folder))
        manager.publish(wait=True)
        manager.close()  # waits for deletions
    finally:
        logging.getLogger("grpo_mega.checkpoint.manager").removeHandler(handler)
    return waits, names, records


def test_a_second_save_waits_for_the_first_which_is_measured_and_logged_once(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path).checkpoints
    recorded = laboratory.recorded("qwen3")
    found = laboratory.pool.call(2, save_before_the_last_is_written, recorded, DP2, folder)
    for rank, (waits, names, records) in enumerate(found):
        assert waits[0] == 0
        assert [name[:11] for step in names for name in step if not name.endswith(".tmp")] == [
            "step_000001",
            "step_000002",
        ]
        assert sum("the run waits for" in record for record in records) == (1 if rank == 0 and any(waits) else 0)
    assert [path.name for path in folder.iterdir()] == ["step_000003"]


def fail_at_the_next_step(
    rank: int, recorded: Recorded, layout: Layout, folder: Path, before: str, after: str
) -> tuple[str, float, list[str]]:
    """Publish a checkpoint, then save while the writer of rank 1 fails; return error, its time, and the folders."""
    policy, manager = open_manager(rank, recorded, layout, folder)
    manager.stage_if_due(policy, LoopState(1, 1), is_due=True)
    manager.publish(wait=True)
    with HeldWriter(before if rank == 1 else "", after if rank == 1 else "") as held:
        manager.stage_if_due(policy, LoopState(2, 2), is_due=True)
        manager.publish(wait=False)
        held.release.set()
        begin = time.monotonic()
        while True:
            try:
                manager.stage_if_due(policy, LoopState(3, 3), is_due=False)
            except RuntimeError as error:
                return str(error), time.monotonic() - begin, names_in(folder)
            assert time.monotonic() < begin + 30, "the failure was not noticed"
            time.sleep(0.01)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_in_the_writer_of_one_rank_is_an_error_on_all_ranks_at_the_next_step(
    laboratory: Laboratory, tmp_path: Path, when: str
) -> None:
    folder = RunFolder(tmp_path).checkpoints
    texts = ("broken writer", "") if when == "before" else ("", "broken writer")
    recorded = laboratory.recorded("qwen3")
    for message, seconds, names in laboratory.pool.call(2, fail_at_the_next_step, recorded, TP2, folder, *texts):
        assert "step_000002.tmp cannot be written" in message
        assert "rank 1: ValueError: broken writer" in message
        assert seconds < 10
        assert names == ["step_000001"]
    require_undamaged(folder / "step_000001")


def stall(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> tuple[str, float]:
    """Save while the writer of rank 1 waits for ever; return the error and its time."""
    policy, manager = open_manager(rank, recorded, layout, folder, timeout_seconds=0.5 if rank == 1 else 60.0)
    with HeldWriter() as held, mock.patch.object(background_module, "_STOP_SECONDS", 0.1):
        if rank == 0:
            held.release.set()
        manager.stage_if_due(policy, LoopState(1, 1), is_due=True)
        begin = time.monotonic()
        try:
            manager.publish(wait=True)
        except RuntimeError as error:
            return str(error), time.monotonic() - begin
    return "", 0.0


def test_a_writer_that_makes_no_progress_is_an_error_and_not_a_hang(laboratory: Laboratory, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).checkpoints
    for message, seconds in laboratory.pool.call(2, stall, laboratory.recorded("qwen3"), DP2, folder):
        assert "rank 1: the file system has taken nothing for" in message
        assert 0.3 < seconds < 10
    assert RunFolder(tmp_path).complete_checkpoints() == {}


def write_other_values(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> str:
    """Change a copied tensor on rank 1 before it is written; return the error."""
    policy, manager = open_manager(rank, recorded, layout, folder)
    real = CopiedFiles.write

    def write(files: CopiedFiles, written: Any) -> None:
        if rank == 1:
            copies = [part for _, parts in files._files for part in parts if not isinstance(part, bytes)]
            copies[len(copies) // 2][0][3] ^= 4
        real(files, written)

    with mock.patch.object(CopiedFiles, "write", write):
        manager.stage_if_due(policy, LoopState(1, 1), is_due=True)
        try:
            manager.publish(wait=True)
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_bit_that_changes_in_the_copy_is_found(laboratory: Laboratory, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).checkpoints
    for message in laboratory.pool.call(2, write_other_values, laboratory.recorded("qwen3"), DP2, folder):
        assert "what was written is not the present state" in message
    assert RunFolder(tmp_path).complete_checkpoints() == {}


def save_until_it_fails(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> str:
    policy, manager = open_manager(rank, recorded, layout, folder, keep=9)
    for step in range(1, 9):
        try:
            manager.stage_if_due(policy, LoopState(step, step), is_due=True)
            manager.publish(wait=False)
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_full_disk_is_an_error_at_the_next_step(laboratory: Laboratory, small_disk: Path) -> None:
    folder = RunFolder(small_disk).checkpoints
    (message,) = laboratory.pool.call(1, save_until_it_fails, laboratory.recorded("qwen3"), ONE, folder)
    assert "cannot be written: its file system has" in message
    assert "No space left on device" in message
    complete = RunFolder(small_disk).complete_checkpoints()
    assert complete
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in complete.values()]
    for path in complete.values():
        require_undamaged(path)


def close_while_writing(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> tuple[float, bool]:
    """Close during a save, as a run does that fails on another rank; return the time, and if a thread is left."""
    policy, manager = open_manager(rank, recorded, layout, folder)
    with HeldWriter() as held:
        manager.stage_if_due(policy, LoopState(1, 1), is_due=True)
        held.release.set()
        begin = time.monotonic()
        manager.close()
        seconds = time.monotonic() - begin
    return seconds, any(thread.name == "checkpoint-writer" for thread in threading.enumerate())


def test_a_run_that_ends_leaves_no_writer(laboratory: Laboratory, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).checkpoints
    for seconds, is_left in laboratory.pool.call(2, close_while_writing, laboratory.recorded("qwen3"), DP2, folder):
        assert seconds < 5
        assert not is_left
    assert RunFolder(tmp_path).complete_checkpoints() == {}


def flush_to_a_broken_disk(
    rank: int, recorded: Recorded, layout: Layout, folder: Path, in_background: bool
) -> tuple[str, str, list[str]]:
    """Save while rank 1 cannot flush a file; return kind and text of the error, and the folders."""
    policy, manager = open_manager(rank, recorded, layout, folder, in_background=in_background)
    manager.stage_if_due(policy, LoopState(1, 1), is_due=True)
    manager.publish(wait=True)
    broken = OSError(errno.EIO, "Input/output error") if rank == 1 else None
    with mock.patch("grpo_mega.formats.background_flush.os.fsync", side_effect=broken):
        try:
            manager.stage_if_due(policy, LoopState(2, 2), is_due=True)
            manager.publish(wait=True)
        except RuntimeError as error:
            return type(error).__name__, str(error), names_in(folder)
    return "", "", []


@pytest.mark.parametrize("in_background", [False, True], ids=["waiting", "in background"])
def test_a_file_that_cannot_be_flushed_is_named_on_all_ranks_and_the_save_is_removed(
    laboratory: Laboratory, tmp_path: Path, in_background: bool
) -> None:
    folder, recorded = RunFolder(tmp_path).checkpoints, laboratory.recorded("qwen3")
    for kind, message, names in laboratory.pool.call(2, flush_to_a_broken_disk, recorded, DP2, folder, in_background):
        assert kind == "CheckpointWriteError"
        assert "rank 1: [Errno 5] Input/output error" in message
        assert "__1_0.distcp" in message or "__1_1.distcp" in message
        assert "earlier checkpoints are unchanged" in message
        assert names == ["step_000001"]
    require_undamaged(folder / "step_000001")


def save_beside_what_cannot_be_deleted(rank: int, recorded: Recorded, layout: Layout, folder: Path) -> list[list[str]]:
    """Save four times and keep one; old checkpoints cannot be deleted at first, and a kill left `.replaced`."""
    policy, manager = open_manager(rank, recorded, layout, folder, keep=2)
    seen, delete = [], shutil.rmtree

    def delete_others(path: Path, **options: Any) -> None:
        if path.name.startswith(".removed_"):
            raise OSError("in use")
        delete(path, **options)

    with mock.patch("grpo_mega.checkpoint.removal.shutil.rmtree", delete_others):
        for step in (1, 2, 3, 4):
            manager.stage_if_due(policy, LoopState(step, step), is_due=True)
            manager.publish(wait=True)
            seen.append(names_in(folder))
    if rank == 0:
        shutil.copytree(folder / "step_000004", folder / "step_000004.replaced")
    torch.distributed.barrier()
    manager.stage_if_due(policy, LoopState(5, 5), is_due=True)
    manager.publish(wait=True)
    manager.wait_for_removal()
    return [*seen, sorted(path.name for path in folder.iterdir())]


def test_a_checkpoint_that_cannot_be_deleted_or_was_replaced_changes_neither_the_next_saves_nor_what_is_kept(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    folder, recorded = RunFolder(tmp_path).checkpoints, laboratory.recorded("qwen3")
    names = [f"step_{step:06d}" for step in range(6)]
    for seen in laboratory.pool.call(2, save_beside_what_cannot_be_deleted, recorded, DP2, folder):
        assert seen == [names[1:2], names[1:3], names[2:4], names[3:5], names[4:6]]
