"""Base class of all sections of the config."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen pydantic model whose unknown keys are errors.

    The string below a field is its description (docs/reference/config.md). A description gives the unit, and says what
    `null` stands for where the default is `null`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


def off_from_yaml(value: Any) -> Any:
    """Return "off" for False, and any other value as it is: YAML 1.1 reads `off` without quotes as False."""
    return "off" if value is False else value
