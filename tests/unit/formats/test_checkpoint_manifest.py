"""Every damage of a file of a checkpoint is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from grpo_mega.formats.checkpoint_manifest import (
    COMPLETE,
    MANIFEST,
    DamagedCheckpointError,
    Manifest,
    describe_model,
    listed_files,
    read_manifest,
    record_of,
    require_undamaged,
    write_manifest,
)
from grpo_mega.types import TensorRecord, UserError


def make_checkpoint(folder: Path) -> Manifest:
    (folder / "critic").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "critic/.metadata"):
        (folder / name).write_bytes(name.encode() * 9)
    files = {name: record_of(folder / name) for name in listed_files(folder)}
    manifest = Manifest(4, "a model", "tp=1", files, {".": {"w": TensorRecord((2, 3), "bfloat16", "0" * 16)}})
    write_manifest(folder, manifest)
    return manifest


def test_a_manifest_is_read_as_it_was_written_and_lists_every_file(tmp_path: Path) -> None:
    written = make_checkpoint(tmp_path / "step_000004")
    assert read_manifest(tmp_path / "step_000004") == written
    assert sorted(written.files) == [".metadata", "__0_0.distcp", "critic/.metadata"]
    require_undamaged(tmp_path / "step_000004")


def test_a_model_is_described_by_names_and_shapes_in_any_order() -> None:
    one = describe_model({"a": (2, 3), "b": (4,)})
    assert describe_model({"b": (4,), "a": (2, 3)}) == one
    assert describe_model({"a": (2, 3), "b": (5,)}) != one


def test_a_checkpoint_of_another_program_is_not_checked(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    require_undamaged(tmp_path)


def test_a_checkpoint_of_an_older_version_has_no_manifest(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    (tmp_path / COMPLETE).touch()
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "critic/.metadata"])
def test_each_single_flipped_bit_of_a_listed_file_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "c")
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(changed)
        with pytest.raises(UserError) as caught:
            require_undamaged(tmp_path / "c")
        assert str(path) in caught.value.message
        assert "digest differs" in caught.value.message


@pytest.mark.parametrize("name", [MANIFEST, COMPLETE])
def test_each_single_flipped_bit_of_manifest_and_marker_is_found(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for bit in range(0, 8 * len(whole), 13):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(DamagedCheckpointError, match=MANIFEST):
            read_manifest(tmp_path)


def test_a_file_that_a_loader_would_read_must_be_listed_and_others_may_be_added(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("best so far")
    require_undamaged(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"of another step")
    with pytest.raises(UserError, match=r"common\.pt: manifest\.json does not list it"):
        require_undamaged(tmp_path)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    raw = json.loads((tmp_path / MANIFEST).read_text()) | {"format": 2}
    text = json.dumps(raw).encode()
    (tmp_path / MANIFEST).write_bytes(text)
    (tmp_path / COMPLETE).write_text(xxhash.xxh3_128_hexdigest(text) + "\n")
    with pytest.raises(DamagedCheckpointError, match=r"format=2 .* reads 1"):
        read_manifest(tmp_path)
