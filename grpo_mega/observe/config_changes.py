"""Compares the config of a run folder with that of a command, and keeps the changes that take effect between steps.

`config_changes.jsonl` has a line per change of a key that changes later steps: `after_step`, `key`, `before`, `now`.
The line is written before `config.yaml` changes, so that a run that is killed before its next step still reports it.
Asserted by tests/unit/observe/test_config_changes.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from grpo_mega.config.absolute_paths import with_absolute_paths
from grpo_mega.config.data_sections import DataSource
from grpo_mega.config.resume_effects import UNSET, default_value, effect_of_change
from grpo_mega.observe.atomic_files import write_atomically


@dataclass(frozen=True)
class ConfigChange:
    """One key whose value differs; `before` and `now` are the values as text."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key} ({self.before} there, {self.now} now)"


@dataclass(frozen=True)
class ConfigChanges:
    """The keys that must not differ and do, and those that change later steps."""

    frozen: tuple[ConfigChange, ...]
    future: tuple[ConfigChange, ...]


def compare_configs(stored: Mapping[str, Any], resolved: Mapping[str, Any]) -> ConfigChanges:
    """Compare the config of a run, nested plain values, with the resolved config of a command.

    A key that only the command has was added after the run was made: its default counts as the value there. Relative
    paths of a run that an earlier version made count from the working directory, as they did there.
    """
    there = _with_keys_of_sets(_flatten(with_absolute_paths(stored, [Path.cwd()])))
    # Converted to YAML and back, like the stored config (tuples become lists).
    here = _flatten(yaml.safe_load(yaml.safe_dump(dict(resolved), sort_keys=False)))
    changes: dict[str, list[ConfigChange]] = {"frozen": [], "changes_future": [], "changes_speed": []}
    for key in dict.fromkeys((*there, *here)):
        if any(other.startswith(f"{key}.") for other in (*there, *here)):
            continue  # an empty section on one side; its keys are compared
        before = there[key] if key in there else _plain(default_value(key, stored))
        if _as_text(before) != (now := _as_text(here.get(key, UNSET))):
            changes[effect_of_change(key, resolved)].append(ConfigChange(key, _as_text(before), now))
    return ConfigChanges(tuple(changes["frozen"]), tuple(changes["changes_future"]))


def record_changes(path: Path, after_step: int, changes: tuple[ConfigChange, ...]) -> tuple[ConfigChange, ...]:
    """Add changes to the file, drop those of later steps, and return those that take effect after `after_step`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in lines if line["after_step"] <= after_step]
    kept += [{"after_step": after_step, **asdict(change)} for change in changes]
    if kept or lines:
        write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept))
    return tuple(
        ConfigChange(line["key"], line["before"], line["now"]) for line in kept if line["after_step"] == after_step
    )


def _with_keys_of_sets(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the flat config with the defaults of keys that its data sets were stored without."""
    defaults = {name: _plain(field.default) for name, field in DataSource.model_fields.items() if name != "path"}
    for key in ("data.train", "data.eval"):
        if isinstance(sets := flat.get(key), list) and all(isinstance(source, Mapping) for source in sets):
            flat[key] = [{"path": source.get("path"), **defaults, **source} for source in sets]
            flat[key] = [{name: source[name] for name in DataSource.model_fields} | source for source in flat[key]]
    return flat


def _plain(value: Any) -> Any:
    """Return a default as `config.yaml` would hold it."""
    return list(value) if isinstance(value, tuple) else value


def _as_text(value: Any) -> str:
    return "unset" if value is UNSET else repr(value)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {'a.b': 1} for {'a': {'b': 1}}. A list and an empty section are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
