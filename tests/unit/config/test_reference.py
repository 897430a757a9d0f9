"""Every key of the config has a description, and docs/reference/config.md is generated from them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from grpo_mega.config.schema import Config
from tools.dev.make_config_reference import REFERENCE, reference, sections

SECTIONS = [("", Config, ""), *sections(Config)]


def test_the_committed_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == reference(), "run python tools/dev/make_config_reference.py"


@pytest.mark.parametrize(("key", "model"), [(key, model) for key, model, _ in SECTIONS])
def test_every_key_and_section_has_a_description(key: str, model: type[BaseModel]) -> None:
    assert model.__doc__, key
    missing = [name for name, field in model.model_fields.items() if len((field.description or "").split()) < 2]
    assert not missing, f"keys of section {key!r} without a description: {missing}"


def test_the_reference_lists_keys_of_nested_sections_and_of_lists() -> None:
    names = [key for key, _, _ in SECTIONS]
    assert {"model.base.architecture", "data.train[]", "data.train[].filters[]", "reward.terms[]"} <= set(names)


@pytest.mark.parametrize(
    "row",
    [
        "| `kl_coef` | number | `0.04` | >= 0 | `changes_future` |",
        "| `steps` | integer | required | >= 1 | `changes_speed` |",
        "| `host_fraction` | number | `0.0` | >= 0, <= 1 |",
        "| `stop` | list of strings | `null` |  |",
        "| `template` | choice | `chat` | `chat`, `plain` | `frozen` |",
    ],
)
def test_a_row_has_type_default_and_range(row: str) -> None:
    assert row in reference()
