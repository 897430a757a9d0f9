"""The contract of an environment, and how the config's section becomes a callable.

An environment is a function `(prompt, turns, reference, **args) -> str | None`. It sees all answers of the rollout and
the results between them; it returns the next result, or None when the rollout is over. It keeps no state: what it needs
is in the turns, so that a process that died can be replaced, and the same answers get the same results. It declares
the texts that end an answer with `@environment(stop=(...,))`.

Nothing here imports torch: worker processes import this module and the environments, and must start fast.
Asserted by tests/unit/environments/test_pool.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from grpo_mega.config.plugins import Catalogue, check_args
from grpo_mega.types import UserError

BUILTIN_ENVIRONMENTS: Mapping[str, str] = {"calculator": "grpo_mega.environments.calculator:calculator"}
"""Short name -> where the function is; imported only when it is asked for."""

_KEY = "environment"
_DECLARATION = "__environment_declaration__"
_ENVIRONMENTS = Catalogue("environment", BUILTIN_ENVIRONMENTS, _DECLARATION)
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
class EnvironmentDeclaration:
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
        setattr(function, _DECLARATION, EnvironmentDeclaration(tuple(stop), check_args))
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
    function = _ENVIRONMENTS.find(_KEY, spec.name)
    declaration = getattr(function, _DECLARATION, None)
    if not isinstance(declaration, EnvironmentDeclaration):
        raise UserError(
            f"{_KEY}.name={spec.name!r} is not declared",
            remedy="put `@grpo_mega.environments.environment(stop=(...,))` above the function",
        )
    check_args(_KEY, spec.name, spec.args, function, ("", (), ""), declaration.check_args)
    return Environment(function, declaration.stop, dict(spec.args))
