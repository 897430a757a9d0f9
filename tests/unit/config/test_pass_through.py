"""Arguments passed through to another package: each error, and the values that YAML can write."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from grpo_mega.config.pass_through import check_arguments, dataclass_types, type_fault
from grpo_mega.types import UserError


class Color(enum.Enum):
    RED = "red"


@dataclass
class Inner:
    depth: int = 1


@dataclass
class Base:
    block_size: int | None = None
    backend: Literal["triton", "cutlass"] = "triton"


@dataclass
class Target(Base):
    enforce_eager: bool = False
    share: float = 0.5
    sizes: tuple[int, ...] = ()
    color: Color = Color.RED
    inner: Inner = field(default_factory=Inner)
    unknown: NotDefinedAnywhere = None  # type: ignore[name-defined]  # noqa: F821
    derived: int = field(default=0, init=False)


TYPES = dataclass_types(Target)
OWNED = {"seed": "run.seed", "load_format": ""}


def check_given(**given: Any) -> None:
    check_arguments("engine.args", given, TYPES, OWNED, "vLLM's EngineArgs")


def message_of(**given: Any) -> str:
    with pytest.raises(UserError) as raised:
        check_given(**given)
    return str(raised.value)


def test_fields_of_all_base_classes_are_used_except_those_that_the_constructor_lacks() -> None:
    assert list(TYPES) == ["block_size", "backend", "enforce_eager", "share", "sizes", "color", "inner", "unknown"]
    assert TYPES["block_size"] == int | None
    assert TYPES["unknown"] is Any


def test_values_of_the_declared_types_are_accepted() -> None:
    check_given(block_size=None, backend="cutlass", enforce_eager=True, share=1, sizes=[1, 2], color="red")
    check_given(inner={"depth": 3}, unknown=object())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enforce_eagr": True}, ["engine.args.enforce_eagr=True", "did you mean enforce_eager?"]),
        ({"zzz": 1}, ["engine.args.zzz=1", "vLLM's EngineArgs", "remove engine.args.zzz"]),
        ({"enforce_eager": 1}, ["engine.args.enforce_eager=1", "boolean"]),
        ({"block_size": "3"}, ["engine.args.block_size='3'", "integer"]),
        ({"backend": "other"}, ["engine.args.backend='other'", "'triton' or 'cutlass'"]),
        ({"sizes": [1, "a"]}, ["engine.args.sizes=[1, 'a']", "integer"]),
        ({"inner": {"depth": "a"}}, ["engine.args.inner", "integer"]),
        ({"seed": 3}, ["engine.args.seed=3", "set run.seed"]),
        ({"load_format": "auto"}, ["engine.args.load_format='auto'", "remove engine.args.load_format"]),
    ],
)
def test_a_message_names_key_value_and_remedy(given: dict[str, Any], words: list[str]) -> None:
    message = message_of(**given)
    assert [word for word in words if word not in message] == [], message


def test_a_value_that_fits_no_part_of_a_union_is_reported_with_the_union() -> None:
    assert type_fault([1], int | str) == "must be of type int | str"
