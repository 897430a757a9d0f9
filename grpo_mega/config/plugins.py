"""Functions that a config names: found by a short name or a dotted path, and their arguments compared with them.

Rewards and environments are such functions. Nothing here imports torch: worker processes do this too, and must start
fast. Asserted by tests/unit/rewards/test_base.py and tests/unit/environments/test_pool.py.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_mega.types import UserError


@dataclass(frozen=True)
class Catalogue:
    """Functions of one kind: `what` they are called, the paths of the short names, and the attribute that declares
    one."""

    what: str
    builtin: Mapping[str, str]
    declaration: str

    def find(self, where: str, name: str) -> Callable[..., Any]:
        """The function of a short name, of `package.module:function` or of `package.module.function`.

        Raises:
            UserError: there is none; `where` is the key in messages.
        """
        path = self.builtin.get(name, name)
        module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
        if not module_name or not attribute:
            nearest = difflib.get_close_matches(name, self.builtin, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{where}.name={name!r} is no {self.what}, did you mean {nearest!r}? "
                f"Use one of {', '.join(sorted(self.builtin))} or a path package.module:function"
            )
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # a user's module may raise anything while it is imported
            raise UserError(
                f"{where}.name={name!r}: cannot import {module_name!r} ({type(error).__name__}: {error})",
                remedy="check the path and PYTHONPATH",
            ) from error
        function = getattr(module, attribute, None)
        if not callable(function):
            functions = [n for n, value in vars(module).items() if hasattr(value, self.declaration)]
            raise UserError(
                f"{where}.name={name!r}: module {module_name!r} has no function {attribute!r}",
                remedy=f"its {self.what}s: {', '.join(functions) or 'none'}",
            )
        return function  # type: ignore[no-any-return]


def check_args(
    where: str,
    name: str,
    args: Mapping[str, Any],
    function: Callable[..., Any],
    given: Sequence[Any],
    check: Callable[..., None] | None,
) -> None:
    """Do `args` fit the function, which is called with the values of `given` before them?

    Args:
        where: the key in messages.
        name: of the function.
        args: of the config.
        function: what is called.
        given: as many values as it gets beside `args`.
        check: called with `args`; raises UserError for a bad value.

    Raises:
        UserError: an argument that the function does not take, one that is missing, or a value that `check` refuses.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*given, **args)
    except TypeError as error:
        known = list(signature.parameters)[len(given) :]
        unknown = [key for key in args if key not in known]
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0) if unknown else []
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise UserError(
            f"{where}.args={dict(args)} does not fit {name!r} ({error}){hint} "
            f"it takes: {', '.join(known) or 'no arguments'}"
        ) from error
    if check is not None:
        try:
            check(**args)
        except UserError as error:
            raise UserError(f"{where}.args: {error}") from error
