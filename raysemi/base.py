"""The base of every component's config, and how a hyper-parameter states its unit and its search range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """A frozen part of the config tree: unknown keys are refused, the string under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _section_given_in_part(cls, data: Any) -> Any:
        """Keys that a field's own default sets stay when the user gives other keys of that section."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Config) and isinstance(data.get(name), dict):
                own = {key: getattr(field.default, key) for key in field.default.model_fields_set}
                kept[name] = own | data[name]
        return data | kept


class PresetConfig(Config):
    """A config whose `preset` chooses a set of defaults: they lie below what is given, section by section.

    A subclass has a field `preset` with a name of each set.
    """

    presets: ClassVar[Mapping[str, dict[str, Any]]] = {}
    """Preset -> the defaults that it changes."""

    @model_validator(mode="before")
    @classmethod
    def _preset_below_given(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        return _merged(cls.presets[preset], data) if isinstance(preset, str) and preset in cls.presets else data


def _merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    result = dict(defaults)
    for key, value in given.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


Requires = Mapping[str, Sequence[Any]]
"""Settings of the same section -> values; a range is worth a search where each has one of its values."""


def search(
    low: float, high: float, *, log: bool = False, unit: str = "", requires: Requires | None = None
) -> dict[str, Any]:
    """Search range of a number, for `Field(json_schema_extra=search(...))`: what `raysemi tune` draws from.

    Args:
        low, high: ends of the range, both included.
        log: draw uniformly in the logarithm.
        unit: unit of the value, for tables.
        requires: other settings without which the value would change nothing, or be out of place.
    """
    return {"search": {"low": low, "high": high, "log": log}, "unit": unit, "requires": dict(requires or {})}


def choices(
    values: Sequence[Any],
    *,
    unit: str = "",
    requires: Requires | None = None,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Search range of a setting with few values.

    Args:
        values: all of them; one that a method's config refuses is not offered for it.
        unit: see `search`.
        requires: see `search`.
        beside: value -> settings (dotted, from the same section on) that must be set with it.
    """
    found: dict[str, Any] = {"choices": list(values)}
    if beside:
        found["beside"] = {value: dict(given) for value, given in beside.items()}
    return {"search": found, "unit": unit, "requires": dict(requires or {})}
