"""The contract of an environment, and the conversion of the config's section into a callable.

An environment is a function `(prompt, turns, reference, **args) -> str | None`. It gets all answers of the rollout and
the results between them. It returns the next result, or None to end the rollout. It keeps no state: everything that it
needs is in the turns, so that a process that died can be replaced, and the same answers get the same results. It
declares the texts that end an answer with `@environment(stop=(...,))`; without a declaration only EOS ends an answer.

This module imports no torch: worker processes import it together with the environments, and must start fast.
Asserted by tests/unit/environments/test_pool.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from grpo_mega.config.plugins import Catalogue, check_args

BUILTIN_ENVIRONMENTS: Mapping[str, str] = {"calculator": "grpo_mega.environments.calculator:calculator"}
"""Short name -> path of the function; the module is imported only when a config names it."""

_KEY = "environment"
_DECLARATION = "__environment_declaration__"
_ENVIRONMENTS = Catalogue("environment", BUILTIN_ENVIRONMENTS, _DECLARATION)
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Turn:
    """An answer of the policy and the environment's result for it; the last turn has no result yet.

    `stop_text` is the stop text that ended the answer, and `answer` ends with it; None: EOS ended the answer. The last
    sampled token may contain characters after the stop text. `answer` does not contain them; the rollout does.
    """

    answer: str
    result: str | None = None
    stop_text: str | None = None


class EnvironmentSpec(Protocol):
    """The fields of the config's EnvironmentConfig that are used here."""

    @property
    def name(self) -> str: ...

    @property
    def args(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class EnvironmentDeclaration:
    """The declaration of an environment; `stop` are the texts at which an answer ends.

    A result that begins with `error` is counted as an error of the tool; None: no result is.
    """

    stop: tuple[str, ...]
    check_args: Callable[..., None] | None = None
    error: str | None = None


def environment(
    *, stop: Sequence[str] = (), check_args: Callable[..., None] | None = None, error: str | None = None
) -> Callable[[_Function], _Function]:
    """Declare that the decorated function is an environment.

    Args:
        stop: texts that end an answer; EOS ends it as well.
        check_args: called with the config's `args` before the run starts; raises UserError for a bad value.
        error: beginning of a result that reports an error of the tool, which `rollout/tool_errors` counts.

    Raises:
        ValueError: `error` is empty: every result begins with it.
    """
    if error == "":
        raise ValueError("error='' of an environment must not be empty: every result begins with it")

    def declare(function: _Function) -> _Function:
        setattr(function, _DECLARATION, EnvironmentDeclaration(tuple(stop), check_args, error))
        return function

    return declare


@dataclass(frozen=True)
class Environment:
    """A resolved environment function with its arguments."""

    function: Callable[..., Any]
    stop: tuple[str, ...]
    args: Mapping[str, Any]
    error: str | None = None

    def __call__(self, prompt: str, turns: Sequence[Turn], reference: str) -> str | None:
        """Return the next result, or None to end the rollout.

        Raises:
            ValueError: the function returned neither text nor None.
            Exception: any exception of the function itself.
        """
        result = self.function(prompt, turns, reference, **self.args)
        if not (result is None or isinstance(result, str)):
            raise ValueError(f"returned {type(result).__name__}, neither text nor None")
        return result


def build_environment(spec: EnvironmentSpec) -> Environment:
    """Resolve and check the config's section.

    Raises:
        UserError: the name is unknown, the path cannot be imported, or an argument is unknown or has a wrong value.
    """
    function = _ENVIRONMENTS.find(_KEY, spec.name)
    declaration = getattr(function, _DECLARATION, EnvironmentDeclaration(()))
    check_args(_KEY, spec.name, spec.args, function, ("", (), ""), declaration.check_args)
    return Environment(function, declaration.stop, dict(spec.args), declaration.error)
