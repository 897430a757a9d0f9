"""Arguments passed through to another package: each error, and the values that YAML can write."""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from grpo_mega.config.pass_through import ValueLimit, check_arguments, dataclass_types, size_limit, type_fault
from grpo_mega.types import UserError

ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


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
LIMITS = {
    "block_size": ValueLimit(ge=1, lt=64),
    "share": ValueLimit(gt=0, le=1),
    "sizes": ValueLimit(ge=0),
    "color": ValueLimit(choices=("RED", "red")),
}


def check_given(**given: Any) -> None:
    check_arguments("engine.args", given, TYPES | {"seed": int}, OWNED, "vLLM's EngineArgs", LIMITS)


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
    check_given(inner={"depth": 3}, unknown=[1, "a"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enforce_eagr": True}, ["engine.args.enforce_eagr=True", "did you mean enforce_eager?"]),
        ({"sede": 1}, ["engine.args.sede=1", "did you mean seed? run.seed sets it"]),
        ({"block_size": 0}, ["engine.args.block_size=0 must be at least 1 and less than 64", "remove"]),
        ({"block_size": 64}, ["engine.args.block_size=64 must be at least 1 and less than 64"]),
        ({"share": 0.0}, ["engine.args.share=0.0 must be greater than 0 and at most 1"]),
        ({"share": float("nan")}, ["engine.args.share=nan must be greater than 0"]),
        ({"sizes": [1, -1]}, ["engine.args.sizes=[1, -1] must be at least 0"]),
        ({"backend": dt.date(2026, 1, 2)}, ["engine.args.backend=2026-01-02", "put quotes around it"]),
        ({"inner": {"depth": ENDLESS}}, ["engine.args.inner.depth[0]", "alias"]),
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


@pytest.mark.parametrize("name", ["zzz", "enforce", "bl", "backend_of_the_block", "e" * 400])
def test_a_name_that_is_near_to_none_is_answered_without_a_suggestion(name: str) -> None:
    assert "did you mean" not in message_of(**{name: 1})


def test_a_mapping_may_have_numbers_as_keys() -> None:
    check_given(unknown={1: "a"})


@pytest.mark.parametrize(
    ("name", "default", "description", "limited"),
    [
        ("bucket_size", None, "", True),
        ("max_loras", 1, "Most adapters.", True),
        ("resize", 0, "", False),
        ("temperature", 1.0, "", False),
        ("max_states", -1, "", False),
        ("chunk_size", None, "Set to -1 to disable.", False),
        ("num_workers", 0, "A negative number means all cores.", False),
        ("cache_size", 1, "<= 0 disables the cache", False),
    ],
)
def test_a_size_without_a_limit_of_its_own_must_not_be_negative(
    name: str, default: Any, description: str, limited: bool
) -> None:
    limit = size_limit(name, default, description)
    assert (limit is not None and limit.rule(-1) == "be at least 0" and limit.rule(0) is None) == limited


def test_a_limit_accepts_none_and_says_nothing_about_text_or_booleans() -> None:
    for value in (None, True, "many", []):
        assert ValueLimit(ge=2).rule(value) is None
    assert ValueLimit(choices=("a",)).rule(None) is None


def test_a_value_that_fits_no_part_of_a_union_is_reported_with_the_union() -> None:
    assert type_fault([1], int | str) == "must be of type int | str"
