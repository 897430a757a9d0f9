"""Reading of steps: order, damaged and missing parts, other versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grpo_mega.observe.rollout_files import part_writer
from grpo_mega.observe.rollout_files.column_table import SCHEMA, SCHEMA_VERSION
from grpo_mega.observe.rollout_files.part_writer import write_part
from grpo_mega.observe.rollout_files.reader import read_rows, read_step, steps_of
from grpo_mega.types import UserError
from tests.helpers.step_columns import columns_of, write_step

ROWS = ([{"group": 1, "member": 1}, {"group": 1, "member": 0}], [{"group": 0, "member": 0}])


def test_rows_of_all_parts_are_in_the_order_of_group_and_member(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 12, *ROWS)
    assert [(row["group"], row["member"]) for row in read_rows(folder)] == [(0, 0), (1, 0), (1, 1)]
    assert read_step(folder, ["group", "member", "reward"]).table.column_names == ["group", "member", "reward"]
    assert [row["group"] for row in read_rows(folder / "part-00001.parquet")] == [0]


def test_a_damaged_part_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 12, *ROWS)
    path = folder / "part-00000.parquet"
    whole = path.read_bytes()
    for damage in (b"", b"PAR1", whole[: len(whole) // 2], bytes(len(whole))):
        path.write_bytes(damage)
        found = read_step(folder)
        (problem,) = found.problems
        assert f"{path} is damaged (" in problem
        assert [row["group"] for row in found.rows()] == [0]
        with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
            read_rows(folder)


def test_a_flipped_bit_that_zstd_does_not_notice_is_found(tmp_path: Path) -> None:
    """The mantissas of log-probs are stored as they are: only the checksum of the page differs."""
    rng = np.random.default_rng(0)
    values = np.log(rng.uniform(1e-3, 1.0, 4000)).astype(np.float32).tolist()
    tokens = {"completion_ids": [7] * 4000, "old_log_probs": None}
    folder = write_step(tmp_path, 12, [tokens | {"sampler_log_probs": values}])
    path = folder / "part-00000.parquet"
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(SCHEMA.names.index("sampler_log_probs") + 1)
    assert column.path_in_schema == "sampler_log_probs.list.element"
    position = column.data_page_offset + column.total_compressed_size // 3
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    unnoticed = pq.ParquetFile(path, page_checksum_verification=False).read()
    assert sum(a != b for a, b in zip(unnoticed["sampler_log_probs"][0].as_py(), values, strict=True)) == 1
    (problem,) = read_step(folder).problems
    assert "part-00000.parquet is damaged" in problem


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 12, *ROWS)
    (folder / "part-00000.parquet").unlink()
    found = read_step(folder)
    assert found.problems == (f"{folder / 'part-00000.parquet'} is missing: the step has 2 parts",)
    assert found.table.num_rows == 1


def test_a_temporary_file_is_not_a_part(tmp_path: Path) -> None:
    folder = write_step(tmp_path, 12, *ROWS)
    (folder / "part-00000.parquet").rename(folder / "part-00000.parquet.tmp")
    assert len(read_step(folder).problems) == 1
    (folder / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match="has no complete part"):
        read_step(folder)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_part_of_an_older_or_newer_version_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    other = SCHEMA_VERSION + change
    monkeypatch.setattr(part_writer, "SCHEMA_VERSION", other)
    write_part(tmp_path, 0, 1, columns_of({}))
    (problem,) = read_step(tmp_path).problems
    assert f"version {other} of the columns; this program reads version {SCHEMA_VERSION}" in problem


def test_a_parquet_file_of_another_program_is_named(tmp_path: Path) -> None:
    pq.write_table(read_step(write_step(tmp_path, 1, [{}])).table.select(["reward"]), tmp_path / "part-00000.parquet")
    (problem,) = read_step(tmp_path).problems
    assert "version unknown of the columns" in problem


def test_rollouts_of_an_older_version_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "step_000012.jsonl").write_text("{}\n")
    for read in (lambda: steps_of(tmp_path), lambda: read_step(tmp_path / "step_000012")):
        with pytest.raises(UserError, match=r"step_000012\.jsonl was written by an older version"):
            read()


def test_the_steps_of_a_folder(tmp_path: Path) -> None:
    assert steps_of(tmp_path / "rollouts") == []
    for step in (2, 1_000_000, 10):
        write_step(tmp_path, step, [{}])
    (tmp_path / "rollouts" / "step_000003.jsonl").write_text("")
    (tmp_path / "rollouts" / "notes").mkdir()
    assert steps_of(tmp_path / "rollouts") == [2, 10, 1_000_000]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step_000001 was not found"):
        read_step(tmp_path / "step_000001")
