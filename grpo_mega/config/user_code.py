"""Where a function of the user is found, and the import of its file.

A config names a function as `./file.py:function` or `package.module:function`. Both are looked for in the working
directory and in the folder of the config file. A module is then looked for on `sys.path`, where installed packages are.
Two different files of the same name are an error. A function that is found in one of the two folders gets the absolute
path of its file as its name, so that worker processes, other nodes and later commands from other working directories
read the same file. Asserted by tests/unit/config/test_user_code.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from grpo_mega.types import UserError


def split_name(name: str) -> tuple[str, str]:
    """Return module or file, and function, of `module:function`, `module.function` or `file.py:function`.

    Both are empty for a name without a module, such as that of a built-in function.
    """
    if ":" not in name and name.endswith(".py"):  # the function is missing
        return name, ""
    module, _, function = name.rpartition(":" if ":" in name else ".")
    return module, function


def absolute_name(key: str, name: str, folders: Sequence[Path]) -> str:
    """Return `name` with the absolute path of its file, or unchanged if no file of that name is in `folders`.

    Args:
        key: config key or option that holds the name, for messages.
        name: name of a built-in function, or as in `split_name`.
        folders: folders in which relative paths and modules are looked for, in this order.

    Raises:
        UserError: a `.py` file was not found; two different files have this name; or the module is in a folder that is
            no package.
    """
    module, function = split_name(name)
    if not module or not function or module.partition(".")[0] == "grpo_mega":
        return name
    folders = [Path(os.path.abspath(folder)) for folder in folders]
    if module.endswith(".py"):
        path = Path(module).expanduser()
        candidates = list(dict.fromkeys(Path(os.path.abspath(folder / path)) for folder in folders))
        found = _different_files(candidates)
        if not found:
            raise UserError(
                f"{key}={name!r}: no such file; looked for {' and '.join(map(str, candidates))}",
                remedy="correct the path; it is relative to the working directory or to the folder of the config",
            )
    else:
        found = _different_files(_module_candidates(module, folders))
        if not found:
            return name
        installed = [entry for entry in map(Path, sys.path) if _absolute(entry) not in map(_absolute, folders)]
        found = _different_files([*found, *_module_candidates(module, installed)])
    if len(found) > 1:
        raise UserError(
            f"{key}={name!r} is ambiguous: it names {' and '.join(map(str, found))}",
            remedy="name the file with its absolute path, or rename one of them",
        )
    if not module.endswith(".py"):
        _require_packages(key, name, found[0], module)
    return f"{found[0]}:{function}"


def _absolute(path: Path) -> Path:
    return path.resolve()


def _different_files(candidates: Iterable[Path]) -> list[Path]:
    """Return the candidates that are files, without further names of the same file."""
    return list({path.resolve(): path for path in reversed(list(candidates)) if path.is_file()}.values())[::-1]


def _module_candidates(module: str, folders: Iterable[Path]) -> list[Path]:
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return []
    inside = [Path(*parts[:-1], f"{parts[-1]}.py"), Path(*parts, "__init__.py")]
    return [folder / path for folder in folders for path in inside]


def _require_packages(key: str, name: str, file: Path, module: str) -> None:
    folder = file.parent.parent if file.name == "__init__.py" else file.parent
    for _ in module.split(".")[:-1]:
        if not (folder / "__init__.py").is_file():
            raise UserError(
                f"{key}={name!r}: the folder {folder} is not a package, because it has no __init__.py",
                remedy=f"add an empty {folder / '__init__.py'}, or name the file: {file}:{split_name(name)[1]}",
            )
        folder = folder.parent


@cache
def import_file(file: Path) -> ModuleType:
    """Import a Python file by its absolute path, once per process.

    The folder of the file, or the folder of its outermost package, is appended to `sys.path`, so that the file can
    import its neighbors.

    Raises:
        ImportError: the file belongs to a package whose name is that of another package in this process.
        Exception: any exception of the file.
    """
    root, dotted = file.parent, "" if file.name == "__init__.py" else file.stem
    while (root / "__init__.py").is_file():
        root, dotted = root.parent, f"{root.name}.{dotted}".rstrip(".")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    if root != file.parent:
        module = importlib.import_module(dotted)
        imported = module.__file__
        if imported is None or Path(imported).resolve() != file.resolve():
            raise ImportError(f"{dotted} is the name of another module, {imported}; rename the package {root}")
        return module
    unique = f"{file.stem}_{zlib.crc32(os.fsencode(file)):08x}"  # two files may have one stem, also that of a library
    spec = importlib.util.spec_from_file_location(unique, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses, pickle and typing look a class's module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module
