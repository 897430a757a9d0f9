"""What a checkpoint's `config.json` says of its model, checked: a field that we would have to ignore is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_mega.convert.spec_families import READERS
from grpo_mega.convert.spec_fields import Fields
from grpo_mega.convert.spec_parts import FP8_BLOCK, MlaSpec, ModelSpec, MoeSpec, RopeScaling
from grpo_mega.types import UserError

__all__ = ["FAMILIES", "FP8_BLOCK", "MlaSpec", "ModelSpec", "MoeSpec", "RopeScaling", "read_spec", "spec_from_config"]

FAMILIES = {architecture: reader.family for architecture, reader in READERS.items()}


def read_spec(folder: Path) -> ModelSpec:
    """Raises UserError: no or malformed config.json, an architecture without a table, an unsupported field."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model.path={folder} holds no config.json; give a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, a model's config is an object; download the file again")
    return spec_from_config(raw, str(path))


def spec_from_config(raw: dict[str, Any], where: str) -> ModelSpec:
    """From the fields of a `config.json`; `where` is its path for messages."""
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in READERS:
        raise UserError(f"{where}: architectures={architecture} is not supported; use one of {', '.join(READERS)}")
    reader = READERS[architecture]
    fields = Fields(raw, where, architecture, reader.family)
    spec = reader.read(fields)
    fields.finish()
    return spec
