"""Parquet files and folders of `datasets` give the same records as JSONL, and every defect has an error message."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_mega.config.data_sections import DataConfig
from grpo_mega.data.prompt_rows import check_rows, read_rows
from grpo_mega.data.records import read_records
from grpo_mega.types import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {i}", "answer": i, "level": i % 5, "extra": {"truth": f"t{i}"}} for i in range(3000)
]


def save_dataset(folder: Path, rows: list[dict[str, Any]], num_files: int = 2) -> Path:
    """Write a folder in the layout of `datasets.Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{num_files:05d}.arrow" for i in range(num_files)]
    per_file = -(-len(rows) // num_files)
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows[i * per_file : (i + 1) * per_file])
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def save_splits(folder: Path) -> Path:
    save_dataset(folder / "train", ROWS[:5], 1)
    save_dataset(folder / "test", ROWS[5:7], 1)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


def contents(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    return [record for _, record in read_records(path, "data.train", split)]


def test_parquet_and_datasets_folders_give_the_records_of_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=700)
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in range(3):
        pq.write_table(pa.Table.from_pylist(ROWS[i * 1000 : (i + 1) * 1000]), parts / f"train-0000{i}.parquet")
    saved = save_dataset(tmp_path / "saved", ROWS)
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet", parts, saved):
        assert contents(path) == ROWS, path


def test_a_record_has_its_position(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    places = [where for where, _ in read_records(tmp_path / "a.parquet", "data.train", None)]
    assert (places[0], places[2499]) == (f"{tmp_path}/a.parquet:row 1", f"{tmp_path}/a.parquet:row 2500")


def test_a_split_is_chosen_by_name(tmp_path: Path) -> None:
    folder = save_splits(tmp_path / "dict")
    assert contents(folder, "test") == ROWS[5:7]
    with pytest.raises(UserError, match=r"split must name one of train, test; write \[\{path: .*split: train\}\]"):
        contents(folder)
    with pytest.raises(UserError, match="split=tset is not one of train, test"):
        contents(folder, "tset")
    with pytest.raises(UserError, match=r"split=test has no effect"):
        contents(folder / "train", "test")


def test_folders_that_datasets_itself_saved_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.shuffle(seed=3).save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dict")
    assert contents(tmp_path / "one") == saved.shuffle(seed=3).to_list()
    assert contents(tmp_path / "dict") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 is not all", r"data\.train=.*a\.parquet: the Parquet file cannot be read"),
        ("a.parquet", b"", r"data\.train=.*a\.parquet: the Parquet file cannot be read"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b"\n", r"a\.jsonl:2: not valid JSON"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        contents(tmp_path / name)


def test_a_cut_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:40] + b"\0" * 400 + whole[440:])
    with pytest.raises(UserError, match=r"a\.parquet: the Parquet file cannot be read"):
        contents(tmp_path / "a.parquet")


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "saved", ROWS[:10])
    (folder / "data-00001-of-00002.arrow").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"Arrow stream .*data-00001-of-00002\.arrow cannot be read"):
        contents(folder)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"Arrow stream .*data-00001-of-00002\.arrow cannot be read"):
        contents(folder)
    for state in ("{", "[]", '{"_data_files": []}', '{"_data_files": 3}'):
        (folder / "state.json").write_text(state)
        with pytest.raises(UserError, match=r"state\.json is damaged \(.*save the dataset again"):
            contents(folder)


def rows_of(path: Path, **source: Any) -> list[Any]:
    config = DataConfig.model_validate({"train": [{"path": str(path), **source}]})
    check_rows(config)
    return list(read_rows(config.train_sets[0], "data.train[0].path", config))


def test_a_dotted_key_reads_nested_objects(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS[:3]), tmp_path / "a.parquet")
    assert [row.answer for row in rows_of(tmp_path / "a.parquet", answer_key="extra.truth")] == ["t0", "t1", "t2"]
    with pytest.raises(UserError, match=r"a\.parquet:row 1: key 'extra\.lie' was not found"):
        rows_of(tmp_path / "a.parquet", answer_key="extra.lie")


def test_filters_keep_the_rows_that_pass_all_of_them(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS[:10]), tmp_path / "a.parquet")
    filters = [{"key": "level", "min": 1, "max": 3}, {"key": "extra.truth", "any_of": ["t1", "t4", "t8"]}]
    kept = [row.answer for row in rows_of(tmp_path / "a.parquet", filters=filters) if row is not None]
    assert kept == ["1", "8"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hard", r"a\.jsonl:1: level='hard' must be a finite number"),
        (None, r"a\.jsonl:1: level=None must be a finite number"),
        (True, r"a\.jsonl:1: level=True must be a finite number"),
        (float("nan"), r"a\.jsonl:1: level=nan must be a finite number"),
    ],
)
def test_a_filter_on_a_value_that_is_not_a_number_names_the_row(value: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "answer": "a", "level": value}))
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / "a.jsonl", filters=[{"key": "level", "max": 2}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: key 'lvl' .* \['answer', 'level', 'prompt'\]; correct"):
        rows_of(tmp_path / "a.jsonl", filters=[{"key": "lvl", "max": 2}])


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return the content with a few bytes changed, removed or added, or without its end."""
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(content) + 1)
        noise = bytes(rng.randrange(256) for _ in range(rng.randint(1, 6)))
        kept = rng.choice((content[at + len(noise) :], content[at + 30 :], content[at:], b""))
        content = content[:at] + rng.choice((noise, b"")) + kept
    return content


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_every_defect_of_a_file_is_a_user_error_that_names_it(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "answer": str(i), "level": i} for i in range(20)]
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    whole, rng = path.read_bytes(), random.Random(0)
    messages = []
    for _ in range(300):
        path.write_bytes(mutated(whole, rng))
        try:
            rows_of(path, filters=[{"key": "level", "max": 10}])
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all(str(path) in message for message in messages)


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8-sig")
    assert [record["prompt"] for _, record in read_records(path, "data.train", None)] == ["a", "b"]
