"""Reward `json_schema`: the completion is JSON that a schema accepts.

The schema is the argument `schema`, or, per prompt, the reference. Nothing is downloaded: a `$ref` to another document
is an error. A scoring has a limit of CPU time, because a pattern of the schema (`^(a+)+$`) may backtrack without end.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NoReturn

import jsonschema
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import extend, validator_for
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from grpo_mega.rewards.base import reward
from grpo_mega.rewards.cpu_limit import within_cpu_seconds
from grpo_mega.rewards.fenced_blocks import FencedBlock, fenced_blocks
from grpo_mega.rewards.json_patterns import translate_patterns
from grpo_mega.rewards.thought import answer_part
from grpo_mega.types import UserError


def check_json_schema_args(schema: Mapping[str, Any] | None = None, cpu_seconds: float = 2.0) -> None:
    """Check the arguments of `json_schema`.

    Raises:
        UserError: the schema is not a JSON schema, or `cpu_seconds` is out of range; the message says why.
    """
    if isinstance(cpu_seconds, bool) or not isinstance(cpu_seconds, int | float) or not 0 < cpu_seconds < 3600:
        raise UserError(
            f"cpu_seconds={cpu_seconds!r} must be a number of seconds above 0", remedy="use for example 2.0"
        )
    if schema is None:
        return
    if not isinstance(schema, Mapping):
        raise UserError(
            f"schema={schema!r} must be an object, got {type(schema).__name__}", remedy="write a JSON schema"
        )
    try:
        _validator(json.dumps(schema))
    except (ValueError, TypeError) as error:
        raise UserError(f"schema is not a JSON schema ({error})", remedy="correct it") from error


@reward(low=0.0, high=1.0, check_args=check_json_schema_args)
def json_schema(
    prompt: str,
    completion: str,
    reference: str,
    schema: Mapping[str, Any] | None = None,
    cpu_seconds: float = 2.0,
) -> float:
    """Return 1 when the completion is one JSON value that the schema accepts, else 0.

    Args:
        prompt: if it ends with an opened thought, the completion begins inside of it.
        completion: only JSON, or a text with one fenced block of JSON and no other object; thoughts are left out.
        reference: the schema as JSON text, when `schema` is unset.
        schema: the schema of all prompts.
        cpu_seconds: CPU time of one scoring.

    Raises:
        ValueError: the reference is not a JSON schema.
        TimeoutError: the scoring used `cpu_seconds`. The rollout gets the floor and is counted as a failed scoring.
    """
    validator = _validator(json.dumps(schema) if schema is not None else reference)
    result = within_cpu_seconds(cpu_seconds, lambda: _accepts(validator, answer_part(prompt, completion)))
    if result is None:
        raise TimeoutError(f"cpu_seconds={cpu_seconds:g} were used; simplify the patterns of the schema")
    return result


def _accepts(validator: jsonschema.protocols.Validator, answer: str) -> float:
    try:
        text = _json_of(answer)
        value = json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_object_of)
        return float(validator.is_valid(value))
    except (ValueError, RecursionError, OverflowError):
        return 0.0


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> jsonschema.protocols.Validator:
    try:
        document = translate_patterns(json.loads(schema))
        kind = validator_for(document, default=Draft202012Validator)
        kind.check_schema(document)
        resolver = REGISTRY.resolver_with_root(Resource.from_contents(document, default_specification=DRAFT202012))
        for reference in _references(document):
            resolver.lookup(reference)
    except SchemaError as error:
        raise ValueError(f"at {error.json_path}: {error.message}") from error
    except Unresolvable as error:
        raise ValueError(f"$ref {error.ref!r} was not found; write its content into the schema") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the reference {schema[:80]!r} is not a JSON schema ({error}); correct the data") from error
    validator: jsonschema.protocols.Validator = extend(kind, {"multipleOf": _multiple_of})(document, registry=REGISTRY)
    return validator


def _multiple_of(
    _validator: object, divisor: float, instance: object, _schema: object
) -> Iterator[jsonschema.ValidationError]:
    """Yield an error if a number is no multiple: 0.3 is one of 0.1, as decimals are read and not as floats round."""
    if isinstance(instance, bool) or not isinstance(instance, int | float):
        return
    if not math.isfinite(instance) or Fraction(str(instance)) % Fraction(str(divisor)):
        yield jsonschema.ValidationError(f"{instance} is not a multiple of {divisor}")


def _references(document: object) -> Iterator[str]:
    """Yield the value of every `$ref` in the document, at any depth."""
    if isinstance(document, Mapping):
        if isinstance(document.get("$ref"), str):
            yield document["$ref"]
        for value in document.values():
            yield from _references(value)
    elif isinstance(document, list):
        for value in document:
            yield from _references(value)


def _json_of(answer: str) -> str:
    """Return the only fenced block if there is no object outside of it, else the whole answer.

    A block may also end at a fence with text behind it, if no other block has any content.
    """
    filled: FencedBlock | None = None
    is_last = False
    for block in fenced_blocks(answer):
        is_last = False
        if block.content.strip():
            if filled is not None:
                return answer
            filled, is_last = block, True
    if filled is None or filled.label not in ("", "json"):
        return answer
    is_ended = filled.is_closed or not is_last
    return filled.content if is_ended and answer.count("{") == filled.content.count("{") else answer


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object; a name that occurs twice would offer two values for one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has two members of the same name")
    return found


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
