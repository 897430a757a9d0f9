"""Configs and model descriptions shipped with the package: the repository's `configs/`, also in an installed wheel.

In a checkout they are in `configs/` beside the package; a wheel holds them as `grpo_mega/configs/`.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder() -> Path:
    """Return the folder of the shipped configs."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_config_names() -> list[str]:
    """Return the names of all shipped configs, without `.yaml`; those in a subfolder as `recipes/NAME`."""
    folder = shipped_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_config(path: Path) -> Path:
    """Return `path` if it exists, else the shipped config of that name (`quickstart`, `configs/quickstart.yaml`).

    A path that is neither is returned unchanged, for the loader's own error message.
    """
    if path.exists() or path.is_absolute():
        return path
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if not name.name:
        return path
    shipped = shipped_folder() / name.with_name(f"{name.name.removesuffix('.yaml')}.yaml")
    return shipped if shipped.is_file() else path


def shipped_model_folder(path: Path) -> Path:
    """Return `path` if that folder exists, else the shipped `config.json` folder of the model of that name, if any."""
    shipped = shipped_folder() / "models" / path.name
    return shipped if not path.is_dir() and shipped.is_dir() else path
