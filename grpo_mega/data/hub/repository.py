"""A repository of a Hugging Face hub at one commit: the names of its files, and their download into the cache.

A token is read from HF_TOKEN only, and is never written. Weights and data are read from safetensors, Parquet and JSONL,
so no file that could run code is downloaded. Asserted by tests/unit/data/hub/test_fetch.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grpo_mega.config.hub_names import (
    HubKind,
    hub_cache,
    hub_endpoint,
    is_commit,
    is_offline,
    repository_folder,
    snapshot_folder,
)
from grpo_mega.types import UserError

ANSWER_SECONDS = 5.0
"""Time limit of the hub's answer to one question; a question is asked once."""
_DOWNLOADS_AT_ONCE = 4
_DEFAULT_REVISION = "main"


@dataclass(frozen=True)
class HubRepository:
    """A model or data set at one commit.

    Attributes:
        key: config key that names it, for messages.
        kind: model or data set.
        name: ORGANIZATION/NAME.
        commit: hash of the commit.
        sizes: name of each file -> bytes; None if the hub did not tell.
    """

    key: str
    kind: HubKind
    name: str
    commit: str
    sizes: Mapping[str, int | None]

    @property
    def folder(self) -> Path:
        """Return the cache folder of the commit's files."""
        return snapshot_folder(self.kind, self.name, self.commit)

    def download(self, names: Collection[str]) -> None:
        """Download the files that the cache lacks; report each on stderr.

        Raises:
            UserError: a file is missing on the hub, access is denied, or the connection fails.
        """
        missing = [name for name in names if not (self.folder / name).is_file()]
        if not missing:
            return
        if is_offline():
            raise UserError(
                f"{self.key}={self.name}: {missing[0]} of commit {self.commit} is not in the cache {hub_cache()}, and "
                "HF_HUB_OFFLINE=1 forbids a download",
                remedy="run `grpo-mega fetch CONFIG` on a machine with a connection and the same cache",
            )
        total = sum(self.sizes.get(name) or 0 for name in missing)
        _report(f"fetching {self.name} at {self.commit[:12]}: {len(missing)} file(s), {_size(total)}")
        done = 0
        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
            running = {pool.submit(self._download_file, name): name for name in missing}
            try:
                for finished in as_completed(running):
                    finished.result()
                    done += self.sizes.get(running[finished]) or 0
                    _report(f"  {running[finished]}  ({_size(done)} of {_size(total)})")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _download_file(self, name: str) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        try:
            hf_hub_download(
                self.name,
                name,
                repo_type=self.kind,
                revision=self.commit,
                cache_dir=hub_cache(),
                endpoint=hub_endpoint(),
                token=_token(),
                etag_timeout=ANSWER_SECONDS,
            )
        except Exception as error:  # the HTTP library of huggingface_hub, and its exceptions, depend on its version
            raise explained(error, self.key, self.kind, self.name, self.commit, name) from error


def find_repository(key: str, kind: HubKind, name: str, revision: str | None) -> HubRepository:
    """Return the repository at a revision; without a connection (HF_HUB_OFFLINE=1), as the cache holds it.

    Args:
        key: config key that holds the name, for messages.
        kind: model or data set.
        name: ORGANIZATION/NAME.
        revision: branch, tag or commit; None: `main`.

    Raises:
        UserError: the hub has no such repository or revision, denies access, or does not answer.
    """
    if is_offline():
        return _cached_repository(key, kind, name, revision)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub_endpoint(), token=_token())
    try:
        info = api.repo_info(
            name, repo_type=kind, revision=revision or _DEFAULT_REVISION, timeout=ANSWER_SECONDS, files_metadata=True
        )
    except Exception as error:  # as above
        raise explained(error, key, kind, name, revision) from error
    files = getattr(info, "siblings", None) or ()
    return HubRepository(key, kind, name, str(info.sha), {file.rfilename: file.size for file in files})


def remember_revision(repository: HubRepository, revision: str | None) -> None:
    """Record in the cache which commit a branch or tag names, for later runs without a connection."""
    if is_commit(revision) or is_offline():
        return
    path = repository_folder(repository.kind, repository.name) / "refs" / (revision or _DEFAULT_REVISION)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(repository.commit)
    temporary.rename(path)


def explained(
    error: Exception, key: str, kind: HubKind, name: str, revision: str | None, file: str | None = None
) -> UserError:
    """Return the user's message for an exception of huggingface_hub.

    Args:
        error: the exception.
        key: config key that holds the name.
        kind: model or data set.
        name: ORGANIZATION/NAME.
        revision: branch, tag or commit that was asked for.
        file: name of the file that was asked for, if any.
    """
    from huggingface_hub import errors

    where, thing = hub_endpoint(), {"model": "model", "dataset": "data set"}[kind]
    page = f"{where}/{'datasets/' if kind == 'dataset' else ''}{name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return UserError(
            f"{key}={name}: access is denied, because the {thing} is gated and {_token_state()}",
            remedy=f"accept its terms at {page}, and set HF_TOKEN to a token of that account",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{_revision_key(key)}={revision} was not found in the {thing} {name}",
            remedy=f"use a branch, tag or commit of {page}/commits/main, or leave it out for main",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return UserError(
            f"{key}={name}: no file or folder of this name exists, and {where} has no {thing} of this name that is "
            f"visible while {_token_state()}",
            remedy="correct the path, or correct the name; for a private one set HF_TOKEN",
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(
            f"{key}={name}: the file {file} was not found in the {thing} at {revision}",
            remedy="use another revision, or a complete repository",
        )
    reason = error.__cause__ or error
    text = " ".join(str(reason).split()) or type(reason).__name__
    return UserError(
        f"{key}={name}: no file or folder of this name exists, and {where} did not give {file or 'the ' + thing} "
        f"({text[:200]})",
        remedy="correct the path, or check the connection and HF_ENDPOINT; to use the cache alone set HF_HUB_OFFLINE=1",
    )


def _cached_repository(key: str, kind: HubKind, name: str, revision: str | None) -> HubRepository:
    wanted, folder = revision or _DEFAULT_REVISION, repository_folder(kind, name)
    reference = folder / "refs" / wanted
    commit = wanted if is_commit(wanted) else reference.read_text().strip() if reference.is_file() else None
    if commit is None or not snapshot_folder(kind, name, commit).is_dir():
        raise UserError(
            f"{key}={name}: no file or folder of this name exists, and with HF_HUB_OFFLINE=1 only the cache "
            f"{hub_cache()} is used, which does not hold revision {wanted}",
            remedy="correct the path, or run `grpo-mega fetch CONFIG` on a machine with a connection and this cache",
        )
    snapshot = snapshot_folder(kind, name, commit)
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    return HubRepository(key, kind, name, commit, {str(p.relative_to(snapshot)): p.stat().st_size for p in files})


def _token() -> str | Literal[False]:
    """Return the token of the environment; False also disables the token that a login stored in a file."""
    return os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or False


def _token_state() -> str:
    return "the token of HF_TOKEN is used" if _token() else "HF_TOKEN is not set"


def _revision_key(key: str) -> str:
    return f"{key.removesuffix('.path')}.revision" if key.endswith(".path") else f"revision of {key}"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
