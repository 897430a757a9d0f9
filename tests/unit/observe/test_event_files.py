"""Event files are cut at a step, and read whole by TensorBoard afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_mega.observe.event_files import cut_event_files
from grpo_mega.observe.tensorboard import TensorBoardWriter


def write_steps(folder: Path, first: int, last: int) -> None:
    writer = TensorBoardWriter(folder, first_step=first)
    for step in range(first, last + 1):
        writer.write(step, {"reward/mean": float(first)})
    writer.close()


def read_steps(folder: Path) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    found.Reload()
    return [(point.step, point.value) for point in found.Scalars("reward/mean")]


def test_events_from_the_first_step_on_are_removed(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    assert cut_event_files(tmp_path, 4)["reward/mean"] == 3
    assert read_steps(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_a_run_that_is_rolled_back_over_several_commands_is_one_curve_without_tensorboards_own_rule(
    tmp_path: Path,
) -> None:
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, 4, 8)
    write_steps(tmp_path, 3, 4)  # the checkpoints of the steps 3 to 8 were damaged
    assert read_steps(tmp_path) == [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0)]


def test_an_older_file_without_such_events_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, 1, 2)
    write_steps(tmp_path, 3, 4)
    (old, _) = sorted(tmp_path.iterdir())
    old.write_bytes(b"never read")
    assert cut_event_files(tmp_path, 5)["reward/mean"] == 4
    assert old.read_bytes() == b"never read"


def test_an_incomplete_record_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for missing in (1, 20, 60):
        path.write_bytes(whole[:-missing])
        cut_event_files(tmp_path, 4)
        data = path.read_bytes()
        assert data == whole[: len(data)]
        assert read_steps(tmp_path) in ([(1, 1.0), (2, 1.0)], [(1, 1.0)])


def test_a_file_that_needs_no_cut_keeps_its_bytes_and_no_temporary_file_stays(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    (tmp_path / f"{path.name}.tmp").write_bytes(b"of a killed process")
    cut_event_files(tmp_path, 4)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_folder_that_does_not_exist_has_nothing_to_cut(tmp_path: Path) -> None:
    assert cut_event_files(tmp_path / "new", 1) == {}
