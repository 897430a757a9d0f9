"""Surrogates and advantage estimators that a config can name, and the config keys that each of them reads.

A new one is a function in a file of its own under grpo_mega/algorithm/ and one line in a table below. A function of the
user needs no line: `algorithm.surrogate` and `algorithm.advantage` accept `package.module:function` and
`./file.py:function` too. Nothing here imports torch unless the config names such a function.
Asserted by tests/unit/algorithm/test_extensions.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from grpo_mega.config.plugins import Catalogue
from grpo_mega.types import UserError

PartKind = Literal["surrogate", "advantage"]
_DECLARATION = "__algorithm_declaration__"


@dataclass(frozen=True)
class AlgorithmPart:
    """Path of a function, and the keys of `algorithm` that it reads: those that must be set, and those that may be."""

    path: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _surrogate(name: str, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> AlgorithmPart:
    return AlgorithmPart(f"grpo_mega.algorithm.surrogates.{name}:{name}", required, optional)


PARTS: Mapping[PartKind, Mapping[str, AlgorithmPart]] = {
    "surrogate": {
        "clipped_ratio": _surrogate("clipped_ratio", ("clip_low", "clip_high"), ("dual_clip",)),
        "clipped_sequence_ratio": _surrogate("clipped_sequence_ratio", ("clip_low", "clip_high"), ("dual_clip",)),
        "geometric_mean": _surrogate("geometric_mean", ("clip_low", "clip_high")),
        "clipped_weight": _surrogate("clipped_weight", ("clip_high",), ("clip_low",)),
        "soft_gate": _surrogate("soft_gate", ("gate_positive", "gate_negative")),
        "policy_gradient": _surrogate("policy_gradient"),
    },
    "advantage": {
        "group_std": AlgorithmPart("grpo_mega.algorithm.advantages.group_relative:group_std"),
        "group_mean": AlgorithmPart("grpo_mega.algorithm.advantages.group_relative:group_mean"),
        "leave_one_out": AlgorithmPart("grpo_mega.algorithm.advantages.group_relative:leave_one_out"),
        "process": AlgorithmPart("grpo_mega.algorithm.advantages.process:process"),
        "batch": AlgorithmPart("grpo_mega.algorithm.advantages.whitened:batch"),
        "group_batch": AlgorithmPart("grpo_mega.algorithm.advantages.whitened:group_batch"),
        "gae": AlgorithmPart("grpo_mega.algorithm.advantages.gae:gae", ("gamma", "gae_lambda")),
    },
}
"""Value of `algorithm.surrogate` or `algorithm.advantage` -> the function."""

_ARGUMENTS: Mapping[PartKind, tuple[str, ...]] = {
    "surrogate": ("log_probs", "log_ratio", "advantages", "segments"),
    "advantage": ("step",),
}
"""Positional arguments of each kind of function; `grpo_mega.algorithm.base` describes them."""

_WHAT: Mapping[PartKind, str] = {"surrogate": "surrogate", "advantage": "advantage estimator"}
_CATALOGUES = {
    kind: Catalogue(_WHAT[kind], {name: part.path for name, part in parts.items()}, _DECLARATION, key=kind)
    for kind, parts in PARTS.items()
}


class AlgorithmSection(Protocol):
    """The keys of the config section `algorithm` that name functions."""

    @property
    def surrogate(self) -> str: ...

    @property
    def advantage(self) -> str: ...


def find_part(kind: PartKind, name: str) -> Callable[..., Any]:
    """Import and return the function that `algorithm.<kind>` names.

    Raises:
        UserError: the name is unknown, the module cannot be imported, or the function is declared as the other kind or
            takes other arguments.
    """
    function = _CATALOGUES[kind].find("algorithm", name)
    declared = getattr(function, _DECLARATION, kind)
    if declared != kind:
        raise UserError(
            f"algorithm.{kind}={name!r} is declared with @grpo_mega.algorithm.{declared}",
            remedy=f"set algorithm.{declared} to it, or put `@grpo_mega.algorithm.{kind}` above the function",
        )
    if not inspect.isfunction(function) or not _takes(function, _ARGUMENTS[kind]):
        raise UserError(
            f"algorithm.{kind}={name!r} must be a function of {len(_ARGUMENTS[kind])} positional argument(s)",
            remedy=f"write it as def {getattr(function, '__name__', kind)}({', '.join(_ARGUMENTS[kind])}, *, keys ...)",
        )
    return function


def _takes(function: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    """Return True if the function can be called with these positional arguments and its keyword-only parameters."""
    signature = inspect.signature(function)
    keys = {p.name: None for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    try:
        signature.bind(*arguments, **keys)
    except TypeError:
        return False
    return True


def part_keys(kind: PartKind, name: str, known: Mapping[str, object]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of `algorithm` that the function requires, and those that it can read.

    Args:
        kind: which key names the function.
        name: value of that key.
        known: all keys of `algorithm`.

    Raises:
        UserError: see `find_part`; or a keyword-only parameter of the function is not a key of `algorithm`.
    """
    if (builtin := PARTS[kind].get(name)) is not None:
        return builtin.required, builtin.optional
    required, optional = signature_keys(find_part(kind, name))
    for key in (*required, *optional):
        if key not in known:
            raise UserError(
                f"algorithm.{kind}={name!r}: its parameter {key!r} is not a key of algorithm",
                remedy="rename the parameter to a key of docs/reference/config.md, or make it a constant",
            )
    return required, optional


def signature_keys(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the keyword-only parameters without and with a default."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    required = tuple(p.name for p in parameters if p.default is p.empty)
    return required, tuple(p.name for p in parameters if p.default is not p.empty)


def bound_part(kind: PartKind, algorithm: AlgorithmSection) -> Callable[..., Any]:
    """Return the function that `algorithm.<kind>` names, with its keyword-only parameters filled in from the config.

    Raises:
        UserError: see `find_part`.
    """
    function = find_part(kind, getattr(algorithm, kind))
    required, optional = signature_keys(function)
    return partial(function, **{key: getattr(algorithm, key) for key in (*required, *optional)})
