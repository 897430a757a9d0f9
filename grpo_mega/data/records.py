"""Records of a data set with their position, from JSONL, Parquet, or a folder that `datasets` saved.

Records are read one after the other, so memory does not grow with the file. pyarrow is imported only for sets that need
it. The package `datasets` is never imported: its `save_to_disk` writes Arrow streams with a list of their names
(docs/decisions/data-formats.md has the measurement).
Asserted by tests/unit/data/test_records.py.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_mega.config.nearest_name import nearest_name
from grpo_mega.types import UserError

Record = tuple[str, dict[str, Any]]
"""The position of a record (`file:line`, `file:row 3`) and its content."""

_ROWS_AT_A_TIME = 1024


def read_records(path: Path, key: str, split: str | None) -> Iterator[Record]:
    """Yield the records of a file or folder.

    Args:
        path: a JSONL or Parquet file, a folder of Parquet files, or a folder that `datasets` saved.
        key: config key of the set, for messages.
        split: name of the split, for a folder with several splits.

    Raises:
        UserError: the file is missing or damaged, a line is not a JSON object, or `split` does not fit. The message
            names file and line.
    """
    if path.is_dir():
        yield from _folder_records(path, key, split)
        return
    if split is not None:
        raise UserError(f"{key}: split={split} has no effect on the file {path}", remedy="remove split")
    if not path.is_file():
        raise UserError(_missing(path, key))
    yield from _parquet_records(path, key) if path.suffix == ".parquet" else _jsonl_records(path, key)


def _missing(path: Path, key: str) -> str:
    if path.exists():
        return f"{key}={path} is neither a file nor a folder; give a JSONL or Parquet file"
    if "gsm8k" in path.parts and path.name in ("train.jsonl", "test.jsonl"):
        return (
            f"{key}={path}: no such file; put GSM8K's {path.name} there (grade_school_math/data/{path.name} of "
            f"openai/grade-school-math), or set {key} to where it is"
        )
    near = nearest_name(path.name, sorted(other.name for other in path.parent.glob("*")))
    if near is not None:
        return f"{key}={path}: no such file; did you mean {path.with_name(near)}?"
    return (
        f"{key}={path}: no such file; give a JSONL file with a prompt and an answer per line, the name of a data set "
        f"on the hub (ORGANIZATION/NAME), or arithmetic:train / arithmetic:heldout"
    )


def _jsonl_records(path: Path, key: str) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{path}:{number}", _parse(f"{path}:{number}", line)
    except OSError as error:
        raise UserError(f"{key}={path} cannot be read ({error.strerror})", remedy="make it readable") from error


def _parse(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, or nested too deeply
        raise UserError(f"{where}: not valid JSON ({error})", remedy="write one JSON object per line") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: a line must be a JSON object, got {type(record).__name__}",
            remedy="write one JSON object per line",
        )
    return record


def _parquet_records(path: Path, key: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches_as_records(path, file.iter_batches(batch_size=_ROWS_AT_A_TIME))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{key}={path}: the Parquet file cannot be read ({_first_line(error)})", remedy="write it again"
        ) from error


def _folder_records(folder: Path, key: str, split: str | None) -> Iterator[Record]:
    """Yield the records of a folder: of `Dataset.save_to_disk`, of `DatasetDict.save_to_disk`, or of Parquet files."""
    if (folder / "dataset_dict.json").is_file():
        folder, split = _split_folder(folder, key, split), None
    if split is not None:
        raise UserError(f"{key}: split={split} has no effect, {folder} contains one set", remedy="remove split")
    if (folder / "state.json").is_file():
        names = [entry["filename"] for entry in _read_list(folder / "state.json", key, "_data_files")]
        for name in names:
            yield from _arrow_records(folder / name, key)
        return
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise UserError(
            f"{key}={folder} contains neither state.json nor dataset_dict.json nor *.parquet",
            remedy="give a folder that `datasets` wrote with save_to_disk, a folder of Parquet files, or a file",
        )
    for path in files:
        yield from _parquet_records(path, key)


def _split_folder(folder: Path, key: str, split: str | None) -> Path:
    splits = _read_list(folder / "dataset_dict.json", key, "splits")
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        problem = f"split={split} is not one of" if split is not None else "split must name one of"
        raise UserError(
            f"{key}={folder}: {problem} {', '.join(splits)}", remedy=f"write [{{path: {folder}, split: {splits[0]}}}]"
        )
    return folder / str(split)


def _read_list(path: Path, key: str, name: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[name]
        if not (isinstance(found, list) and found):
            raise ValueError(f"{name} is {found!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}: {path} is damaged ({error})", remedy="save the dataset again") from error
    return found


def _arrow_records(path: Path, key: str) -> Iterator[Record]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            yield from _batches_as_records(path, stream)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{key}: the Arrow stream {path} cannot be read ({_first_line(error)})",
            remedy="save the dataset again",
        ) from error


def _batches_as_records(path: Path, batches: Any) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
            for record in batch.slice(start, _ROWS_AT_A_TIME).to_pylist():
                number += 1
                yield f"{path}:row {number}", record


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
