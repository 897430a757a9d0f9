"""Names of models and data sets on a Hugging Face hub, and the folders of a cache that hold them.

`ORGANIZATION/NAME` is a name on the hub only if no file or folder of this name exists. The cache has the layout of
`huggingface_hub`, which is not imported here. A download is complete when its record exists: a file with the names of
the downloaded files, written last. Asserted by tests/unit/config/test_hub_names.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from grpo_mega.types import UserError

HubKind = Literal["model", "dataset"]
HubPart = Literal["config", "small", "all"]
"""Downloaded part of a model: config.json; the tokenizer as well; the weights as well."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = frozenset((".arrow", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".safetensors", ".txt", ".yaml"))
# Routes of the hub's own site, and folders that the shipped configs use.
_FOLDERS = frozenset(("models", "datasets", "spaces", "data", "runs", "configs"))
_PARTS: tuple[HubPart, ...] = ("config", "small", "all")


def is_hub_name(path: str) -> bool:
    """Return True if `path` has the form ORGANIZATION/NAME, and no file or folder of this name exists."""
    if _NAME.fullmatch(path) is None or ".." in path or "--" in path:
        return False
    if path.partition("/")[0] in _FOLDERS or PurePosixPath(path).suffix in _FILE_SUFFIXES:
        return False
    return not os.path.exists(path)


def is_commit(revision: str | None) -> bool:
    """Return True for the hash of a commit, which always names the same files."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def hub_cache(env: Mapping[str, str] = os.environ) -> Path:
    """Return the cache folder that the variables of `huggingface_hub` name."""
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def hub_endpoint(env: Mapping[str, str] = os.environ) -> str:
    """Return the address of the hub: HF_ENDPOINT, by default huggingface.co."""
    return (env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline(env: Mapping[str, str] = os.environ) -> bool:
    """Return True if HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids connections."""
    value = env.get("HF_HUB_OFFLINE") or env.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def repository_folder(kind: HubKind, name: str) -> Path:
    """Return the cache folder of a repository; it need not exist."""
    return hub_cache() / f"{kind}s--{name.replace('/', '--')}"


def snapshot_folder(kind: HubKind, name: str, commit: str) -> Path:
    """Return the cache folder with the files of a commit; it need not exist."""
    return repository_folder(kind, name) / "snapshots" / commit


def record_file(kind: HubKind, name: str, commit: str, part: str) -> Path:
    """Return the path of the record of a complete download."""
    return repository_folder(kind, name) / "grpo_mega" / f"{commit}.{part.replace('/', '--')}.json"


def has_model(name: str, commit: str, part: HubPart) -> bool:
    """Return True if the cache holds this part of a model: a record exists, and the files that it names."""
    folder = snapshot_folder("model", name, commit)
    for larger in _PARTS[_PARTS.index(part) :]:
        record = read_record("model", name, commit, larger)
        if record is not None and all((folder / file).is_file() for file in record["files"]):
            return True
    return False


def read_record(kind: HubKind, name: str, commit: str, part: str) -> dict[str, Any] | None:
    """Return the record of a complete download, or None if there is none."""
    try:
        found: dict[str, Any] = json.loads(record_file(kind, name, commit, part).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def data_files(name: str, commit: str, config: str | None, split: str | None) -> list[Path]:
    """Return the cached files of one split of a data set.

    Raises:
        UserError: the split was not downloaded.
    """
    record = read_record("dataset", name, commit, data_part(config, split))
    folder = snapshot_folder("dataset", name, commit)
    files = [folder / file for file in record["files"]] if record is not None else []
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            f"{name}: config={config}, split={split} of commit {commit} is not in the cache {hub_cache()}",
            remedy="run `grpo-mega fetch CONFIG` first",
        )
    return files


def data_part(config: str | None, split: str | None) -> str:
    """Return the name of a record for one split of one configuration of a data set."""
    return f"{config or ''}.{split or ''}"
