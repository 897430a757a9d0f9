"""Split wheels into parts of limited size, and join them on a machine without network, with verified digests.

    python tools/wheel_parts.py cut WHEELS OUT [--max-mib 60]      on the machine that has the wheels
    python tools/wheel_parts.py join PARTS [--remove-parts]        on the machine without network

`cut` splits every wheel that is larger than the limit, copies all others, and writes OUT/parts.json: the name, the
parts and the SHA-256 of each wheel. The files may be sent in any order. `join` writes the wheels beside their parts,
and prints which parts are missing; it can be repeated. Then run `pip install --no-index --find-links PARTS ...`.

Exit code 0: done; 1: parts are missing or damaged, and are printed; 2: wrong input.
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

from grpo_mega.cli.exit_codes import errors_as_exit_codes
from grpo_mega.types import UserError

LIST = "parts.json"
MIB = 2**20


@errors_as_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    actions = parser.add_subparsers(dest="action", required=True)
    cutting = actions.add_parser("cut", help="split wheels, on the machine that has them")
    cutting.add_argument("wheels", type=Path, help="folder of wheels")
    cutting.add_argument("out", type=Path, help="folder of the parts, which is created")
    cutting.add_argument("--max-mib", type=int, default=60, help="largest part in MiB (default: %(default)s)")
    joining = actions.add_parser("join", help="join wheels, on the machine without network")
    joining.add_argument("parts", type=Path, help="folder of the parts and parts.json")
    joining.add_argument("--remove-parts", action="store_true", help="delete the parts of every joined wheel")
    args = parser.parse_args(argv)
    problems: list[str] = []
    if args.action == "cut":
        listed = cut(args.wheels, args.out, args.max_mib * MIB)
    else:
        problems, listed = join(args.parts, remove=args.remove_parts)
    for problem in problems:
        print(problem, file=sys.stderr)
    if args.json:
        print(json.dumps({"wheels": listed, "problems": problems}))
    return int(bool(problems))


def cut(wheels: Path, out: Path, max_bytes: int) -> dict[str, Any]:
    """Split every wheel of a folder that is larger than `max_bytes`, copy the others, and return the list of parts.

    Raises:
        UserError: the folder contains no wheels, or `max_bytes` is less than 1.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise UserError(f"WHEELS={wheels}: no *.whl file was found", remedy="fill the folder with pip download")
    if max_bytes < 1:
        raise UserError("--max-mib must be at least 1")
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
    """Join all wheels whose parts are complete.

    Returns:
        One line for each missing or damaged wheel, and the list of parts that `cut` wrote.

    Raises:
        UserError: the folder does not contain parts.json.
    """
    if not (folder / LIST).is_file():
        raise UserError(f"PARTS={folder}: {LIST} was not found", remedy="send the file that `cut` wrote")
    listed: dict[str, Any] = json.loads((folder / LIST).read_text(encoding="utf-8"))
    problems = []
    for name, wheel in listed.items():
        whole = folder / name
        if not (whole.is_file() and _digest(whole) == wheel["sha256"]):
            missing = [part for part in wheel["parts"] if not (folder / part).is_file()]
            if missing:
                problems.append(f"{name}: {', '.join(missing)} missing; send these parts")
                continue
            if wheel["parts"] != [name]:
                _write(whole, [folder / part for part in wheel["parts"]])
            if _digest(whole) != wheel["sha256"]:
                problems.append(f"{name}: a part is damaged, the SHA-256 differs; send the parts again")
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
