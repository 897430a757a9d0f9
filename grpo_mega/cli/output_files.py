"""Checks of the files that a command writes, made before the command computes anything."""

from __future__ import annotations

import os
from pathlib import Path

from grpo_mega.types import UserError


def check_output_file(option: str, path: Path | None) -> None:
    """Raise UserError if `path` cannot be written, for example because its folder does not exist. None passes."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option}={path} is a folder", "name a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}={path}: the folder {path.absolute().parent} does not exist", "create it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UserError(f"{option}={path} cannot be written", "choose another file, or change its permissions")
