"""Absolute paths for the files that a config names, so that a resolved config means the same in every folder.

A relative path is looked for in the working directory and in the folder of the config file, in this order, like the
files of user code (user_code.py). The cache of tiny bases is written, so it counts from the working directory. Names on
a hub, generated sets and `run.dir` stay as they are: a run folder is named by the command.
Asserted by tests/unit/config/test_absolute_paths.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_mega.config.hub_names import is_hub_name
from grpo_mega.config.model_sections import BaseConfig
from grpo_mega.types import UserError

_GENERATED = "arithmetic:"


def with_absolute_paths(values: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """Return nested plain values of a config with absolute paths of model, checkpoint, data and templates.

    Values of a wrong type stay as they are, for the message of the config's check.

    Args:
        values: sections, as in a YAML file.
        folders: folders in which a relative path is looked for, in this order.

    Raises:
        UserError: two different files have the name.
    """

    def absolute(key: str, value: Any) -> Any:
        return absolute_path(key, value, folders)

    def absolute_and_local(key: str, value: Any) -> Any:
        return absolute_path(key, value, folders, may_be_hub_name=False)

    result = dict(values)
    model, data = values.get("model"), values.get("data")
    if isinstance(model, Mapping):
        result["model"] = _replaced(model, ("path",), "model", absolute)
        result["model"] = _replaced(result["model"], ("checkpoint",), "model", absolute_and_local)
        if isinstance(base := model.get("base"), Mapping):
            base = {"cache_dir": BaseConfig.model_fields["cache_dir"].default, **base}
            base["cache_dir"] = absolute_path("model.base.cache_dir", base["cache_dir"], folders[:1])
            result["model"]["base"] = _replaced(base, ("examples",), "model.base", absolute)
    if isinstance(data, Mapping):
        result["data"] = section = _replaced(data, ("train", "eval", "chat_template"), "data", absolute)
        for name in ("train", "eval"):
            if isinstance(sets := section.get(name), list | tuple):
                section[name] = [
                    _replaced(source, ("path",), f"data.{name}[{i}]", absolute)
                    if isinstance(source, Mapping)
                    else source
                    for i, source in enumerate(sets)
                ]
    return result


def absolute_path(key: str, value: Any, folders: Sequence[Path], *, may_be_hub_name: bool = True) -> Any:
    """Return the absolute path of a file or folder that a config key names.

    Names on a hub, generated sets, and values of a wrong type stay as they are.

    Args:
        key: config key, for messages.
        value: value of the key.
        folders: folders in which a relative path is looked for; a path that is in none gets the first.
        may_be_hub_name: False for a key that names no model or data set of a hub.

    Raises:
        UserError: two different files have the name.
    """
    if not isinstance(value, str) or not value or value.startswith(_GENERATED):
        return value
    path = Path(value).expanduser()
    if path.is_absolute():
        return str(path)
    candidates = list(dict.fromkeys(Path(os.path.abspath(folder / path)) for folder in folders))
    existing = [candidate for candidate in candidates if os.path.exists(candidate)]  # False for an impossible name
    found = list({os.path.realpath(candidate): candidate for candidate in reversed(existing)}.values())
    if len(found) > 1:
        raise UserError(
            f"{key}={value!r} is ambiguous: it names {' and '.join(map(str, reversed(found)))}",
            remedy="write the absolute path, or rename one of them",
        )
    if found:
        return str(found[0])
    return value if may_be_hub_name and is_hub_name(value) else str(candidates[0])


def _replaced(
    section: Mapping[str, Any], keys: Sequence[str], prefix: str, change: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """Return the section with changed values of `keys`, where it has them."""
    return {name: change(f"{prefix}.{name}", value) if name in keys else value for name, value in section.items()}
