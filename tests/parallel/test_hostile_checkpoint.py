"""A checkpoint with a pickle that calls something is rejected by the trainer's loader, and nothing is called."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from grpo_mega.types import UserError
from tests.helpers.checkpointed_training import RATES, train_on
from tests.helpers.recorded_rollouts import ONE, Recorded, open_policy
from tests.parallel.conftest import Laboratory


class Touch:
    """An object that is pickled as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._path),)


def in_metadata(folder: Path, touch: Touch) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(touch))


def in_common(folder: Path, touch: Touch) -> None:
    torch.save({"extra": touch}, folder / "common.pt")


def in_record(name: str) -> Callable[[Path, Touch], None]:
    """Return a function that replaces the stored object or tensor `name` by a malicious pickle."""

    def plant(folder: Path, touch: Touch) -> None:
        found = pickle.loads((folder / ".metadata").read_bytes())
        index = next(each for each in found.storage_data if each.fqn == name)
        record = io.BytesIO()
        torch.save([touch], record)
        shard = folder / found.storage_data[index].relative_path
        begin = shard.stat().st_size
        with shard.open("ab") as file:
            file.write(record.getvalue())
        found.storage_data[index] = _StorageInfo(shard.name, begin, len(record.getvalue()))
        (folder / ".metadata").write_bytes(pickle.dumps(found))

    return plant


PLACES = {
    ".metadata": in_metadata,
    "common.pt": in_common,
    "object in a shard": in_record("common_state/shard_0_1"),
    "weight in a shard": in_record("decoder.final_layernorm.weight"),
    "moment in a shard": in_record("optimizer.state.exp_avg.decoder.final_layernorm.weight"),
}


def save(rank: int, recorded: Recorded, folder: Path) -> None:
    policy = open_policy(rank, recorded, ONE)
    train_on(rank, policy, recorded, ONE, RATES[:1])
    policy.save(folder, {"step": 1})


def load_each(rank: int, recorded: Recorded, folders: list[Path]) -> list[str]:
    """Return the error of each load, with torch's protection disabled by its environment variable."""
    policy = open_policy(rank, recorded, ONE)
    errors = []
    for folder in folders:
        with mock.patch.dict(os.environ, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}):
            try:
                policy.load(folder)
            except UserError as error:
                errors.append(str(error))
            else:
                errors.append("")
    return errors


def test_no_pickle_in_any_file_of_a_checkpoint_is_executed(laboratory: Laboratory, tmp_path: Path) -> None:
    recorded, whole, executed = laboratory.recorded("qwen3"), tmp_path / "whole", tmp_path / "executed"
    whole.mkdir()
    laboratory.pool.call(1, save, recorded, whole)
    folders = []
    for place, plant in PLACES.items():
        folder = tmp_path / place
        shutil.copytree(whole, folder)
        plant(folder, Touch(executed))
        folders.append(folder)
    ((*errors, fine),) = laboratory.pool.call(1, load_each, recorded, [*folders, whole])
    assert not executed.exists()
    assert fine == ""
    for place, error in zip(PLACES, errors, strict=True):
        assert str(place) in error, (place, error)
        assert "cannot be read" in error
        assert "mkdir" in error


def test_the_planted_pickles_are_executed_by_an_unrestricted_reader(laboratory: Laboratory, tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    in_metadata(tmp_path, Touch(executed))
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert executed.exists()
    executed.rmdir()
    in_common(tmp_path, Touch(executed))
    torch.load(tmp_path / "common.pt", weights_only=False)
    assert executed.exists()
