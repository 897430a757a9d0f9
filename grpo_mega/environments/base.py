"""The contract of an environment, and how the config's section becomes a callable.

An environment is a function `(prompt, turns, reference, **args) -> str | None`. It sees all answers of the rollout and
the results between them; it returns the next result, or None when the rollout is over. It keeps no state: what it needs
is in the turns, so that a process that died can be replaced, and the same answers get the same results. It declares
the texts that end an answer with `@environment(stop=(...,))`.

Nothing here imports torch: worker processes import this module and the environments, and must start fast.
Asserted by tests/unit/test_environments.py.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from grpo_mega.types import UserError

BUILTIN_ENVIRONMENTS: Mapping[str, str] = {"calculator": "grpo_mega.environments.calculator:calculator"}
"""Short name -> where the function is; imported only when it is asked for."""

_KEY = "environment"
_DECLARATION = "__environment_declaration__"
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Turn:
    """An answer of the policy and what the environment replied; the last turn has no result yet."""

    answer: str
    result: str | None = None


class EnvironmentSpec(Protocol):
    """What is read of the config's EnvironmentConfig."""

    @property
    def name(self) -> str: ...

    @property
    def args(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Declaration:
    """`stop` are the texts at which the policy hands over."""

    stop: tuple[str, ...]
    check_args: Callable[..., None] | None = None


def environment(
    *, stop: Sequence[str] = (), check_args: Callable[..., None] | None = None
) -> Callable[[_Function], _Function]:
    """Declare that the decorated function is an environment.

    Args:
        stop: texts that end an answer, besides EOS.
        check_args: called with the config's `args` before the run starts; raises UserError for a bad value.
    """

    def declare(function: _Function) -> _Function:
        setattr(function, _DECLARATION, Declaration(tuple(stop), check_args))
        return function

    return declare


@dataclass(frozen=True)
class Environment:
    """The resolved function."""

    function: Callable[..., Any]
    stop: tuple[str, ...]
    args: Mapping[str, Any]

    def __call__(self, prompt: str, turns: Sequence[Turn], reference: str) -> str | None:
        """The next result, or None.

        Raises:
            ValueError: the function returned something else.
            Exception: whatever the function itself raises.
        """
        result = self.function(prompt, turns, reference, **self.args)
        if not (result is None or isinstance(result, str)):
            raise ValueError(f"returned {type(result).__name__}, neither text nor None")
        return result


def build_environment(spec: EnvironmentSpec) -> Environment:
    """Resolve and check the config's section.

    Raises:
        UserError: an unknown name, a path that cannot be imported, a function that is not declared, an argument that it
            does not take or a value that it refuses.
    """
    function = _resolve(spec.name)
    declaration = getattr(function, _DECLARATION, None)
    if not isinstance(declaration, Declaration):
        raise UserError(
            f"{_KEY}.name={spec.name!r} is not declared; put `@grpo_mega.environments.environment(stop=(...,))` above "
            "the function"
        )
    _check_args(spec, function, declaration)
    return Environment(function, declaration.stop, dict(spec.args))


def _resolve(name: str) -> Callable[..., Any]:
    path = BUILTIN_ENVIRONMENTS.get(name, name)
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not module_name or not attribute:
        nearest = difflib.get_close_matches(name, BUILTIN_ENVIRONMENTS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"{_KEY}.name={name!r} is no environment, did you mean {nearest!r}? "
            f"Use one of {', '.join(sorted(BUILTIN_ENVIRONMENTS))} or a path package.module:function"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UserError(
            f"{_KEY}.name={name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            "check the path and PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [n for n, value in vars(module).items() if hasattr(value, _DECLARATION)]
        raise UserError(
            f"{_KEY}.name={name!r}: module {module_name!r} has no function {attribute!r}; "
            f"its environments: {', '.join(functions) or 'none'}"
        )
    return function  # type: ignore[no-any-return]


def _check_args(spec: EnvironmentSpec, function: Callable[..., Any], declaration: Declaration) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind("", (), "", **spec.args)
    except TypeError as error:
        known = list(signature.parameters)[3:]
        raise UserError(
            f"{_KEY}.args={dict(spec.args)} does not fit {spec.name!r} ({error}); it takes: "
            f"{', '.join(known) or 'no arguments'}"
        ) from error
    if declaration.check_args is not None:
        try:
            declaration.check_args(**spec.args)
        except UserError as error:
            raise UserError(f"{_KEY}.args: {error}") from error
