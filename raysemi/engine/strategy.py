"""How one step is spread over ranks: a single device, or data-parallel replicas.

The whole of a method's forward work runs inside one module's `forward`, so a wrapper that expects one forward and one
backward a step (DistributedDataParallel, later DeepSpeed) fits any method, however many passes it makes. Where the
gradient rule wants each side's gradient by itself, it takes them out of the graph behind the wrapper's back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raysemi.data.types import SemiBatch
from raysemi.engine.gradients import GradientRule, SideLosses, join_ranks, side_loss, uniform_loss
from raysemi.methods.base import AcrossRanks, Method, StepContext
from raysemi.methods.queues import Rings
from raysemi.models.segmentor import Segmentor
from raysemi.ops.schedules import rampup


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
        losses = join_ranks(objectives, context.across)
        unsupervised = rampup(context.step, self.rampup_steps)
        return SideLosses(
            uniform_loss(objectives, losses, unsupervised),
            side_loss(objectives, losses, "supervised"),
            side_loss(objectives, losses, "unsupervised", unsupervised),
            {name: loss.detach() for name, loss in losses.items()},
        )


class Strategy(Protocol):
    """What the trainer needs of a way to spread a step."""

    def losses(self, batch: SemiBatch, context: StepContext) -> SideLosses:
        """Runs the method on this rank's share, under autocast."""
        ...

    def backward(self, losses: SideLosses, step: int) -> dict[str, Tensor]:
        """Leaves in every parameter the gradient that the rule makes, averaged over ranks; what the rule counts."""
        ...

    def settle(self, loss: Tensor) -> Tensor:
        """Makes the ranks' BatchNorm statistics one; True on all ranks when the loss is finite on all."""
        ...

    def restore(self, finite: Tensor) -> None:
        """Takes back what the forward passes wrote into buffers, where the step does not count."""
        ...


class Replicas:
    """One replica a rank: `single` for one rank, `ddp` (DistributedDataParallel) for several.

    Args:
        module: student and method, on the device.
        across: the ranks.
        device: this rank's device.
        rule: makes the gradients.
        precision: autocast type; float32 switches autocast off.
        teacher: a network whose BatchNorm statistics the method's own passes move, besides the student's.
    """

    def __init__(
        self,
        module: StepModule,
        across: AcrossRanks,
        device: torch.device,
        rule: GradientRule,
        precision: torch.dtype = torch.float32,
        teacher: nn.Module | None = None,
    ) -> None:
        self._across = across
        self._device = device
        self._rule = rule
        self._precision = precision
        self._module: nn.Module = module
        if across.world > 1:
            # Buffers are settled below: averaged, not overwritten by rank 0's.
            self._module = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        networks = [module.student] if teacher is None else [module.student, teacher]
        self._buffers = [buffer for network in networks for buffer in _running_statistics(network)]
        # large memories note by themselves what a step overwrites; the rest is small and copied
        self._rings = [part for part in module.method.modules() if isinstance(part, Rings)]
        noted = {id(rings.rows_TX) for rings in self._rings}
        self._kept = [*self._buffers, *(b for b in module.method.buffers() if id(b) not in noted)]
        self._before: list[Tensor] = []

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32)

    def losses(self, batch: SemiBatch, context: StepContext) -> SideLosses:
        """Runs the method on this rank's share, under autocast."""
        self._before = [buffer.clone() for buffer in self._kept]
        for rings in self._rings:
            rings.begin()
        with self._autocast():
            losses: SideLosses = self._module(batch, context)
        return losses

    def backward(self, losses: SideLosses, step: int) -> dict[str, Tensor]:
        """Leaves in every parameter the gradient that the rule makes, averaged over ranks; what the rule counts."""
        return self._rule.backward(losses, step)

    @torch.no_grad()
    def settle(self, loss: Tensor) -> Tensor:
        """Makes the ranks one again, in a single small collective, and judges the step.

        BatchNorm's running statistics become their mean over ranks (on CPUs each rank normalises by its own share;
        on GPUs SyncBatchNorm has made them equal already).

        Args:
            loss: this rank's loss.

        Returns:
            Bool scalar on the device, the same on all ranks: True when the loss is finite everywhere.
        """
        broken = (~torch.isfinite(loss.detach())).to(torch.float32).reshape(1)
        if self._across.world > 1:
            flat = torch.cat([broken, *(buffer.reshape(-1) for buffer in self._buffers)])
            flat = self._across.sum(flat) / self._across.world
            broken, rest = flat[:1], flat[1:]
            sizes = [buffer.numel() for buffer in self._buffers]
            for buffer, mean in zip(self._buffers, rest.split(sizes), strict=True):
                buffer.copy_(mean.view_as(buffer))
        return broken.reshape(()) == 0

    @torch.no_grad()
    def restore(self, finite: Tensor) -> None:
        """Takes back what the forward passes wrote into buffers, where the step does not count."""
        for buffer, before in zip(self._kept, self._before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        self._before = []
        for rings in self._rings:
            rings.restore(finite)


def _running_statistics(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None  # torch makes both or neither
            yield module.running_mean
            yield module.running_var


def synchronise_batch_norm(student: Segmentor, across: AcrossRanks, device: torch.device) -> Segmentor:
    """SyncBatchNorm in place of BatchNorm on several GPUs; elsewhere the network as it is: CPUs have no such kernel."""
    if across.world == 1 or device.type != "cuda":
        return student
    from timm.layers.norm_act import convert_sync_batchnorm  # knows timm's fused BatchNorm + activation layers

    converted: Segmentor = convert_sync_batchnorm(student)
    return converted
