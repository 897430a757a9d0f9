"""Wheels for a machine without network: cut into parts that a link carries, joined there, proven by their digests.

    python tools/wheel_parts.py cut WHEELS OUT [--max-mib 60]      here: every wheel above the size becomes parts
    python tools/wheel_parts.py join PARTS [--remove-parts]        there: the wheels again, beside their parts

`cut` also copies the wheels that are small enough, and writes OUT/parts.json: each wheel's name, parts and SHA-256.
Parts may arrive in any order, one after the other; `join` says which are missing, and joins what is whole. Then
`pip install --no-index --find-links PARTS ...`.

Exit code 0: done; 1: parts are missing or damaged (named); 2: wrong input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_mega.types import UserError

LIST = "parts.json"
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    actions = parser.add_subparsers(dest="action", required=True)
    cutting = actions.add_parser("cut", help="on the machine that has the wheels")
    cutting.add_argument("wheels", type=Path)
    cutting.add_argument("out", type=Path)
    cutting.add_argument("--max-mib", type=int, default=60, help="of a part")
    joining = actions.add_parser("join", help="on the machine without network")
    joining.add_argument("parts", type=Path)
    joining.add_argument("--remove-parts", action="store_true", help="of wheels that are whole again")
    args = parser.parse_args(argv)
    problems: list[str] = []
    try:
        if args.action == "cut":
            listed = cut(args.wheels, args.out, args.max_mib * MIB)
        else:
            problems, listed = join(args.parts, remove=args.remove_parts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    if args.json:
        print(json.dumps({"wheels": listed, "problems": problems}))
    return int(bool(problems))


def cut(wheels: Path, out: Path, max_bytes: int) -> dict[str, Any]:
    """Raises UserError: there are no wheels, or no size."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise UserError(f"{wheels} holds no wheels", remedy="fill it with pip download")
    if max_bytes < 1:
        raise UserError("--max-mib must be 1 or more")
    out.mkdir(parents=True, exist_ok=True)
    listed = {}
    for wheel in found:
        parts = [wheel.name]
        if wheel.stat().st_size <= max_bytes:
            shutil.copy(wheel, out / wheel.name)
        else:
            parts = []
            for number, data in enumerate(_pieces(wheel, max_bytes)):
                parts.append(f"{wheel.name}.part{number:03d}")
                (out / parts[-1]).write_bytes(data)
        listed[wheel.name] = {"parts": parts, "sha256": _digest(wheel)}
    (out / LIST).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return listed


def join(folder: Path, *, remove: bool) -> tuple[list[str], dict[str, Any]]:
    """What is missing or damaged, a line each, and the list.

    Raises:
        UserError: the folder has no list of parts.
    """
    if not (folder / LIST).is_file():
        raise UserError(f"{folder} holds no {LIST}", remedy="send the one that `cut` has written, too")
    listed: dict[str, Any] = json.loads((folder / LIST).read_text(encoding="utf-8"))
    problems = []
    for name, wheel in listed.items():
        whole = folder / name
        if not (whole.is_file() and _digest(whole) == wheel["sha256"]):
            missing = [part for part in wheel["parts"] if not (folder / part).is_file()]
            if missing:
                problems.append(f"{name}: {', '.join(missing)} missing; send them")
                continue
            if wheel["parts"] != [name]:
                _write(whole, [folder / part for part in wheel["parts"]])
            if _digest(whole) != wheel["sha256"]:
                problems.append(f"{name}: not what was cut: a part is damaged; send its parts again")
                continue
        if remove and wheel["parts"] != [name]:
            for part in wheel["parts"]:
                (folder / part).unlink(missing_ok=True)
    return problems, listed


def _write(whole: Path, parts: Sequence[Path]) -> None:
    joined = whole.with_suffix(".joining")
    with joined.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, out, MIB)
    joined.rename(whole)


def _pieces(path: Path, max_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(max_bytes):
            yield data


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
