"""Manifest of a checkpoint: sizes and digests of its files, digests of its tensors, and what it is a checkpoint of.

`manifest.json` lists everything; `complete`, written last, contains the digest of `manifest.json`. Files are digested
by XXH3 (128 bits), tensors by models/digest.py, so that a tensor has the same digest in every layout. Both find
accidental damage. They do not protect against an attacker, who can rewrite the manifest; allowed_pickles.py does.
Checkpoints of other programs (Megatron-LM) and of older versions have no manifest.
Asserted by tests/unit/formats/test_checkpoint_manifest.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from grpo_mega.types import StateRecords, TensorRecord, UserError

MANIFEST, COMPLETE = "manifest.json", "complete"
FORMAT = 1
_BLOCK_BYTES, _READERS = 1 << 19, 4  # a block stays in the cache of a core
# Names that a loader reads although no manifest lists them.
_READ_BY_LOADERS = ("common.pt", "metadata.json")


class DamagedCheckpointError(Exception):
    """A checkpoint cannot be used. The text names the file and what differs."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and XXH3 digest of a file."""

    num_bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint.

    Args:
        step: completed steps of the run.
        model: description of the model, equal for every checkpoint of this model (`describe_model`).
        layout: parallel layout of the ranks that wrote it.
        files: path in the folder -> record, for every file but the manifest and the marker.
        tensors: weights, master weights and moments.
    """

    step: int
    model: str
    layout: str
    files: Mapping[str, FileRecord]
    tensors: StateRecords


def describe_model(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the number of the tensors of a model, and a digest of their names and shapes."""
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
    return f"{len(shapes)} tensors, {xxhash.xxh3_64_hexdigest(text.encode())}"


def record_of(path: Path) -> FileRecord:
    """Read a file and return its record.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    block = bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def listed_files(folder: Path) -> list[str]:
    """Return the paths of the files that a manifest lists, in order."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (MANIFEST, COMPLETE))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and then the marker, and flush both and all folders to disk.

    Raises:
        OSError: the disk is full or read-only.
    """
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1).encode()
    for name, data in ((MANIFEST, text), (COMPLETE, _marker_of(text))):
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a complete checkpoint; None if an older version wrote it without a manifest.

    Raises:
        DamagedCheckpointError: the folder, the marker or the manifest is missing or damaged, or of another version.
    """
    try:
        names = {path.name for path in folder.iterdir()}
        marker = (folder / COMPLETE).read_bytes() if COMPLETE in names else None
        text = (folder / MANIFEST).read_bytes() if MANIFEST in names else None
    except OSError as error:
        raise DamagedCheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    if marker is None:
        raise DamagedCheckpointError(f"{folder / COMPLETE}: is missing, so the checkpoint is not complete")
    if text is None:
        if marker or ".metadata" not in names:
            raise DamagedCheckpointError(f"{folder / MANIFEST}: is missing")
        return None
    if marker != _marker_of(text):
        raise DamagedCheckpointError(f"{folder / MANIFEST}: its digest differs from the one in `{COMPLETE}`")
    return _parsed(folder, text)


def _marker_of(manifest: bytes) -> bytes:
    return f"{xxhash.xxh3_128_hexdigest(manifest)}\n".encode()


def _parsed(folder: Path, text: bytes) -> Manifest:
    try:
        raw: dict[str, Any] = json.loads(text)
        version = raw.pop("format")
        if version != FORMAT:
            raise DamagedCheckpointError(
                f"{folder / MANIFEST}: format={version} was written by another version; this one reads {FORMAT}"
            )
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        tensors = {
            place: {name: TensorRecord(tuple(r["shape"]), r["dtype"], r["digest"]) for name, r in records.items()}
            for place, records in raw.pop("tensors").items()
        }
        return Manifest(**raw, files=files, tensors=tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder / MANIFEST}: is not a manifest ({error})") from error


def differences(folder: Path, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Return the file and what differs, for each of the listed files `names` that is not as the manifest says."""
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _difference(folder / name, manifest.files[name]), names)
        return [each for each in found if each is not None]


def _difference(path: Path, wanted: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted.num_bytes:
            return f"{path}: has {size} bytes, {MANIFEST} says {wanted.num_bytes}"
        if record_of(path) != wanted:
            return f"{path}: its digest differs from the one in {MANIFEST}"
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def unlisted_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield files that a loader would read although the manifest does not list them."""
    for name in listed_files(folder):
        is_read = name.endswith((".metadata", ".distcp", *_READ_BY_LOADERS))
        if is_read and name not in manifest.files:
            yield f"{folder / name}: {MANIFEST} does not list it"


def require_undamaged(folder: Path) -> None:
    """Check a checkpoint against its manifest, if it has one, before another program than its run reads it.

    Raises:
        UserError: a file differs from the manifest (names it).
    """
    if not any((folder / name).exists() for name in (MANIFEST, COMPLETE)):
        return  # of another program
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpointError as error:
        raise damaged(str(error)) from None
    if manifest is None:
        return
    for each in [*unlisted_files(folder, manifest), *differences(folder, manifest, list(manifest.files))]:
        raise damaged(each)


def damaged(what: str) -> UserError:
    """Return the error of a damaged checkpoint that the user has named."""
    return UserError(what, remedy="copy the checkpoint again, or use another one")
