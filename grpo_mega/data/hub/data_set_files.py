"""The choice of the files of one split of a data set, by the rules of the package `datasets`.

The rules need the names of all files, the README and the old `dataset_infos.json`, but no data: they are applied to a
temporary folder of empty files with these names.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from grpo_mega.data.hub.repository import HubRepository
from grpo_mega.types import UserError

_DESCRIPTIONS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_FORMATS = (".parquet", ".jsonl", ".json")


def split_files(repository: HubRepository, config: str | None, split: str | None) -> list[str]:
    """Return the names of the files of a split. The description of the data set is downloaded for it.

    Args:
        repository: of the data set.
        config: name of the configuration; None: the data set has one, or a default.
        split: name of the split; None: the configuration has one.

    Raises:
        UserError: there is no such configuration or split, or its format is not supported.
    """
    known = [name for name in _DESCRIPTIONS if name in repository.sizes]
    repository.download(known)
    with tempfile.TemporaryDirectory(prefix="data_set_") as work:
        folder = (Path(work) / "data").resolve()
        for name in repository.sizes:
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((repository.folder / name).read_bytes() if name in known else b"")
        files_of_splits = _resolve(repository, folder, config)
    where = f"{repository.key}={repository.name}"
    if split is None and len(files_of_splits) == 1:
        (split,) = files_of_splits
    if split not in files_of_splits:
        problem = f"split={split} is not one of" if split is not None else "split must name one of"
        raise UserError(
            f"{where}: {problem} {', '.join(files_of_splits)}",
            remedy=f"write [{{path: {repository.name}, {_given(config)}split: {next(iter(files_of_splits))}}}]",
        )
    names = files_of_splits[str(split)]
    if wrong := [name for name in names if not name.endswith(_FORMATS)]:
        raise UserError(
            f"{where}: the format of {wrong[0]} is not supported; {', '.join(_FORMATS)} are",
            remedy="save the set with the package `datasets` (save_to_disk), and give the folder",
        )
    return names


def _resolve(repository: HubRepository, folder: Path, config: str | None) -> dict[str, list[str]]:
    """Return split -> names of its files."""
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    where = f"{repository.key}={repository.name}"
    try:
        names = datasets.get_dataset_config_names(str(folder))
        default = datasets.get_dataset_default_config_name(str(folder))
        if config is None and default is None and len(names) > 1:
            raise _wrong_config(where, "config must name", repository.name, names)
        if config is not None and config not in names:
            raise _wrong_config(where, f"config={config} is not", repository.name, names)
        builder = datasets.load_dataset_builder(str(folder), name=config, cache_dir=str(folder.parent / "cache"))
        found: Any = builder.config.data_files
    except UserError:
        raise
    except Exception as error:  # `datasets` raises exceptions of many kinds for a folder that it cannot read
        reason = str(error).replace(str(folder), repository.name).split("\n", 1)[0]
        raise UserError(
            f"{where}: the package `datasets` finds no data files in it ({reason})",
            remedy="name a data set of Parquet or JSONL files",
        ) from error
    return {
        str(split): [str(Path(file).resolve().relative_to(folder)) for file in files] for split, files in found.items()
    }


def _wrong_config(where: str, problem: str, name: str, configs: list[str]) -> UserError:
    return UserError(
        f"{where}: {problem} one of {', '.join(configs)}",
        remedy=f"write [{{path: {name}, config: {configs[0]}, split: train}}]",
    )


def _given(config: str | None) -> str:
    return f"config: {config}, " if config is not None else ""
