"""Micro-batches: a rank's share of a step in several parts, one after the other, with the numbers of one.

A micro-batch is a rank to the method: M of them on each of W ranks are W x M ranks, and what holds of any number of
ranks holds of them. Their sums, maxima and gathered values are made before the pass that trains, and handed out in it:
the parts are passed until each asks for what is not known yet; that is joined over parts and ranks, and they are passed
again. Where the data alone says what a method divides by (`Method.normalisers`), no network is asked; else these passes
are made without gradient, one more than the method makes collectives, and leave no trace in buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from raysemi.data.types import SemiBatch
from raysemi.engine.gradients import stacked_normalisers
from raysemi.engine.strategy import StepBuffers, StepModule, Strategy, autocast
from raysemi.methods.base import AcrossRanks, StepContext
from raysemi.models.segmentor import Segmentor

_Kind = Literal["sum", "max", "gather"]


class _Answer(NamedTuple):
    """What all micro-batches of all ranks get."""

    kind: _Kind
    value: Tensor


class _Asked(RuntimeError):
    """Something that is not known yet."""

    def __init__(self, kind: _Kind, value: Tensor) -> None:
        super().__init__(f"a method must make the same collectives in each pass over a step; got one more {kind}")
        self.kind = kind
        self.value = value.detach()


class MicroRank:
    """A micro-batch among those of all ranks: an `AcrossRanks` whose answers are known, in the order of the questions.

    Args:
        across: the ranks.
        part: which of its rank's micro-batches it is, from 0.
        parts: how many each rank has.
        known: the answers so far.
    """

    def __init__(self, across: AcrossRanks, part: int, parts: int, known: Sequence[_Answer]) -> None:
        self.rank = across.rank * parts + part
        self.world = across.world * parts
        self._known = iter(known)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all micro-batches of all ranks."""
        return self._answer("sum", value)

    def max(self, value: Tensor) -> Tensor:
        """Maximum over them."""
        return self._answer("max", value)

    def gather(self, value: Tensor) -> Tensor:
        """Their values in the order of their slots: [ranks x parts, ...]."""
        return self._answer("gather", value)

    def _answer(self, kind: _Kind, value: Tensor) -> Tensor:
        answer = next(self._known, None)
        if answer is None:
            raise _Asked(kind, value)
        shape = (self.world, *value.shape) if kind == "gather" else value.shape
        if (answer.kind, answer.value.shape) != (kind, shape):
            raise RuntimeError(
                f"a method must make the same collectives in each pass over a step; got {kind} of {tuple(value.shape)} "
                f"in place of {answer.kind}, {tuple(answer.value.shape)}"
            )
        return answer.value.clone()  # as a collective's result, it belongs to who asked


class MicroBatches:
    """Makes contexts in which the parts of a step give the gradient of the whole.

    Args:
        module: student and method.
        strategy: has the student's weights.
        across: the ranks.
        device: this rank's device.
        precision: autocast type.
        teacher: a network whose BatchNorm statistics the method's own passes move, besides the student's.
    """

    def __init__(
        self,
        module: StepModule,
        strategy: Strategy,
        across: AcrossRanks,
        device: torch.device,
        *,
        precision: torch.dtype,
        teacher: nn.Module | None,
    ) -> None:
        self._method = module.method
        self._strategy = strategy
        self._across = across
        self._device = device
        self._precision = precision
        self._buffers = StepBuffers(module, across, teacher)
        self._never = torch.zeros((), dtype=torch.bool, device=device)

    @torch.no_grad()
    def contexts(self, parts: Sequence[SemiBatch], context: StepContext) -> list[StepContext]:
        """The context of each part; the given one for a step in one part.

        Args:
            parts: micro-batches of this rank's share, in the order of their slots.
            context: of the step.
        """
        if len(parts) == 1:
            return [context]
        known: list[_Answer] = []
        with ExitStack() as passes:
            student: Segmentor | None = None
            while True:
                asked: list[_Asked] = []
                counts: list[Tensor] = []
                for part, its in zip(parts, self._contexts(context, len(parts), known), strict=True):
                    its = replace(its, listener=None)
                    try:
                        if (found := self._method.normalisers(part, its)) is None:
                            if student is None:
                                passes.enter_context(self._strategy.whole())
                                student = self._strategy.student
                            found = self._passed(part, replace(its, student=student))
                        counts.append(stacked_normalisers(list(found.values())))
                    except _Asked as question:
                        asked.append(question)
                if not asked:
                    break
                known.append(self._join(asked[0].kind, [question.value for question in asked]))
        known.append(self._join("sum", counts))
        return self._contexts(context, len(parts), known)

    def _contexts(self, context: StepContext, parts: int, known: Sequence[_Answer]) -> list[StepContext]:
        ranks = [MicroRank(self._across, part, parts, known) for part in range(parts)]
        return [replace(context, across=rank, parts=parts) for rank in ranks]

    def _passed(self, part: SemiBatch, context: StepContext) -> dict[str, Tensor]:
        """Normalisers of the objectives, from a pass without gradient and trace."""
        self._buffers.begin()
        try:
            with autocast(self._device, self._precision):
                objectives = self._method.objectives(part, context)
        finally:
            self._buffers.end(self._never)
        return {name: objective.normaliser for name, objective in objectives.items()}

    def _join(self, kind: _Kind, values: Sequence[Tensor]) -> _Answer:
        """One collective of the ranks for all of their parts."""
        each = torch.stack(list(values))
        if kind == "sum":
            return _Answer(kind, self._across.sum(each.sum(dim=0, dtype=each.dtype)))
        if kind == "max":
            return _Answer(kind, self._across.max(each.amax(dim=0)))
        return _Answer(kind, self._across.gather(each).flatten(0, 1))
