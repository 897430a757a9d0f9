"""Models and data sets of a config that are named on a hub: their commits, and their files in the cache.

A run continues with the commits that its run folder records. One process of a machine downloads; the others wait for a
lock, and then find the files. Asserted by tests/unit/data/hub/test_fetch.py.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.config.data_sections import DataConfig, DataSource
from grpo_mega.config.hub_names import (
    HubKind,
    HubPart,
    data_part,
    has_model,
    hub_cache,
    is_commit,
    is_offline,
    read_record,
    record_file,
    repository_folder,
    snapshot_folder,
)
from grpo_mega.config.model_sections import ModelConfig
from grpo_mega.config.schema import Config
from grpo_mega.data.hub.repository import HubRepository, find_repository, remember_revision
from grpo_mega.types import UserError


def with_hub_inputs(config: Config, *, part: HubPart = "all", with_data: bool = True) -> Config:
    """Return the config with the commit of each model and data set of the hub, whose files are then in the cache.

    Args:
        config: the checked config. One without names on a hub is returned as it is.
        part: part of the model that is needed.
        with_data: False leaves the data sets out.

    Raises:
        UserError: a name, revision, configuration, split or file was not found, access is denied, or the hub does not
            answer.
    """
    sources = (*config.data.train_sets, *config.data.eval_sets) if with_data else ()
    if not config.model.is_on_hub and not any(source.is_on_hub for source in sources):
        return config
    recorded = _recorded_config(config)
    model, data = config.model, config.data
    if model.is_on_hub:
        model = fetch_model(_with_recorded_model(model, recorded), part)
    if with_data:
        data = _fetch_data(data, recorded)
    return config.model_copy(update={"model": model, "data": data})


def pinned_overrides(config: Config) -> list[str]:
    """Return overrides `section.key=value` that name the commits of `with_hub_inputs` for other processes."""
    found = []
    if config.model.is_on_hub:
        found.append(f"model.revision={json.dumps(config.model.revision)}")
    for name, sources in (("train", config.data.train_sets), ("eval", config.data.eval_sets)):
        if any(source.is_on_hub for source in sources):
            values = [source.model_dump(mode="json", exclude_defaults=True) for source in sources]
            found.append(f"data.{name}={json.dumps(values)}")
    return found


def fetch_model(model: ModelConfig, part: HubPart) -> ModelConfig:
    """Return the section with the commit of its model, after a download of what the cache lacks.

    Raises:
        UserError: see `with_hub_inputs`.
    """
    name, revision = str(model.path), model.revision
    if revision is not None and is_commit(revision) and has_model(name, revision, part):
        return model
    repository = find_repository("model.path", "model", name, revision)
    if is_offline() and has_model(name, repository.commit, part):  # the cache may be read-only
        return model.model_copy(update={"revision": repository.commit})
    with _one_process("model", name):
        if not has_model(name, repository.commit, part):
            from grpo_mega.data.hub.model_files import model_files

            files = model_files(repository, part)
            repository.download(files)
            _write_record(repository, part, files)
        remember_revision(repository, revision)
    return model.model_copy(update={"revision": repository.commit})


def _fetch_data(data: DataConfig, recorded: dict[str, Any]) -> DataConfig:
    update = {}
    for name, sources in (("train", data.train_sets), ("eval", data.eval_sets)):
        if any(source.is_on_hub for source in sources):
            is_list = not isinstance(getattr(data, name), str)
            update[name] = tuple(
                _fetch_set(
                    f"data.{name}[{i}].path" if is_list else f"data.{name}",
                    _with_recorded_set(source, (recorded.get("data") or {}).get(name)),
                )
                if source.is_on_hub
                else source
                for i, source in enumerate(sources)
            )
    return data.model_copy(update=update)


def _fetch_set(key: str, source: DataSource) -> DataSource:
    name, revision = source.path, source.revision
    part = data_part(source.config, source.split)
    if revision is not None and is_commit(revision) and _has_set(name, revision, part):
        return source
    repository = find_repository(key, "dataset", name, revision)
    if is_offline() and _has_set(name, repository.commit, part):  # as above
        return source.model_copy(update={"revision": repository.commit})
    with _one_process("dataset", name):
        if not _has_set(name, repository.commit, part):
            from grpo_mega.data.hub.data_set_files import split_files

            files = split_files(repository, source.config, source.split)
            repository.download(files)
            _write_record(repository, part, files)
        remember_revision(repository, revision)
    return source.model_copy(update={"revision": repository.commit})


def _has_set(name: str, commit: str, part: str) -> bool:
    record = read_record("dataset", name, commit, part)
    folder = snapshot_folder("dataset", name, commit)
    return record is not None and all((folder / file).is_file() for file in record["files"])


def _recorded_config(config: Config) -> dict[str, Any]:
    """Return the resolved config of the run folder, or {}; a damaged one is reported when the run starts."""
    path = Path(str(config.run.dir)) / "config.yaml"
    if config.run.overwrite or not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_recorded_model(model: ModelConfig, recorded: dict[str, Any]) -> ModelConfig:
    """Return the section with the commit with which the run began, unless the command names a revision."""
    before = recorded.get("model") or {}
    if model.revision is None and before.get("path") == model.path and is_commit(before.get("revision")):
        return model.model_copy(update={"revision": before["revision"]})
    return model


def _with_recorded_set(source: DataSource, recorded: object) -> DataSource:
    sets: Sequence[Any] = recorded if isinstance(recorded, list) else ()
    for before in sets:
        same = isinstance(before, dict) and all(
            before.get(name) == getattr(source, name) for name in ("path", "config", "split")
        )
        if same and source.revision is None and is_commit(before.get("revision")):
            return source.model_copy(update={"revision": before["revision"]})
    return source


@contextmanager
def _one_process(kind: HubKind, name: str) -> Iterator[None]:
    """Hold the lock of a repository, which the system releases when the process exits."""
    folder = repository_folder(kind, name) / "grpo_mega"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"HF_HUB_CACHE={hub_cache()}: the cache cannot be written ({error.strerror})",
            remedy="set HF_HOME to a writable folder",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_record(repository: HubRepository, part: str, files: Sequence[str]) -> None:
    path = record_file(repository.kind, repository.name, repository.commit, part)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"files": list(files)}))
    temporary.rename(path)
