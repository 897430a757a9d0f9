"""tools/wheel_parts.py: what is joined is what was cut, and what is missing or damaged is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tools import wheel_parts
from tools.wheel_parts import MIB, main

BIG, SMALL = "big-1.0-py3-none-any.whl", "small-1.0-py3-none-any.whl"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / BIG).write_bytes(random.Random(0).randbytes(2 * MIB + 5))
    (folder / SMALL).write_bytes(b"small")
    return folder


def cut_wheels(wheels: Path, out: Path) -> None:
    assert main(["cut", str(wheels), str(out), "--max-mib", "1"]) == 0


def test_joined_wheels_are_those_that_were_cut(wheels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut_wheels(wheels, out)
    assert sorted(p.name for p in out.iterdir()) == [f"{BIG}.part{i:03d}" for i in range(3)] + ["parts.json", SMALL]
    assert max(p.stat().st_size for p in out.iterdir()) <= MIB
    assert main(["join", str(out), "--remove-parts"]) == 0
    for name in (BIG, SMALL):
        assert (out / name).read_bytes() == (wheels / name).read_bytes()
    assert not list(out.glob("*.part*"))
    assert main(["join", str(out)]) == 0  # a second time


def test_a_missing_part_is_named_and_the_other_parts_are_joined(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cut_wheels(wheels, out)
    (out / f"{BIG}.part001").unlink()
    assert main(["--json", "join", str(out)]) == 1
    said = capsys.readouterr()
    assert f"{BIG}: {BIG}.part001 missing; send these parts" in said.err
    assert json.loads(said.out)["problems"] == [f"{BIG}: {BIG}.part001 missing; send these parts"]
    assert not (out / BIG).exists()


def test_a_damaged_part_is_found(wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cut_wheels(wheels, out)
    (out / f"{BIG}.part002").write_bytes(b"other")
    assert main(["join", str(out)]) == 1
    assert "a part is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["cut", "join"])
def test_a_folder_with_nothing_to_do_is_rejected(action: str, tmp_path: Path) -> None:
    arguments = [action, str(tmp_path), *([str(tmp_path / "out")] if action == "cut" else [])]
    assert main(arguments) == 2
    assert wheel_parts.__doc__
