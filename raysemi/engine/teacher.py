"""The averaged copy of the student: a teacher, or only the network that is evaluated. In eval mode between steps.

Source: EMA as in UniMatch V2 (d = min(1 - 1/(i+1), decay), buffers averaged too), copied at first and with statistics
of its own as in U2PL; `period` is DerProp eq. 6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from raysemi.methods.base import Average
from raysemi.ops import schedules

Network = TypeVar("Network", bound=nn.Module)
Parts = Callable[[], Iterable[Mapping[str, Tensor]]]
"""Gives a network's state by name, in parts: for one whose weights are whole only piece by piece."""


class AveragedCopy(Generic[Network]):
    """An average of the student's weights over the run.

    Args:
        student: the network; its present weights are where the average begins.
        average: the rule; its kind is not `none`.
        period: steps between two updates of the kind `period`; and of which `start` and `copied` count.
    """

    def __init__(self, student: Network, average: Average, period: int) -> None:
        self._average = average
        self._period = period
        self.model: Network = copy.deepcopy(student).requires_grad_(False).eval()
        self.started = average.kind == "ema"
        """False until the first update of kind `period`: before it the student itself is evaluated."""

    def before_step(self, student: nn.Module | Parts, step: int) -> None:
        """`at: start` (the reference of DerProp): averages at the start of every period but the first.

        Args:
            student: the network before the step, or its state in parts.
            step: global step, from 0.
        """
        if self._average.kind == "period" and self._average.at == "start" and step and step % self._period == 0:
            self._blend(student, 1.0 - self._average.ratio)
            self.started = True

    def after_step(self, student: nn.Module | Parts, step: int, finite: Tensor) -> None:
        """The update that follows optimizer step `step` (from 0).

        Args:
            student: the network after the step, or its state in parts.
            step: global step, from 0.
            finite: bool scalar on the device; where False, an EMA stays as it is (its student did not move).
        """
        if self._average.kind == "ema":
            counted = step - self._average.start * self._period
            copied = counted < self._average.copied * self._period
            share = 1.0 if copied else 1.0 - schedules.ema_decay(counted, self._average.decay)
            # statistics of its own are left alone from the first step on in which the method's passes move them
            self._blend(student, share, finite, only_weights=self._average.buffers == "own" and counted >= 0)
        elif self._average.at == "end" and (step + 1) % self._period == 0:
            self._blend(student, 1.0 - self._average.ratio)
            self.started = True

    @torch.no_grad()
    def _blend(
        self, student: nn.Module | Parts, share: float, finite: Tensor | None = None, only_weights: bool = False
    ) -> None:
        mine = self.model.state_dict()
        if only_weights:
            mine = {name: mine[name] for name, _ in self.model.named_parameters()}
        for theirs in (student.state_dict(),) if isinstance(student, nn.Module) else student():
            self._blend_part({name: mine[name] for name in theirs if name in mine}, theirs, share, finite)

    @staticmethod
    def _blend_part(
        mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], share: float, finite: Tensor | None
    ) -> None:
        averaged = [name for name, value in mine.items() if value.is_floating_point()]
        new = [theirs[name] for name in averaged]
        old = [mine[name] for name in averaged]
        if averaged:
            masked = torch.ones((), device=old[0].device) if finite is None else finite.to(torch.float32)
            moves = torch._foreach_sub(new, old)
            if share < 0.5:  # as torch.lerp: exact at both ends, and a constant stays the same constant
                torch._foreach_mul_(moves, masked * share)
                torch._foreach_add_(old, moves)
            else:
                torch._foreach_mul_(moves, 1.0 - masked * share)
                torch._foreach_copy_(old, torch._foreach_sub(new, moves))
        for name, value in mine.items():
            if not value.is_floating_point():
                value.copy_(theirs[name])  # BatchNorm's counters
