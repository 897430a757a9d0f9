"""Reader of the rotary embedding settings of a `config.json`.

They are `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from grpo_mega.models.config_fields import Fields
from grpo_mega.models.spec import RopeScaling, yarn_mscale
from grpo_mega.types import UserError

_KNOWN = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    },
}


@dataclass(frozen=True)
class Rope:
    """The base of the frequencies, the fraction of a head that is rotated, and the scaling, if any."""

    theta: float
    fraction: float
    scaling: RopeScaling | None


def read_rope(
    fields: Fields, max_positions: int, kinds: Collection[str], *, theta: float = 10000.0, fraction: float = 1.0
) -> Rope:
    """Read the rotary settings.

    Args:
        fields: the config.
        max_positions: positions of the model.
        kinds: the supported scalings of the family.
        theta: default of `rope_theta`.
        fraction: default of `partial_rotary_factor`.

    Raises:
        UserError: the scaling is not supported, a setting is missing or unknown, or two places contradict each other.
    """
    given = _merged(fields)
    kind = given.pop("rope_type", "default")
    theta = _number(fields, "rope_theta", given.pop("rope_theta", theta))
    fraction = _number(fields, "partial_rotary_factor", given.pop("partial_rotary_factor", fraction))
    if kind == "default":
        _reject_rest(fields, kind, given, set())
        return Rope(theta, fraction, None)
    if kind not in kinds:
        fields.reject(f"rope_type={kind}")
    _reject_rest(fields, kind, given, _KNOWN[kind])
    return Rope(theta, fraction, _scaling(fields, kind, given, max_positions))


def _merged(fields: Fields) -> dict[str, Any]:
    """Return the settings of all places.

    Raises:
        UserError: two places give a setting different values.
    """
    places = {name: fields.take(name, default={}) for name in ("rope_parameters", "rope_scaling")}
    for name, found in places.items():
        if not isinstance(found, dict):
            raise UserError(f"{fields.where}: {name}={found} must be a JSON object", remedy="download the file again")
        for key, value in found.items():
            if isinstance(value, dict):
                fields.reject(f"{name}.{key} (separate rotary settings)")
    outer = ("rope_theta", "partial_rotary_factor")
    places["config"] = {name: fields.take(name) for name in outer}
    merged: dict[str, Any] = {}
    for found in places.values():
        for spelling, value in found.items():
            key = "rope_type" if spelling == "type" else spelling
            if value is not None and merged.setdefault(key, value) != value:
                raise UserError(
                    f"{fields.where}: {key}={merged[key]} and {key}={value} contradict each other (in rope_parameters, "
                    "rope_scaling or beside them)",
                    remedy="remove one of them",
                )
    return merged


def _scaling(fields: Fields, kind: str, given: dict[str, Any], max_positions: int) -> RopeScaling:
    name = "original_max_position_embeddings"
    original = int(_number(fields, name, given.get(name, max_positions)))
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    for name in needed:
        if name not in given:
            raise UserError(f"{fields.where}: rope_type={kind} needs {name}", remedy="download the file again")
    factor = _number(fields, "factor", given["factor"])
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "llama3":
        low, high = (_number(fields, key, given[key]) for key in needed[1:])
        return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    mscale, all_dim = (_number(fields, key, given.get(key) or 0.0) for key in ("mscale", "mscale_all_dim"))
    attention = given.get("attention_factor")
    if attention is None:
        both = mscale and all_dim
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if both else yarn_mscale(factor, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=_number(fields, "beta_fast", given.get("beta_fast") or 32.0),
        beta_slow=_number(fields, "beta_slow", given.get("beta_slow") or 1.0),
        mscale_all_dim=all_dim,
        attention_factor=_number(fields, "attention_factor", attention),
        truncate=bool(given.get("truncate", True)),
    )


def _reject_rest(fields: Fields, kind: str, given: dict[str, Any], known: set[str]) -> None:
    for name in sorted(given.keys() - known):
        fields.reject(f"{name}={given[name]} with rope_type={kind}")


def _number(fields: Fields, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{fields.where}: {name}={value} must be a number", remedy="download the file again")
    return float(value)
