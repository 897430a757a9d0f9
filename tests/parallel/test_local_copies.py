"""Local checkpoints: each of two machines has a folder of its own; the newest that both hold whole is used, or said."""

from __future__ import annotations

import logging
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mega.checkpoint.local_copies import copy_newest, local_folder, open_local_folder
from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.checkpoint.verification import DAMAGED
from grpo_mega.formats.checkpoint_manifest import COMPLETE, MANIFEST, require_undamaged
from grpo_mega.observe.run_folder import RunFolder
from grpo_mega.parallel.ranks import Ranks
from grpo_mega.parallel.topology import Topology
from grpo_mega.trainer.phases import Phases
from grpo_mega.types import CheckpointWriteError
from tests.helpers.checkpointed_training import RATES, state_bytes, train_on
from tests.helpers.recorded_rollouts import Layout, Recorded, open_policy
from tests.parallel.conftest import Laboratory

MODEL, LAYOUT = "a model", Layout(2, tp=2)


def ranks_of(rank: int) -> Ranks:
    topology = Topology(2)
    return Ranks(topology, topology.coordinates(rank), torch.device("cpu"))


def save(rank: int, recorded: Recorded, root: Path) -> tuple[list[bytes], list[str], list[list[str]]]:
    """Save step 1 in the run folder and steps 2 and 3 locally; return the state of step 3, and what is visible."""
    run = RunFolder(root / "run")
    policy = open_policy(rank, recorded, LAYOUT)
    phases = Phases(policy)
    local_dir = root / f"machine_{rank}"
    folder = open_local_folder(local_dir, run, ranks_of(rank), leads=True)
    shared = CheckpointManager(run.checkpoints, 2, phases.checkpointing, is_first=rank == 0, model=MODEL)
    local = CheckpointManager(folder, 1, phases.checkpointing, is_first=True, model=MODEL, each_machine=True)
    visible = []
    for step, manager in ((1, shared), (2, local), (3, local)):
        with phases.training():
            train_on(rank, policy, recorded, LAYOUT, RATES[:1])
            state = state_bytes(policy)
        manager.stage_if_due(policy, LoopState(step, step), is_due=True)
        manager.publish(wait=True)
        visible.append(sorted(path.name for path in folder.glob("step_*")))
    local.close()  # waits for the deletion of step 2
    assert [path.name for path in folder.iterdir()] == ["step_000003"]
    return state, sorted(path.name for path in (folder / "step_000003").iterdir()), visible


