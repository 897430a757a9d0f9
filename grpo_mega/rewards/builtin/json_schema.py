"""Reward `json_schema`: the completion is JSON that its schema accepts.

The schema is the argument `schema`, or, per prompt, the reference. Nothing is fetched: a `$ref` to another document
is refused. A pattern of the schema that backtracks for ever is ended by the worker's limit.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jsonschema
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from grpo_mega.rewards.base import reward
from grpo_mega.types import UserError

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*$", re.MULTILINE)


def check_json_schema_args(schema: Mapping[str, Any] | None = None) -> None:
    """Refuse a schema that is none.

    Raises:
        UserError: says what is wrong with it.
    """
    if schema is None:
        return
    if not isinstance(schema, Mapping):
        raise UserError(f"schema={schema!r} is {type(schema).__name__}", remedy="give a JSON schema, an object")
    try:
        _validator(json.dumps(schema))
    except (ValueError, TypeError) as error:
        raise UserError(f"schema is no JSON schema ({error})", remedy="correct it") from error


@reward(low=0.0, high=1.0, check_args=check_json_schema_args)
def json_schema(prompt: str, completion: str, reference: str, schema: Mapping[str, Any] | None = None) -> float:
    """1 when the completion is one JSON value that the schema accepts, else 0.

    Args:
        prompt: not looked at.
        completion: JSON and nothing else, or with one fenced block that is.
        reference: the schema as JSON text, when `schema` is unset.
        schema: of all prompts.

    Raises:
        ValueError: the reference is no JSON schema.
    """
    validator = _validator(json.dumps(schema) if schema is not None else reference)
    try:
        value = json.loads(_json_of(completion), parse_constant=_refuse)
        return float(validator.is_valid(value))
    except (ValueError, RecursionError, OverflowError):
        return 0.0


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> jsonschema.protocols.Validator:
    try:
        document = json.loads(schema)
        kind = validator_for(document, default=Draft202012Validator)
        kind.check_schema(document)
        resolver = REGISTRY.resolver_with_root(Resource.from_contents(document, default_specification=DRAFT202012))
        for reference in _references(document):
            resolver.lookup(reference)
    except SchemaError as error:
        raise ValueError(f"at {error.json_path}: {error.message}") from error
    except Unresolvable as error:
        raise ValueError(f"$ref {error.ref!r} leads nowhere; write what it means into the schema") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the reference {schema[:80]!r} is no JSON schema ({error}); correct the data") from error
    return kind(document, registry=REGISTRY)


def _references(document: object) -> Iterator[str]:
    """What its `$ref` name, wherever they stand."""
    if isinstance(document, Mapping):
        if isinstance(document.get("$ref"), str):
            yield document["$ref"]
        for value in document.values():
            yield from _references(value)
    elif isinstance(document, list):
        for value in document:
            yield from _references(value)


def _json_of(completion: str) -> str:
    """The only fenced block, else everything."""
    fences = list(_FENCE.finditer(completion))
    if len(fences) == 2 and fences[0][1] in ("", "json") and not fences[1][1]:
        return completion[fences[0].end() : fences[1].start()]
    return completion


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
