"""Schedules: the worked numbers of the papers' recipes."""

from __future__ import annotations

import math

import pytest

from raysemi.ops.schedules import ema_decay, poly, rampup


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-3), (1, 9.90995e-4), (50, 5.35887e-4), (99, 1.58489e-5), (100, 0.0)])
def test_worked_poly(step, rate):
    assert 1e-3 * poly(step, 100) == pytest.approx(rate, rel=1e-5)


def test_poly_stays_at_its_end():
    assert poly(101, 100) == 0.0
    assert poly(30, 40, power=1.0) == pytest.approx(0.25)


def test_worked_average():
    teacher = -100.0  # forgotten at once
    for step, (student, expected) in enumerate([(1, 1), (2, 1.5), (4, 2.3333), (8, 3.75)]):
        decay = ema_decay(step, 0.996)
        teacher = decay * teacher + (1 - decay) * student
        assert teacher == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("cap", "first"), [(0.996, 249), (0.999, 999), (0.99, 99)])
def test_decay_reaches_its_cap(cap, first):
    assert ema_decay(first - 1, cap) < cap
    assert ema_decay(first, cap) == pytest.approx(cap)
    assert ema_decay(10**6, cap) == cap
    assert [round(ema_decay(i, cap), 4) for i in range(4)] == [0.0, 0.5, 0.6667, 0.75]


def test_rampup_rises_to_its_end_and_stays():
    assert rampup(0, 100) == pytest.approx(math.exp(-5))
    assert rampup(50, 100) == pytest.approx(math.exp(-1.25))
    assert rampup(100, 100) == rampup(101, 100) == 1.0
    assert rampup(0, 0) == 1.0
