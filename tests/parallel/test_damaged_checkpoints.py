"""Ways to damage a checkpoint: each is named with the file, the checkpoint before it is used, nothing is lost."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from grpo_mega.checkpoint.manager import CheckpointManager, LoopState
from grpo_mega.checkpoint.verification import DAMAGED, verify_checkpoints
from grpo_mega.formats.checkpoint_manifest import COMPLETE, MANIFEST, DamagedCheckpointError, read_manifest
from grpo_mega.observe.run_folder import CheckpointsToVerify, RunFolder
from grpo_mega.trainer.phases import Phases
from grpo_mega.types import UserError
from tests.helpers.checkpointed_training import RATES, train_on
from tests.helpers.recorded_rollouts import ONE, Layout, Recorded, open_policy, ranks_of
from tests.parallel.conftest import Laboratory

MODEL = "a model"
FILES = (".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json", MANIFEST, COMPLETE)
Damage = Callable[[Path, random.Random], None]


def save_three(rank: int, recorded: Recorded, folder: Path) -> None:
    """Save steps 2, 3 and 4 with an update between them."""
    policy = open_policy(rank, recorded, Layout(2))
    phases = Phases(policy)
    manager = CheckpointManager(folder, 3, phases.checkpointing, is_first=rank == 0, model=MODEL)
    for step in (2, 3, 4):
        with phases.training():
            train_on(rank, policy, recorded, Layout(2), RATES[:1])
        manager.stage_if_due(policy, LoopState(step, step), is_due=True)
        manager.publish(wait=True)


@pytest.fixture(scope="module")
def whole_run(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with the checkpoints of steps 2, 3 and 4."""
    run = tmp_path_factory.mktemp("whole")
    laboratory.pool.call(2, save_three, laboratory.recorded("qwen3"), RunFolder(run).checkpoints)
    return run


