"""Base class of all sections of the config."""

from __future__ import annotations

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
