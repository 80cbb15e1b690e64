"""What every config does with settings that are given in part."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import ValidationError

from raysemi.base import Config, PresetConfig


class Mix(Config):
    p: float = 0.5
    area: float = 0.1
    sides: tuple[int, ...] = (1, 2)


class Taught(PresetConfig):
    presets = {"plain": {}, "city": {"threshold": 0.0, "mix": {"area": 0.3, "sides": (7,)}}}  # noqa: RUF012
    preset: Literal["plain", "city"] = "plain"
    threshold: float = 0.7
    mix: Mix = Mix(p=0.9)


def test_what_is_given_wins_over_the_preset_and_both_over_the_defaults() -> None:
    assert Taught(preset="plain") == Taught()
    assert Taught(preset="city").threshold == 0.0
    city = Taught(**{"preset": "city", "threshold": 0.4, "mix": {"sides": [3, 4]}})
    assert city.threshold == 0.4
    # p of the field's own default, area of the preset, sides as given: whole, not joined with the preset's
    assert city.mix == Mix(p=0.9, area=0.3, sides=(3, 4))
    assert Taught(preset="city", mix=Mix(p=0.2)).mix == Mix(p=0.2)
    assert Taught.presets["city"] == {"threshold": 0.0, "mix": {"area": 0.3, "sides": (7,)}}


@pytest.mark.parametrize("wrong", ["town", ["city"], None, 3])
def test_a_preset_that_does_not_exist_is_a_fault_of_preset_alone(wrong: object) -> None:
    with pytest.raises(ValidationError) as error:
        Taught(**{"preset": wrong})
    assert [fault["loc"] for fault in error.value.errors()] == [("preset",)]