def find(rank: int, root: Path) -> list[str]:
    """Look for a local checkpoint as a run that continues; return what the log says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("grpo_mega.checkpoint.local_copies")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    copy_newest(root / f"machine_{rank}", RunFolder(root / "run"), MODEL, ranks_of(rank), leads=True)
    logger.removeHandler(handler)
    return lines


def find_without_space(rank: int, root: Path) -> str:
    """Look for a local checkpoint while no file of more than 1000 bytes can be written; return the error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointWriteError) as raised:
            find(rank, root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(raised.value)


def load(rank: int, recorded: Recorded, checkpoint: Path) -> tuple[LoopState, list[bytes]]:
    policy = open_policy(rank, recorded, LAYOUT)
    phases = Phases(policy)
    state = CheckpointManager(checkpoint.parent, 2, phases.checkpointing, is_first=rank == 0).load(policy, checkpoint)
    with phases.training():
        return state, state_bytes(policy)


Saved = tuple[Path, list[Any]]


@pytest.fixture(scope="module")
def saved(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("saved")
    (root / "run").mkdir()
    return root, laboratory.pool.call(2, save, laboratory.recorded("qwen3"), root)


def test_each_machine_holds_the_files_of_its_ranks_and_the_newest_step_only(saved: Saved) -> None:
    _, ranks = saved
    for rank, (_, names, visible) in enumerate(ranks):
        assert names == sorted([".metadata", f"__{rank}_0.distcp", COMPLETE, MANIFEST, "metadata.json"])
        assert visible == [[], ["step_000002"], ["step_000003"]]


def test_the_newest_local_checkpoint_is_copied_from_all_machines_and_is_the_state_that_was_saved(
    saved: Saved, laboratory: Laboratory, tmp_path: Path
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    rename_place(saved[0], tmp_path)
    (lines, _) = laboratory.pool.call(2, find, tmp_path)
    checkpoint = RunFolder(tmp_path / "run").checkpoint_of(3)
    assert lines == [f"the local checkpoint of step 3 was copied to {checkpoint}"]
    require_undamaged(checkpoint)
    loaded = laboratory.pool.call(2, load, laboratory.recorded("qwen3"), checkpoint)
    for (state, now), (before, _, _) in zip(loaded, saved[1], strict=True):
        assert (state.step, state.policy_version) == (3, 3)
        assert now == before
    again = laboratory.pool.call(2, find, tmp_path)
    assert "no machine holds a local checkpoint after step 3" in again[0][0]


def rename_place(before: Path, now: Path) -> None:
    """Give the local folders the name that belongs to the copied run folder."""
    number = (now / "run" / "local_id").read_text()
    for rank in (0, 1):
        machine = now / f"machine_{rank}"
        old = local_folder(machine, RunFolder(before / "run"), number).parent
        old.rename(local_folder(machine, RunFolder(now / "run"), number).parent)


def test_a_local_checkpoint_that_cannot_be_copied_is_kept_and_the_error_names_it_and_the_one_before(
    saved: Saved, laboratory: Laboratory, tmp_path: Path
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    rename_place(saved[0], tmp_path)
    run = RunFolder(tmp_path / "run")
    messages = laboratory.pool.call(2, find_without_space, tmp_path)
    for rank, message in enumerate(messages):
        local = local_folder(tmp_path / f"machine_{rank}", run, run.local_id.read_text()) / "step_000003"
        assert message.startswith(f"the local checkpoint of step 3 cannot be copied to {run.checkpoint_of(3)}: ")
        assert "File too large" in message
        assert f"it is unchanged in {local} of each machine" in message
        assert message.endswith("to continue from the checkpoint of step 1 in the run folder instead")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000001"]
    (line,) = laboratory.pool.call(2, find, tmp_path)[0]
    assert line == f"the local checkpoint of step 3 was copied to {run.checkpoint_of(3)}"
    require_undamaged(run.checkpoint_of(3))


@pytest.mark.parametrize("damaged_step", [3, 4])
def test_a_local_checkpoint_is_used_if_those_of_the_run_folder_that_are_as_new_are_damaged(
    saved: Saved, laboratory: Laboratory, tmp_path: Path, damaged_step: int
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    rename_place(saved[0], tmp_path)
    run = RunFolder(tmp_path / "run")
    shutil.copytree(run.checkpoint_of(1), run.checkpoint_of(damaged_step))  # of another step than its name says
    line = laboratory.pool.call(2, find, tmp_path)[0][-1]
    assert line == f"the local checkpoint of step 3 was copied to {run.checkpoint_of(3)}"
    require_undamaged(run.checkpoint_of(3))
    assert sorted(run.all_checkpoints()) == [1, 3]
    assert [path.name for path in (run.checkpoints / DAMAGED).iterdir()] == [f"step_{damaged_step:06d}"]


def lose_machine(folder: Path) -> None:
    shutil.rmtree(folder.parent)


def lose_step(folder: Path) -> None:
    shutil.rmtree(folder / "step_000003")


def flip_bit(folder: Path) -> None:
    path = folder / "step_000003" / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_shard(folder: Path) -> None:
    (folder / "step_000003" / "__1_0.distcp").unlink()


def lose_marker(folder: Path) -> None:
    (folder / "step_000003" / COMPLETE).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lose_machine, "has no part of it"),
        (lose_step, "has no part of it"),
        (flip_bit, "__1_0.distcp: its digest differs from the one in manifest.json (on "),
        (lose_shard, "no machine has its file __1_0.distcp"),
        (lose_marker, "complete: is missing, so the checkpoint is not complete (on "),
    ],
)
def test_a_local_checkpoint_that_is_not_whole_is_not_used_and_the_log_says_why(
    saved: Saved, laboratory: Laboratory, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    rename_place(saved[0], tmp_path)
    run = RunFolder(tmp_path / "run")
    damage(local_folder(tmp_path / "machine_1", run, run.local_id.read_text()))
    ((line,), _) = laboratory.pool.call(2, find, tmp_path)
    assert line.startswith("the local checkpoint of step 3 is not used: ")
    assert "or from the checkpoint of step 1 in the run folder" in line
    assert reason in line
    assert sorted(run.all_checkpoints()) == [1]


def test_the_local_checkpoints_of_another_run_in_the_same_place_are_removed_and_never_used(
    saved: Saved, laboratory: Laboratory, tmp_path: Path
) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    rename_place(saved[0], tmp_path)
    run = RunFolder(tmp_path / "run")
    run.local_id.unlink()  # as in a run folder that was moved aside and made again
    assert laboratory.pool.call(2, find, tmp_path) == [[], []]
    laboratory.pool.call(2, open_only, tmp_path)
    for rank in (0, 1):
        (place,) = (tmp_path / f"machine_{rank}").iterdir()
        assert [path.name for path in place.iterdir()] == [run.local_id.read_text()]
        assert not list(place.rglob("step_*"))


def open_only(rank: int, root: Path) -> None:
    open_local_folder(root / f"machine_{rank}", RunFolder(root / "run"), ranks_of(rank), leads=True)


@pytest.mark.parametrize("content", ["", "../other", "0123456789abcdef\n"])
def test_a_damaged_number_of_a_run_is_replaced_and_other_data_of_the_disk_are_kept(
    laboratory: Laboratory, tmp_path: Path, content: str
) -> None:
    """Such as the empty file of a start on a full disk."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.local_id.write_text(content)
    others = [tmp_path / f"machine_{rank}" / "of_others" for rank in (0, 1)]
    for folder in others:
        folder.mkdir(parents=True)
    laboratory.pool.call(2, open_only, tmp_path)
    assert all(folder.is_dir() for folder in others)
    assert re.fullmatch("[0-9a-f]{16}", run.local_id.read_text())


def test_a_folder_that_two_machines_share_and_one_that_cannot_be_made_are_named(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    shared, impossible = laboratory.pool.call(2, open_wrong, tmp_path)[1]
    assert shared == (
        f"checkpoint.local_dir={tmp_path / 'one'}: rank 0: is the same folder on several machines; name a folder of a "
        "disk or the memory of each machine"
    )
    assert impossible.startswith(
        f"checkpoint.local_dir={tmp_path / 'file'}: rank 0: cannot be written (Not a directory)"
    )


def open_wrong(rank: int, root: Path) -> list[str]:
    messages = []
    for name in ("one", "file"):
        with pytest.raises(RuntimeError) as raised:
            open_local_folder(root / name, RunFolder(root / "run"), ranks_of(rank), leads=True)
        messages.append(str(raised.value))
    return messages
