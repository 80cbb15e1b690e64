"""What a step will take of a rank's memory, before it is made.

Weights, gradients, moments, teacher and the method's own memories are counted. What the passes of a step make besides
is found by making one of fake tensors, which have shapes and no numbers: every tensor of the real step is there, none
takes memory. What libraries take for themselves (workspaces, pieces that an allocator cannot use) is not in it: on a
CPU real steps of three methods took 12 to 27 % more (ResNet-50, crops of 161 and 321).

Axes: L labeled, U unlabeled images of a rank, V strong views, H x W pixels.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raysemi.data.types import SemiBatch
from raysemi.engine.gradients import GradientRule, GradientsConfig
from raysemi.engine.memory import gib
from raysemi.engine.optim import OptimConfig
from raysemi.engine.strategy import StepModule
from raysemi.methods.base import Method, SingleRank, StepContext
from raysemi.models.segmentor import Segmentor


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank's memory that a step takes."""

    parameters: int
    """Of the student, with its buffers."""
    gradients: int
    """Of the parameters that train, once; twice under pareto, and twice more where they are measured."""
    optimizer: int
    """Moments."""
    teacher: int
    """The averaged copy."""
    method: int
    """Its memories: queues, caches, thresholds."""
    images: int
    """The views and labels of this rank's share."""
    passes: int
    """Estimated: what the passes over a micro-batch hold at most, besides all this."""
    held: bool
    """Whether the gradients are there while the passes are made; else they take the place of what the passes leave."""

    @property
    def total(self) -> int:
        """All of it, at the worst moment of a step."""
        return self.with_passes(1.0)

    def with_passes(self, share: float) -> int:
        """`total` of a step whose micro-batches are a share of the present ones."""
        fixed = self.parameters + self.optimizer + self.teacher + self.method + self.images
        passes = round(self.passes * share)
        held = self.held or share < 1.0
        return fixed + (self.gradients + passes if held else max(self.gradients, passes))

    def __str__(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "teacher", "method", "images", "passes")
        each = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in parts)
        return f"about {gib(self.total)} ({each})"


def footprint(
    student: Segmentor,
    method: Method,
    *,
    optim: OptimConfig,
    gradients: GradientsConfig,
    share: tuple[int, int],
    parts: int,
    crop: int,
    world: int = 1,
    precision: torch.dtype = torch.float32,
) -> Footprint:
    """Makes a step of fake tensors; student and method stay as they are, on the CPU.

    Args:
        student, method: as `launch.restore.build` makes them.
        optim: `optim.*`.
        gradients: `gradients.*`.
        share: labeled and unlabeled images of this rank in a step.
        parts: micro-batches in which they are passed.
        crop: side of the images, pixels.
        world: ranks.
        precision: autocast type; as the CPU's kernels understand it, which keep more in float32 than a GPU's.
    """
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    pareto = gradients.name == "pareto"
    flat = pareto or gradients.measure_every > 0
    held = flat or parts > 1 or world > 1  # by the flat buffer, the micro-batches before, the buckets of ddp
    with FakeCopyMode(FakeTensorMode()) as copying:
        module = copy.deepcopy(StepModule(student, method)).train()
        teacher = None if method.average.kind == "none" else copy.deepcopy(student).requires_grad_(False).eval()
    settings: Any = getattr(module.method, "config", None)
    if (region := getattr(settings, "region", None)) is not None:
        # found by reading numbers on the host, or in many small steps; nothing beside the maps it is found in
        module.method.config = settings.model_copy(update={"region": region.model_copy(update={"enable": False})})
    live = _Live()
    with copying.fake_mode, live:
        batch = _batch(method, *share, crop)
        images = live.now
        parameters = [p for p in module.student.parameters() if p.requires_grad]
        if held and not pareto:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        late = 10**6  # of a run in which everything has begun
        context = StepContext(module.student, teacher, late - 1, late, 1, 0, SingleRank())
        gradients = gradients.model_copy(update={"measure_every": min(1, gradients.measure_every)})
        rule = GradientRule(gradients, dict.fromkeys(parameters, 1.0), SingleRank())
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            losses = module(batch.parts(parts)[0], context)
        rule.backward(losses, late)
    gradient_bytes = (2 * flat + (not pareto)) * trained
    passes = max(0, live.most - images - (gradient_bytes if held else 0))
    moments = {"sgd": 1 if optim.momentum else 0, "adamw": 2}[optim.name] * trained
    state = _bytes([*student.parameters(), *student.buffers()])
    return Footprint(
        parameters=state,
        gradients=gradient_bytes,
        optimizer=moments,
        teacher=0 if teacher is None else state,
        method=_bytes(method.buffers()),
        images=images,
        passes=passes,
        held=held,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _batch(method: Method, labeled: int, unlabeled: int, crop: int) -> SemiBatch:
    """A share as `views.on_device` leaves it."""

    def images(*count: int) -> Tensor:
        return torch.empty(*count, 3, crop, crop)

    def pixels(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, crop, crop, dtype=dtype)

    given, second, views = method.given > 0.0, method.second_view, method.strong_views
    return SemiBatch(
        image_L3HW=images(labeled),
        label_LHW=pixels(labeled, torch.int64),
        slots_L=torch.arange(labeled),
        weak_U3HW=images(unlabeled),
        valid_UHW=pixels(unlabeled, torch.bool),
        slots_U=torch.arange(unlabeled),
        strong_VU3HW=images(views, unlabeled),
        boxes_VU4=torch.zeros(views, unlabeled, 4, dtype=torch.int64),
        given_L3HW=images(labeled) if given else None,
        given_label_LHW=pixels(labeled, torch.int64) if given else None,
        second_weak_U3HW=images(unlabeled) if second else None,
        second_strong_U3HW=images(unlabeled) if second else None,
        second_valid_UHW=pixels(unlabeled, torch.bool) if second else None,
        found_UN5=torch.zeros(unlabeled, 1, 5),  # of a detector; few bytes, read by whoever asks for them
    )


class _Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default:
            return False  # fake tensors have no numbers to compare; where work ends early for it, it does not
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)
