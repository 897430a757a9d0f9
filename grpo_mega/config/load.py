"""Loads a YAML file with `section.key=value` overrides into a checked, frozen `Config`.

Imports no torch, so that a command with a wrong argument fails at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from grpo_mega.config.absolute_paths import with_absolute_paths
from grpo_mega.config.algorithm_parts import PARTS
from grpo_mega.config.algorithm_presets import settings_before_presets
from grpo_mega.config.json_values import reject_endless_values
from grpo_mega.config.key_suggestions import suggest_key
from grpo_mega.config.nearest_name import nearest_name
from grpo_mega.config.rules import check
from grpo_mega.config.sampling_options import EVALUATION_ONLY, not_in_training
from grpo_mega.config.schema import Config
from grpo_mega.config.shipped import find_config
from grpo_mega.config.user_code import absolute_name
from grpo_mega.types import UserError


class _Loader(yaml.SafeLoader):
    """YAML loader that reads 1e-4 as a number and rejects a key that a mapping holds twice.

    YAML 1.1 reads 1e-4 as text, and PyYAML silently keeps the last of two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                at = f"line {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(None, None, f"{at}: the key {key.value} occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of one run. Files and functions in files get absolute paths (absolute_paths.py, user_code.py).

    Raises:
        UserError: the file was not found or is malformed, a key is unknown (names the nearest), or a value has the
            wrong type or breaks a rule (config/rules.py).
    """
    raw = read_values(path)
    config = config_from_values(raw, overrides, [Path.cwd(), find_config(path).parent])
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": config.run.dir or _run_dir(path)})})


def read_values(path: Path) -> dict[str, Any]:
    """Return the sections of a YAML file as nested plain values, unchecked.

    Raises:
        UserError: the file was not found or is malformed.
    """
    try:
        path = find_config(path)
        if not path.is_file():
            others = [p.name for p in path.parent.glob("*.yaml") if p.is_file()]
            near = nearest_name(path.name, sorted(others))
            raise UserError(f"CONFIG={path}: no such file; " + (f"did you mean {near}?" if near else "see configs/"))
        raw = _parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"CONFIG={path} cannot be read ({error.strerror})", remedy="name a readable file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_reason(error)}", remedy=_yaml_remedy(error)) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `train:`, not {type(raw).__name__}")
    return raw


def config_from_values(values: dict[str, Any], overrides: Sequence[str], folders: Sequence[Path]) -> Config:
    """Return the checked config of nested plain values and overrides, which are written into `values`.

    Args:
        values: sections, as in a YAML file.
        overrides: `section.key=value`.
        folders: where files and functions in files are looked for (absolute_paths.py, user_code.py).

    Raises:
        UserError: a key is unknown (names the nearest), or a value has the wrong type or breaks a rule.
    """
    for override in overrides:
        _apply_override(values, override)
    reject_endless_values(values)
    try:
        config = Config.model_validate(with_absolute_paths(values, folders))
    except ValidationError as error:
        raise UserError("\n".join(_explain(e) for e in error.errors()[:5])) from None
    config = _with_absolute_names(config, folders)
    check(config)
    return config


def _with_absolute_names(config: Config, folders: Sequence[Path]) -> Config:
    """Return the config with the absolute paths of the files that hold the user's functions."""
    terms = tuple(
        term.model_copy(update={"name": absolute_name(f"reward.terms[{position}].name", term.name, folders)})
        for position, term in enumerate(config.reward.terms)
    )
    parts: dict[str, str] = {
        kind: absolute_name(f"algorithm.{kind}", getattr(config.algorithm, kind), folders) for kind in PARTS
    }
    environment = config.environment
    if environment is not None:
        name = absolute_name("environment.name", environment.name, folders)
        environment = environment.model_copy(update={"name": name})
    update: dict[str, Any] = {"algorithm": config.algorithm.model_copy(update=parts), "environment": environment}
    if terms:  # a missing section stays missing (rules.py)
        update["reward"] = config.reward.model_copy(update={"terms": terms})
    return config.model_copy(update=update)


def _parse_yaml(text: str) -> Any:
    """Parse one YAML document. Every error is a YAMLError.

    PyYAML itself raises other exceptions for an impossible date, a wrong `!!int` and deep nesting.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _reason(error: Exception) -> str:
    """Return the line and the problem of a YAML error, in one line of text."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}: {problem}"


def _yaml_remedy(error: Exception) -> str:
    if "'\\t'" in str(getattr(error, "problem", "")):
        return "indent with spaces, not with tabs"
    return "correct the line; indent with spaces, and put quotes around text that contains : or ["


def resolved(config: Config) -> dict[str, Any]:
    """Return the config as nested plain values with every default filled in, as `config.yaml` of a run holds it."""
    return config.model_dump(mode="json")


def _run_dir(path: Path) -> str:
    return f"runs/{path.stem}"


def precedence_notes(path: Path, overrides: Sequence[str]) -> list[str]:
    """Return a line for every value of the file that stays, although an override names another algorithm.

    Args:
        path: the YAML file of the run, which `load_config` accepts.
        overrides: `section.key=value`; only `algorithm.name` leads to lines.
    """
    section = read_values(path).get("algorithm") or {}
    given = dict(override.split("=", 1) for override in overrides)
    name = given.get("algorithm.name")
    if name is None or name == section.get("name", "grpo"):
        return []
    stays = {key: value for key, value in section.items() if f"algorithm.{key}" not in given}
    return [
        f"algorithm.{key}={json.dumps(value)} of {path} takes precedence over {json.dumps(default)}, the default of "
        f"algorithm.name={name}; for the default add algorithm.{key}={json.dumps(default)}"
        for key, (value, default) in settings_before_presets(name, stays).items()
    ]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_0-9]+(\.[A-Za-z_0-9]+)+", key):
        near = suggest_key(key, known_keys()) if separator and "." not in key and key not in known_keys() else None
        example = f"did you mean {near}={text}?" if near and "." in near else "for example train.steps=20"
        raise UserError(f"override {override!r} must have the form section.key=value", remedy=example)
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(
            f"{key}={text} is not valid YAML", remedy="put quotes around text that contains : or ["
        ) from None
    *sections, last = key.split(".")
    node = raw
    for section in sections:
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    node[last] = value


def _explain(error: Any) -> str:
    """Return one pydantic error as `key=value: rule`."""
    where = ".".join(str(part) for part in error["loc"] if not str(part).startswith("("))  # without the tags of a union
    if error["type"] == "extra_forbidden":
        where = _first_leaf(where, error["input"])
        section, _, name = where.partition(".")
        if section == "sampling" and name.partition(".")[0] in EVALUATION_ONLY:
            return not_in_training(name.partition(".")[0])
        near = suggest_key(where, known_keys())
        hint = f"; did you mean {near}?" if near else "; docs/reference/config.md lists the keys"
        return f"{where}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{where}: this key is required; set it"
    message = error["msg"].replace("valid tuple", "list")  # YAML has lists; a config holds them as tuples
    hint = "; use one of these" if error["type"] == "literal_error" and " or " in message else ""
    return f"{where}={error['input']!r}: {message[0].lower()}{message[1:]}{hint}"


def _first_leaf(where: str, value: object) -> str:
    """Return the key of the first value in an unknown section, for example `optimixer.lr` for {optimixer: {lr: 1}}."""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        where = f"{where}.{key}"
    return where


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return the keys of a section and of the sections in it, each after its section."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for kind in _nested_sections(field.annotation):
            keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def _nested_sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the config sections inside of a union, a tuple or an `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _nested_sections(part)]
