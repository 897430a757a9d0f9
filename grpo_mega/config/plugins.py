"""Functions that a config names: resolves a short name or a path and checks the arguments against the signature.

Rewards, environments, surrogates and advantage estimators are such functions. Nothing here imports torch, because
worker processes use this module and must start fast. Asserted by tests/unit/rewards/test_base.py,
tests/unit/environments/test_pool.py and tests/unit/algorithm/test_extensions.py.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_mega.config.json_values import require_json_values
from grpo_mega.config.nearest_name import nearest_name
from grpo_mega.config.user_code import absolute_name, import_file, split_name
from grpo_mega.types import UserError

_DECLARATION_SUFFIX = "_declaration__"


@dataclass(frozen=True)
class Catalogue:
    """Functions of one kind.

    Attributes:
        what: the word for one function in messages.
        builtin: short name -> path.
        declaration: attribute that the decorator of this kind sets.
        key: config key that holds the name.
    """

    what: str
    builtin: Mapping[str, str]
    declaration: str
    key: str = "name"

    def find(self, where: str, name: str) -> Callable[..., Any]:
        """Return the function that a name stands for.

        Args:
            where: config section, for messages.
            name: short name, `package.module:function`, `package.module.function` or `./file.py:function`. The config
                loader has made relative paths absolute (user_code.py); here they are relative to the working directory.

        Raises:
            UserError: the name is unknown, or the module or the function was not found.
        """
        key = f"{where}.{self.key}"
        module_name, attribute = split_name(self.builtin.get(name) or absolute_name(key, name, [Path.cwd()]))
        if module_name and not attribute:
            raise UserError(
                f"{key}={name!r} names no function", remedy=f"write {name.rstrip(':')}:FUNCTION with its {self.what}"
            )
        if not module_name:
            nearest = nearest_name(name, self.builtin)
            hint = f", did you mean {nearest!r}?" if nearest else ""
            raise UserError(
                f"{key}={name!r} is not a known {self.what}{hint}",
                remedy=f"use one of {', '.join(sorted(self.builtin))}, or a path package.module:function or "
                "./file.py:function",
            )
        try:
            is_file = module_name.endswith(".py")
            module = import_file(Path(module_name)) if is_file else importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
            raise UserError(
                f"{key}={name!r}: cannot import {module_name!r} ({type(error).__name__}: {error})",
                remedy="correct it; modules are looked for in the working directory, in the folder of the config, and "
                "among the installed packages",
            ) from error
        function = getattr(module, attribute, None)
        if not callable(function):
            functions = [n for n, value in vars(module).items() if self._is_candidate(n, value, module)]
            near = nearest_name(attribute, functions)
            hint = f", did you mean {near!r}?" if near else ""
            raise UserError(
                f"{key}={name!r}: module {module_name!r} has no function {attribute!r}{hint}",
                remedy=f"its {self.what}s: {', '.join(functions) or 'none'}",
            )
        self._require_kind(key, name, function)
        return function  # type: ignore[no-any-return]

    def _require_kind(self, key: str, name: str, function: Callable[..., Any]) -> None:
        """Raise UserError for a function that another kind's decorator declares, or that cannot be called as one."""
        declared = [name for name in getattr(function, "__dict__", {}) if name.endswith(_DECLARATION_SUFFIX)]
        if self.declaration in declared:
            return
        if declared:
            other = declared[0].removeprefix("__").removesuffix(_DECLARATION_SUFFIX)
            raise UserError(
                f"{key}={name!r} has the decorator of another kind: {other}", remedy=f"name a function for {key}"
            )
        try:
            inspect.signature(function)
        except (ValueError, TypeError):
            is_function = False
        else:
            is_function = not inspect.isclass(function)
        if not is_function:
            raise UserError(
                f"{key}={name!r} is not a Python function with a signature",
                remedy=f"name a function for {key}",
            )

    def _is_candidate(self, name: str, value: object, module: ModuleType) -> bool:
        """Return True for a declared function, and for a public function that the module defines itself."""
        is_own = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        return is_own or hasattr(value, self.declaration)


def check_args(
    where: str,
    name: str,
    args: Mapping[str, Any],
    function: Callable[..., Any],
    given: Sequence[Any],
    check: Callable[..., None] | None,
    named: Sequence[str] = (),
) -> None:
    """Check that the function can be called with the values of `given`, followed by `args` as keywords.

    Args:
        where: config key, for messages.
        name: name of the function in the config.
        args: arguments in the config.
        function: the function to check.
        given: placeholders for the positional arguments that the program passes.
        check: called with `args`; raises UserError for an invalid value.
        named: keyword arguments that the program passes.

    Raises:
        UserError: an argument is unknown or missing, its value cannot cross to a worker process as JSON, or `check`
            rejects it.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*given, **dict.fromkeys(named), **args)
    except TypeError as error:
        known = [key for key in list(signature.parameters)[len(given) :] if key not in named]
        unknown = [key for key in args if key not in known]
        near = nearest_name(unknown[0], known) if unknown else None
        hint = f", did you mean {near!r}?" if near else ";"
        raise UserError(
            f"{where}.args={dict(args)} does not fit {name!r} ({error}){hint} "
            f"it takes: {', '.join(known) or 'no arguments'}"
        ) from error
    require_json_values(f"{where}.args", args)
    if check is not None:
        try:
            check(**args)
        except UserError as error:
            raise UserError(f"{where}.args: {error}") from error