def on(name: str, change: Callable[[Path, random.Random], None]) -> Damage:
    return lambda newest, rng: change(newest / name, rng)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def zero(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def as_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def as_loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def from_step_3(*names: str) -> Damage:
    def change(newest: Path, rng: random.Random) -> None:
        for name in names:
            shutil.copy(newest.parent / "step_000003" / name, newest / name)

    return change


def swap_shards(newest: Path, rng: random.Random) -> None:
    (newest / "__0_0.distcp").rename(newest / "x")
    (newest / "__1_0.distcp").rename(newest / "__0_0.distcp")
    (newest / "x").rename(newest / "__1_0.distcp")


def add_common(newest: Path, rng: random.Random) -> None:
    torch.save({"extra": {"step": 3}}, newest / "common.pt")


def add_shard(newest: Path, rng: random.Random) -> None:
    shutil.copy(newest / "__0_0.distcp", newest / "__2_0.distcp")


def replace_by(make: Callable[[Path], None]) -> Damage:
    def change(newest: Path, rng: random.Random) -> None:
        shutil.rmtree(newest)
        make(newest)

    return change


def only_marker(newest: Path) -> None:
    newest.mkdir()
    (newest / COMPLETE).touch()


def rewritten(**changes: object) -> Damage:
    """Return a damage that writes another manifest, with a marker that agrees with it."""

    def change(newest: Path, rng: random.Random) -> None:
        text = json.dumps(json.loads((newest / MANIFEST).read_text()) | changes).encode()
        (newest / MANIFEST).write_bytes(text)
        (newest / COMPLETE).write_text(xxhash.xxh3_128_hexdigest(text) + "\n")

    return change


DAMAGES: dict[str, tuple[Damage, str]] = {
    **{
        f"{change.__name__} {name}{number or ''}": (on(name, change), name if name != COMPLETE else "step_000004/")
        for name in FILES
        for change, times in ((delete, 1), (cut, 1), (empty, 1), (zero, 1), (garbage, 1), (append, 1), (flip_bit, 3))
        for number in range(times)
    },
    "shard 0 of step 3": (from_step_3("__0_0.distcp"), "__0_0.distcp"),
    "shard 1 of step 3": (from_step_3("__1_0.distcp"), "__1_0.distcp"),
    "metadata of step 3": (from_step_3(".metadata"), ".metadata"),
    "manifest of step 3": (from_step_3(MANIFEST), MANIFEST),
    "manifest and marker of step 3": (from_step_3(MANIFEST, COMPLETE), "step 3"),
    "everything of step 3": (from_step_3(*FILES), "step 3"),
    "swapped shards": (swap_shards, "__0_0.distcp"),
    "common.pt of another step": (add_common, "common.pt"),
    "a shard that is not listed": (add_shard, "__2_0.distcp"),
    "shard is a folder": (on("__0_0.distcp", as_folder), "__0_0.distcp"),
    "shard is a symlink loop": (on("__0_0.distcp", as_loop), "__0_0.distcp"),
    "manifest is a symlink loop": (on(MANIFEST, as_loop), "step_000004"),
    "marker is a folder": (on(COMPLETE, as_folder), "step_000004"),
    "marker in an empty folder": (replace_by(only_marker), MANIFEST),
    "empty folder": (replace_by(Path.mkdir), COMPLETE),
    "a file": (replace_by(Path.touch), "step_000004"),
    "symlink loop": (replace_by(lambda path: path.symlink_to(path)), "step_000004"),
    "dangling symlink": (replace_by(lambda path: path.symlink_to(path.parent / "nowhere")), "step_000004"),
    "newer format": (rewritten(format=2), "format=2"),
    "another model": (rewritten(model="another model"), "another model"),
    "manifest without files": (rewritten(files=None), MANIFEST),
    "manifest is a list": (rewritten(tensors=[1]), MANIFEST),
}


def verify(run: Path, model: str = MODEL) -> None:
    newest_first = tuple(reversed(RunFolder(run).all_checkpoints().values()))
    verify_checkpoints(CheckpointsToVerify(newest_first), model, ranks_of(0, ONE))


def test_there_are_more_than_60_ways() -> None:
    assert len(DAMAGES) >= 60


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_moved_aside_and_the_one_before_is_used(
    whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    damage, named = DAMAGES[name]
    damage(run / "checkpoints" / "step_000004", random.Random(name))
    with caplog.at_level(logging.WARNING):
        verify(run)
    assert "step_000004" in caplog.text
    assert named in caplog.text
    assert list(RunFolder(run).all_checkpoints()) == [2, 3]
    assert os.path.lexists(run / "checkpoints" / DAMAGED / "step_000004")
    caplog.clear()
    verify(run)
    assert caplog.text == ""


def test_a_renamed_checkpoint_is_named_and_the_newest_of_the_others_is_used(
    whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step_000002").rename(checkpoints / "step_000009")
    verify(tmp_path / "run")
    assert "step_000009: its name is not that of step 2" in caplog.text
    assert list(RunFolder(tmp_path / "run").all_checkpoints()) == [3, 4]


def test_several_damaged_checkpoints_of_one_step_are_kept(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for _ in range(2):
        (run / "checkpoints" / "step_000005").mkdir()
        verify(run)
    assert sorted(p.name for p in (run / "checkpoints" / DAMAGED).iterdir()) == ["step_000005", "step_000005-1"]


def test_a_run_without_a_whole_checkpoint_stops_with_every_reason_and_stays_as_it_is(
    whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for step in (2, 3, 4):
        flip_bit(run / "checkpoints" / f"step_{step:06d}" / "__0_0.distcp", random.Random(step))
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            verify(run)
        for step in (2, 3, 4):
            assert f"step_{step:06d}/__0_0.distcp: its digest differs" in caught.value.message
        assert "run.overwrite=true" in caught.value.remedy
        assert list(RunFolder(run).all_checkpoints()) == [2, 3, 4]


def test_the_checkpoint_that_the_user_named_is_not_replaced_by_another(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    named = tmp_path / "run" / "checkpoints" / "step_000004"
    wanted = CheckpointsToVerify((named,), named_by_user=True)
    verify_checkpoints(wanted, MODEL, ranks_of(0, ONE))
    flip_bit(named / "__1_0.distcp", random.Random(0))
    with pytest.raises(UserError, match=r"checkpoint\.resume=.*__1_0\.distcp: its digest differs"):
        verify_checkpoints(wanted, MODEL, ranks_of(0, ONE))
    assert named.is_dir()


def test_a_checkpoint_of_an_older_version_is_used_and_the_log_says_that_it_is_not_verified(
    whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    newest = run / "checkpoints" / "step_000004"
    (newest / MANIFEST).unlink()
    empty(newest / COMPLETE, random.Random())
    verify(run)
    assert list(RunFolder(run).all_checkpoints()) == [2, 3, 4]
    assert "has no manifest.json: an older version wrote it, so it cannot be verified" in caplog.text


def test_a_folder_without_permission_is_named(whole_run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        checkpoint = Path(folder) / "step_000004"
        shutil.copytree(whole_run / "checkpoints" / "step_000004", checkpoint)
        checkpoint.chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            with pytest.raises(DamagedCheckpointError, match=r"step_000004: cannot be read \(Permission denied\)"):
                read_manifest(checkpoint)
        finally:
            os.seteuid(user)
            checkpoint.chmod(0o755)
