"""Checks of arguments that a config passes through to another package: names, types and who else sets them.

`engine.args` reaches vLLM's `EngineArgs` or SGLang's `ServerArgs`; `parallel.megatron` reaches Megatron's
`TransformerConfig`. Each caller supplies the fields of the installed class and a table of the fields that this program
sets itself. The checks run before a process group exists. Asserted by tests/unit/config/test_pass_through.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

from grpo_mega.types import UserError


def check_arguments(
    key: str, given: Mapping[str, Any], fields: Mapping[str, Any], owned: Mapping[str, str], target: str
) -> None:
    """Check that every given argument exists in the target class, has its type, and may be set by the user.

    Args:
        key: the config key that holds the arguments, for example `engine.args`.
        given: the arguments, name -> value, as YAML gave them.
        fields: name -> type of every field of the target class; `Any` accepts each value (`dataclass_types`).
        owned: name -> config key of the fields that this program sets; an empty text where no key sets the field.
        target: the name of the target class in messages, for example `vLLM's EngineArgs`.

    Raises:
        UserError: an argument is unknown (names the nearest one), is set by this program (names the config key), or
            has the wrong type.
    """
    for name, value in given.items():
        where = f"{key}.{name}={value!r}"
        if name in owned:
            own = owned[name]
            raise UserError(
                f"{where}: the program sets {name} of {target} itself" + (f", from {own}" if own else ""),
                remedy=f"set {own}" if own else f"remove {key}.{name}",
            )
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1, cutoff=0.5)
            raise UserError(
                f"{where}: no field of this name exists in {target}",
                remedy=f"did you mean {near[0]}?" if near else f"remove {key}.{name}",
            )
        fault = type_fault(value, fields[name])
        if fault is not None:
            raise UserError(f"{where}: {fault}", remedy=f"give the type that {target} declares")


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
