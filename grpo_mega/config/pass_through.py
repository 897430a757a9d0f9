"""Checks of arguments that a config passes through to another package: names, types, limits and who else sets them.

`engine.args` reaches vLLM's `EngineArgs` or SGLang's `ServerArgs`; `parallel.megatron` reaches Megatron's configs. Each
caller supplies the fields of the installed class, their limits, and a table of the fields that this program sets
itself. The checks run before a process group exists. Asserted by tests/unit/config/test_pass_through.py.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

from grpo_mega.config.json_values import require_json_values
from grpo_mega.config.nearest_name import nearest_name
from grpo_mega.types import UserError

_SIZE_WORDS = {"size", "sizes", "num", "max", "bytes", "gb", "mb", "tokens", "layers", "seqs", "reqs", "requests"}
_SIZE_WORDS |= {"threads", "workers", "capacity", "length"}
_NEGATIVE_MEANING = re.compile(r"-\s?1\b|negative|<=? ?0\b")


@dataclasses.dataclass(frozen=True)
class ValueLimit:
    """Limits of a field: bounds of a number, or the accepted values. They hold for each element of a list."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[Any, ...] = ()

    def rule(self, value: Any) -> str | None:
        """Return the rule that a value breaks, in the form "be at least 1", or None. None itself breaks no rule."""
        if isinstance(value, list | tuple):
            return next((rule for rule in map(self.rule, value) if rule is not None), None)
        if self.choices and value is not None and value not in self.choices:
            return f"be one of {', '.join(map(str, self.choices))}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        bounds: list[tuple[str, float | None, Callable[[float, float], bool]]] = [
            ("at least", self.ge, operator.ge),
            ("greater than", self.gt, operator.gt),
            ("at most", self.le, operator.le),
            ("less than", self.lt, operator.lt),
        ]
        known = [(words, bound, holds(value, bound)) for words, bound, holds in bounds if bound is not None]
        text = " and ".join(f"{words} {bound:g}" for words, bound, _ in known)
        return None if all(holds for _, _, holds in known) else f"be {text}"


def size_limit(name: str, default: Any, description: str) -> ValueLimit | None:
    """Return the limit of a field that is a size or a count by its name, where the class declares no limit itself.

    None: the name is none of a size, or a negative value has a meaning by the default or the description.
    """
    is_size = any(word in _SIZE_WORDS for word in name.split("_"))
    negative = isinstance(default, int | float) and default < 0
    return ValueLimit(ge=0) if is_size and not negative and not _NEGATIVE_MEANING.search(description) else None


def check_arguments(
    key: str,
    given: Mapping[str, Any],
    fields: Mapping[str, Any],
    owned: Mapping[str, str],
    target: str,
    limits: Mapping[str, ValueLimit] = types.MappingProxyType({}),
) -> None:
    """Check that every given argument exists in the target class, is accepted by it, and may be set by the user.

    Args:
        key: the config key that holds the arguments, for example `engine.args`.
        given: the arguments, name -> value, as YAML gave them.
        fields: name -> type of every field of the target class; `Any` accepts each value (`dataclass_types`).
        owned: name -> config key of the fields that this program sets; an empty text where no key sets the field.
        target: the name of the target class in messages, for example `vLLM's EngineArgs`.
        limits: name -> limit of the fields that have one.

    Raises:
        UserError: an argument is unknown (names the nearest one), is set by this program (names the config key), has
            the wrong type, is outside of the limits, or is no plain data.
    """
    require_json_values(key, given, text_keys=False)
    for name, value in given.items():
        where = f"{key}.{name}={value!r}"
        if name in owned:
            own = owned[name]
            raise UserError(
                f"{where}: the program sets {name} of {target} itself" + (f", from {own}" if own else ""),
                remedy=f"set {own}" if own else f"remove {key}.{name}",
            )
        if name not in fields:
            raise UserError(
                f"{where}: no field of this name exists in {target}",
                remedy=unknown_name_remedy(f"{key}.{name}", name, [*fields], owned),
            )
        fault = type_fault(value, fields[name])
        if fault is not None:
            raise UserError(f"{where}: {fault}", remedy=f"give the type that {target} declares")
        rule = limits[name].rule(value) if name in limits else None
        if rule is not None:
            raise UserError(f"{where} must {rule} in {target}", remedy=f"change the value, or remove {key}.{name}")


def unknown_name_remedy(key: str, name: str, known: Sequence[str], owned: Mapping[str, str]) -> str:
    """Return the remedy for an unknown name: the nearest known one and who sets it, or to remove the key."""
    near = nearest_name(name, known)
    if near is None:
        return f"remove {key}"
    if near not in owned:
        return f"did you mean {near}?"
    return f"did you mean {near}? {f'{owned[near]} sets it' if owned[near] else 'The program sets it itself'}"


def type_fault(value: Any, annotation: Any) -> str | None:
    """Return why a value from YAML does not have the annotated type, or None if it has.

    The check is strict, so "3" is no int and 1 is no bool, except for what YAML cannot write: a list is accepted where
    the type is a tuple or a set, a text where it is an enumeration, and a mapping where it is a dataclass.
    """
    if annotation is Any:
        return None
    try:
        _adapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        first, *others = error.errors()
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        return f"must be of type {annotation_text(annotation)}" if others else message
    except (PydanticSchemaGenerationError, PydanticUserError, PydanticUndefinedAnnotation):
        return None  # pydantic cannot describe this type; the target class checks the value itself
    return None


def annotation_text(annotation: Any) -> str:
    """Return a type as its source would write it, without the names of modules."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return "None" if annotation is type(None) else annotation.__name__
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(annotation_text(part) for part in typing.get_args(annotation))
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def dataclass_types(target: type[Any]) -> dict[str, Any]:
    """Return name -> type of every constructor argument of a dataclass; `Any` where a type cannot be resolved."""
    return {each.name: _resolved_type(target, each.name) for each in dataclasses.fields(target) if each.init}


def _resolved_type(target: type[Any], name: str) -> Any:
    """Return the type of one field; its names are looked up in the module of the class that declares the field."""
    owner = next(base for base in target.__mro__ if name in vars(base).get("__annotations__", {}))
    holder = types.SimpleNamespace(__annotations__={name: owner.__annotations__[name]})
    try:
        return typing.get_type_hints(holder, vars(sys.modules[owner.__module__]))[name]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return Any


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a dataclass or a model has a configuration of its own
        return TypeAdapter(annotation)
