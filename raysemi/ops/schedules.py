"""Numbers that follow the step: pure functions, so that a resumed run needs no state for them."""

from __future__ import annotations

import math


def poly(step: int, steps: int, power: float = 0.9) -> float:
    """Polynomial decay (1 - step / steps) ** power: 1 at step 0, 0 at the end.

    Args:
        step: from 0; taken before the optimizer's update.
        steps: length of the schedule.
        power: exponent.
    """
    return (1.0 - min(step, steps) / steps) ** power


def rampup(step: int, length: float) -> float:
    """exp(-5 (1 - step / length)^2): 0.0067 at step 0, 1 from `length` on. Laine and Aila 2017, arXiv:1610.02242.

    Args:
        step: from 0.
        length: steps of the rise; 0 = 1 at once.
    """
    return math.exp(-5.0 * (1.0 - step / length) ** 2) if step < length else 1.0


def linear(step: int, length: float) -> float:
    """step / length: 0 at step 0, 1 from `length` on.

    Args:
        step: from 0.
        length: steps of the rise; 0 = 1 at once.
    """
    return step / length if step < length else 1.0


def ema_decay(step: int, max_decay: float) -> float:
    """Share that an averaged copy keeps at step `step` (from 0): min(1 - 1 / (step + 1), max_decay).

    0 at step 0: the copy becomes the student. Until the cap it is the plain mean of all students so far.
    """
    return min(1.0 - 1.0 / (step + 1), max_decay)
