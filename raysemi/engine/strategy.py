"""How one step is spread over ranks: a single device, or data-parallel replicas.

The whole of a method's forward work runs inside one module's `forward`, so a wrapper that expects one forward and one
backward a step (DistributedDataParallel, DeepSpeed in `zero.py`) fits any method, however many passes it makes. Where
the gradient rule wants each side's gradient by itself, it takes them out of the graph behind the wrapper's back.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysemi.data.types import SemiBatch
from raysemi.engine.gradients import GradientRule, SideLosses, join_ranks, side_loss, uniform_loss
from raysemi.engine.optim import Optimizer
from raysemi.methods.base import AcrossRanks, Method, StepContext
from raysemi.methods.queues import Rings
from raysemi.models.segmentor import Segmentor
from raysemi.ops.schedules import rampup

_log = logging.getLogger(__name__)


class StepModule(nn.Module):
    """Student and method as one module: batch -> losses.

    Args:
        student: what is trained.
        method: how.
        rampup_steps: steps over which the unsupervised side rises to its full weight.
    """

    def __init__(self, student: Segmentor, method: Method, rampup_steps: float = 0.0) -> None:
        super().__init__()
        self.student = student
        self.method = method
        self.rampup_steps = rampup_steps

    def forward(self, batch: SemiBatch, context: StepContext) -> SideLosses:
        """The losses to differentiate, and the value of each objective."""
        objectives = self.method.objectives(batch, context)
        losses = join_ranks(objectives, context.across, context.parts)
        unsupervised = rampup(context.step, self.rampup_steps)
        return SideLosses(
            uniform_loss(objectives, losses, unsupervised),
            side_loss(objectives, losses, "supervised"),
            side_loss(objectives, losses, "unsupervised", unsupervised),
            {name: loss.detach() for name, loss in losses.items()},
        )


class Update(NamedTuple):
    """What became of a step; the same on all ranks."""

    finite: Tensor
    """Bool scalar on the device: False when the step was skipped, since a loss or the gradient was not finite."""
    norm: Tensor
    """Of the global gradient, before it was clipped."""
    counted: dict[str, Tensor]
    """What the gradient rule counts, to be averaged over steps."""


class Strategy(Protocol):
    """How a step is spread over ranks: everything from a rank's share of the batch to the updated weights.

    A step is one or more `accumulate`, the last with `last=True`, then `update`. Every method is called by all ranks,
    equally often and in the same order.
    """

    @property
    def student(self) -> Segmentor:
        """The network that is trained. Its weights are whole within `whole`, and may be elsewhere too."""
        ...

    def accumulate(self, batch: SemiBatch, context: StepContext, *, last: bool = True) -> SideLosses:
        """Runs the method on a part of this rank's share, under autocast, and adds its gradients to the step's.

        Args:
            batch: the part.
            context: of the step.
            last: True when the step has no more parts: gradients then travel.

        Returns:
            This part's losses, without graph. A step's loss, like its gradient, is the sum over its parts.
        """
        ...

    def update(self, step: int) -> Update:
        """Makes one direction of the gradients, by the rule, clips it and moves the weights by it.

        A step that is not finite on any rank leaves weights, moments and buffers of all ranks as they were before it.

        Args:
            step: global step, from 0; sets the learning rate.
        """
        ...

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The student's state by name, in parts whose tensors are whole until the next part is asked for."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Within it `student` has whole weights, and using it, as often as each rank likes, joins no other rank."""
        ...

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """State of `student` and `optimizer` (`parameter name/state name`), whole and in fp32, for any strategy.

        Each rank reads every item once, in the mappings' order, and keeps only its share: a tensor that no rank has
        whole may be gathered when it is read.
        """
        ...

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what the `tensors` of any strategy, at any number of ranks, gave."""
        ...


class StepBuffers:
    """What forward passes write into buffers: made one over ranks, and taken back where the step does not count.

    Args:
        module: student and method.
        across: the ranks.
        teacher: a network whose BatchNorm statistics the method's own passes move, besides the student's.
    """

    def __init__(self, module: StepModule, across: AcrossRanks, teacher: nn.Module | None = None) -> None:
        self._across = across
        networks = [module.student] if teacher is None else [module.student, teacher]
        self._statistics = [buffer for network in networks for buffer in running_statistics(network)]
        self._apart = [buffer for network in networks for buffer in running_statistics(network, equal=False)]
        # large memories note by themselves what a step overwrites; the rest is small and copied
        self._rings = [part for part in module.method.modules() if isinstance(part, Rings)]
        noted = {id(rings.rows_TX) for rings in self._rings}
        self._kept = [*self._statistics, *(b for b in module.method.buffers() if id(b) not in noted)]
        self._before: list[Tensor] | None = None
        self._broken: Tensor | None = None
        self._sums: list[Tensor] = []
        self._parts = 0

    @torch.no_grad()
    def begin(self) -> None:
        """Remembers what the buffers hold before the first pass of a step; its further parts begin with the same, as
        those of other ranks do."""
        if self._before is None:
            self._before = [buffer.clone() for buffer in self._kept]
            for rings in self._rings:
                rings.begin()
            return
        moved = [buffer.clone() for buffer in self._statistics]
        self._sums = [total + one for total, one in zip(self._sums, moved, strict=True)] if self._sums else moved
        for buffer, before in zip(self._kept, self._before, strict=True):
            buffer.copy_(before)
        for rings in self._rings:
            rings.restore(torch.zeros_like(rings.inserted_K[0], dtype=torch.bool))
            rings.begin()

    @property
    def broken(self) -> Tensor:
        """Whether a part of this step has had a loss that is not finite, on this rank: bool [1]."""
        assert self._broken is not None  # a part has been noted
        return self._broken > 0

    def note(self, loss: Tensor) -> None:
        """Adds to the step's judgement that a part's loss is, or is not, finite."""
        broken = (~torch.isfinite(loss.detach())).to(torch.float32).reshape(1)
        self._broken = broken if self._broken is None else self._broken + broken
        self._parts += 1

    @torch.no_grad()
    def settle(self) -> Tensor:
        """Makes the ranks one again, in a single small collective, and judges the step.

        BatchNorm's running statistics become their mean over micro-batches, and over ranks where each rank normalises
        by its own share, as on CPUs; SyncBatchNorm has made them equal on all ranks already.

        Returns:
            Bool scalar on the device, the same on all ranks: True when the losses are finite everywhere.
        """
        assert self._broken is not None  # a step has a part
        broken, self._broken = self._broken, None
        parts, self._parts = self._parts, 0
        for buffer, total in zip(self._statistics, self._sums, strict=bool(self._sums)):
            buffer.add_(total).div_(parts)  # the last part's and those of the parts before it
        self._sums = []
        if self._across.world > 1:
            flat = torch.cat([broken, *(buffer.reshape(-1) for buffer in self._apart)])
            flat = self._across.sum(flat) / self._across.world
            broken, rest = flat[:1], flat[1:]
            sizes = [buffer.numel() for buffer in self._apart]
            for buffer, mean in zip(self._apart, rest.split(sizes), strict=True):
                buffer.copy_(mean.view_as(buffer))
        return broken.reshape(()) == 0

    @torch.no_grad()
    def end(self, finite: Tensor) -> None:
        """Ends the step: takes back what its passes wrote, where it does not count.

        Args:
            finite: bool scalar on the device.
        """
        for buffer, before in zip(self._kept, self._before or [], strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        self._before = None
        for rings in self._rings:
            rings.restore(finite)


class Replicas:
    """One replica a rank: `single` for one rank, `ddp` (DistributedDataParallel) for several.

    Args:
        module: student and method, on the device.
        optimizer: over the student's parameters.
        across: the ranks.
        device: this rank's device.
        rule: makes the gradients.
        precision: autocast type; float32 switches autocast off.
        max_grad_norm: largest norm of the gradient; 0 = no clipping.
        teacher: a network whose BatchNorm statistics the method's own passes move, besides the student's.
    """

    def __init__(
        self,
        module: StepModule,
        optimizer: Optimizer,
        across: AcrossRanks,
        device: torch.device,
        rule: GradientRule,
        *,
        precision: torch.dtype = torch.float32,
        max_grad_norm: float = 0.0,
        teacher: nn.Module | None = None,
    ) -> None:
        self.student = module.student
        self._optimizer = optimizer
        self._parameters = list(optimizer.names)
        self._device = device
        self._rule = rule
        self._precision = precision
        self._max_grad_norm = max_grad_norm
        self._buffers = StepBuffers(module, across, teacher)
        self._counted: dict[str, Tensor] = {}
        self._module: nn.Module = module
        if across.world > 1:
            with warnings.catch_warnings():  # torch 2.15 announces another name, which yet means something else
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
                # Buffers are settled by StepBuffers: averaged, not overwritten by rank 0's.
                self._module = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def accumulate(self, batch: SemiBatch, context: StepContext, *, last: bool = True) -> SideLosses:
        """Adds a part's gradients to the parameters' `.grad`; with the last, they are averaged over ranks."""
        self._buffers.begin()
        module = self._module
        with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
            with autocast(self._device, self._precision):
                losses: SideLosses = module(batch, context)
            self._counted = self._rule.backward(losses, context.step, last=last)
        self._buffers.note(losses.total)
        return losses.detached()

    def update(self, step: int) -> Update:
        """One step of the optimizer, masked where it is not finite: no line waits for the device."""
        finite = self._buffers.settle()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
        finite = finite & torch.isfinite(norm)
        self._optimizer.step(step, finite)
        self._optimizer.zero_grad()
        self._buffers.end(finite)
        return Update(finite, norm, self._counted)

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The student's whole state, in one part."""
        yield self.student.state_dict()

    def whole(self) -> AbstractContextManager[object]:
        """Nothing to do: every rank has all weights."""
        return nullcontext()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """State of student and optimizer: the tensors themselves, not copies."""
        return {"student": self.student.state_dict(), "optimizer": self._optimizer.tensors()}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores what the `tensors` of any strategy gave."""
        self.student.load_state_dict(tensors["student"])
        self._optimizer.load_tensors(tensors["optimizer"])


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Autocast of a device to `precision`; off for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def running_statistics(network: nn.Module, *, equal: bool = True) -> Iterator[Tensor]:
    """BatchNorm's, unless it is frozen; without `equal`, only those that are not the same on all ranks anyway."""
    if getattr(network, "frozen", False):
        return  # nothing moves them, and a mean of equal numbers may be another one in its last digit
    for module in network.modules():
        shared = isinstance(module, nn.SyncBatchNorm) and not equal
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and not shared:
            assert module.running_var is not None  # torch makes both or neither
            yield module.running_mean
            yield module.running_var


def synchronise_batch_norm(student: Segmentor, across: AcrossRanks, device: torch.device) -> Segmentor:
    """SyncBatchNorm in place of BatchNorm on several GPUs; elsewhere the network as it is: CPUs have no such kernel."""
    if across.world == 1:
        return student
    if device.type != "cuda":
        if across.rank == 0 and any(True for _ in running_statistics(student)):
            message = (
                "BatchNorm: each of the %d ranks normalises by its own share of the batch, since SyncBatchNorm is for "
                "GPUs alone; running statistics are averaged over ranks after every step"
            )
            _log.info(message, across.world)
        return student
    from timm.layers.norm_act import convert_sync_batchnorm  # knows timm's fused BatchNorm + activation layers

    converted: Segmentor = convert_sync_batchnorm(student)
    return converted
