"""What travels from the stream to a method.

Axes: L labeled, U unlabeled images of this rank, V strong views, N boxes of an image, H x W pixels of the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor

StrongViews = Literal["jitter", "intensity"]
"""Families of strong views: `ops.photometric` and `ops.intensity`."""


@dataclass(frozen=True)
class HostBatch:
    """One rank's share of one step as a loader process makes it: bytes and drawn parameters, on the CPU.

    Images lie in memory pixel by pixel (`torch.channels_last`).
    """

    step: int
    image_L3HW: Tensor
    """uint8 RGB, weak view of the labeled images; padding is 0."""
    label_LHW: Tensor
    """uint8 class index; 255 where not annotated or padded."""
    slots_L: Tensor
    """int64 global slot of each labeled image."""
    keys_L: tuple[str, ...]
    weak_U3HW: Tensor
    """uint8 RGB, weak view of the unlabeled images; U may be 0."""
    valid_UHW: Tensor
    """bool, False where the view is padding."""
    slots_U: Tensor
    """int64 global slot of each unlabeled image."""
    keys_U: tuple[str, ...]
    boxes_VU4: Tensor
    """int64 CutMix box (left, top, right, bottom), half open, of each strong view; all 0 = no box."""
    photometric_VUP: Tensor
    """float32 drawn photometric parameters of each strong view; the module of `strong` names the columns."""
    second_weak_U3HW: Tensor | None = None
    """uint8: another random view of the same images, for methods that mix with it; None unless asked for."""
    second_valid_UHW: Tensor | None = None
    second_photometric_UP: Tensor | None = None
    given_L3HW: Tensor | None = None
    """uint8: for each labeled image another one, of which the method may paste parts into it; None unless asked for."""
    given_label_LHW: Tensor | None = None
    """uint8 its labels; all 255 where an image comes without one."""
    truth_UHW: Tensor | None = None
    """uint8 labels of the unlabeled images, for measuring alone; a training stream never has them."""
    strong: StrongViews = "jitter"
    """Family that the photometric parameters belong to."""
    found_UN5: Tensor | None = None
    """float32 boxes of a detector in the views (x1, y1, x2, y2, class), edges of pixels; class -1 = no box; None unless
    asked for."""

    def pinned(self) -> HostBatch:
        """The same batch in page-locked memory, from which a CUDA device copies without holding the host up."""
        parts = ((field.name, getattr(self, field.name)) for field in fields(self))
        tensors: dict[str, Any] = {name: part.pin_memory() for name, part in parts if isinstance(part, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class SemiBatch:
    """One rank's share of one step on its device, as a method sees it. Images are float32 RGB in [0, 1]."""

    image_L3HW: Tensor
    label_LHW: Tensor
    """int64 class index; 255 where not annotated or padded."""
    slots_L: Tensor
    weak_U3HW: Tensor
    valid_UHW: Tensor
    """bool, False where the weak and strong views are padding."""
    slots_U: Tensor
    strong_VU3HW: Tensor
    """Strong views, not mixed yet; all views of an image share its geometry."""
    boxes_VU4: Tensor
    """int64 CutMix box (left, top, right, bottom), half open; all 0 = no box. Partners are slots 2j and 2j + 1."""
    given_L3HW: Tensor | None = None
    """For each labeled image another one, of which parts may be pasted into it; None unless the method asks for it."""
    given_label_LHW: Tensor | None = None
    """int64; all 255 where an image comes without one."""
    second_weak_U3HW: Tensor | None = None
    second_strong_U3HW: Tensor | None = None
    second_valid_UHW: Tensor | None = None
    """Another random geometry of the same images (weak, strong, valid): the mix source of `cutmix.partner:
    second_view | momentum_view`; None otherwise."""
    found_UN5: Tensor | None = None
    """float32 boxes of a detector in the weak views (x1, y1, x2, y2, class), edges of pixels; class -1 = no box; None
    in a run without a detector."""

    def parts(self, count: int) -> list[SemiBatch]:
        """The batch as `count` micro-batches of neighbouring slots, views of its memory; `count` divides L and U."""
        split: dict[str, Sequence[Any]] = {}
        for field in fields(self):
            value, axes = getattr(self, field.name), field.name.rpartition("_")[2]
            axis = 1 if axes.startswith("V") else 0  # [V, U, ...]: every view of some images
            split[field.name] = [None] * count if value is None else value.tensor_split(count, dim=axis)
        return [SemiBatch(**{name: parts[i] for name, parts in split.items()}) for i in range(count)]
