"""Weak views of an image with its label, CutMix boxes, and the step from a loader's bytes to a batch on its device.

The recipe of UniMatch's code: random resize, padding right and below, crop, flip. Scale and crop are drawn first; then
only what the crop shows is resized, from the same pixels as if the whole image had been. Every draw is a function of
(seed, pass, key) and what it is for.
Axes: L labeled, U unlabeled images, V strong views, S side of the crop, H x W pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from raysemi.base import Config, choices, search
from raysemi.data.pool import NOT_ANNOTATED
from raysemi.data.resize import resized_part
from raysemi.data.types import HostBatch, SemiBatch, StrongViews
from raysemi.ops import intensity, photometric

FAMILIES: Mapping[StrongViews, ModuleType] = {"jitter": photometric, "intensity": intensity}
"""Families of strong views: each module has `PARAMETERS`, `draw` and `apply`."""


class ViewsConfig(Config):
    """How the views of an image are drawn."""

    scale: tuple[float, float] = Field((0.5, 2.0), json_schema_extra=choices([[0.5, 2.0], [0.75, 1.5], [0.5, 1.5]]))
    """Range of the resize, as a share of the image's longer side, above 0."""
    flip: float = Field(0.5, ge=0.0, le=1.0)
    """Probability of a horizontal flip."""
    strong: StrongViews | None = Field(None, json_schema_extra=choices(["jitter", "intensity"]))
    """Family of the strong views: jitter (colours jittered, grey, blurred), or intensity (a few random 8-bit operations
    of random strength); null: as the method publishes."""
    operations: int = Field(3, ge=1, le=intensity.MOST, json_schema_extra=choices([1, 2, 3, 4]))
    """intensity: the largest number of operations on an image."""
    operations_vary: bool = Field(True, json_schema_extra=choices([True, False]))
    """intensity: the number is uniform from 1 to `operations`; false: always `operations`."""
    jitter: float = Field(0.8, ge=0.0, le=1.0, json_schema_extra=choices([0.5, 0.8, 1.0]))
    """jitter: probability that a strong view's colours are jittered, with these four strengths."""
    brightness: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=choices([0.25, 0.5]))
    """Brightness factor is drawn from 1 - this to 1 + this."""
    contrast: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=choices([0.25, 0.5]))
    """Contrast factor is drawn from 1 - this to 1 + this."""
    saturation: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=choices([0.25, 0.5]))
    """Saturation factor is drawn from 1 - this to 1 + this."""
    hue: float = Field(0.25, ge=0.0, le=0.5)
    """Hue shift is drawn from minus this to this, share of the hue circle."""
    greyscale: float = Field(0.2, ge=0.0, le=1.0, json_schema_extra=choices([0.0, 0.2]))
    """jitter: probability that a strong view is grey."""
    blur: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=choices([0.0, 0.5]))
    """jitter: probability that a strong view is blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """jitter: range of the blur's standard deviation, pixels, above 0 and at most 4."""
    cutmix: float = Field(0.5, ge=0.0, le=1.0, json_schema_extra=choices([0.5, 0.8, 1.0]))
    """Probability that a strong view has a CutMix box."""
    cutmix_area: tuple[float, float] = Field(
        (0.02, 0.4), json_schema_extra=choices([[0.02, 0.25], [0.02, 0.4], [0.02, 0.5]])
    )
    """Range of the box's area, share of the crop, above 0 and at most 0.8."""
    cutmix_ratio: float = Field(0.3, gt=0.0, le=1.0, json_schema_extra=search(0.2, 1.0))
    """Least height / width of the box; the largest is 1 / this."""

    @field_validator("scale", "blur_sigma", "cutmix_area")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < value[0] <= value[1] < math.inf:
            raise ValueError(f"must be two rising numbers above 0; got {value}. Write it as [low, high].")
        return value

    @field_validator("blur_sigma")
    @classmethod
    def _sigma(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > photometric.LARGEST_SIGMA:
            raise ValueError(f"must be at most {photometric.LARGEST_SIGMA} pixels; got {value}. Lower the upper end.")
        return value

    @field_validator("cutmix_area")
    @classmethod
    def _area(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 0.8:  # nearer to 1 hardly any drawn box fits
            raise ValueError(f"must be at most 0.8 of the crop; got {value}. Lower the upper end.")
        return value


@dataclass(frozen=True)
class Geometry:
    """A drawn resize, crop and flip of one image. The crop's part outside the resized image is padding."""

    height: int
    width: int
    """Size of the source."""
    resized_height: int
    resized_width: int
    top: int
    left: int
    """Corner of the crop in the resized image."""
    crop: int
    flip: bool

    @property
    def shown(self) -> tuple[int, int]:
        """Height and width of the crop's part that shows the image."""
        return min(self.crop, self.resized_height), min(self.crop, self.resized_width)

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the view that show the image."""
        height, width = self.shown
        return slice(height), slice(self.crop - width, None) if self.flip else slice(width)


class _Words(np.random.bit_generator.ISeedSequence):
    """Gives Philox its key; Philox(key=...) would first ask the system for random words, and not use them."""

    def __init__(self, words: bytes) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        return np.frombuffer(self._words, dtype=np.dtype(dtype).newbyteorder("<"), count=n_words).astype(dtype)


def generator(seed: int, pass_number: int, key: str, name: str) -> np.random.Generator:
    """Generator of one draw: Philox keyed by (seed, pass, key, what it is for).

    Args:
        seed: seed of the run.
        pass_number: pass over the pool, from 0.
        key: key of the sample.
        name: what is drawn; two names give independent numbers.
    """
    digest = hashlib.blake2b(f"{seed}/{pass_number}/{name}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(_Words(digest)))  # type: ignore[arg-type]  # not in numpy's stubs


def draw_geometry(rng: np.random.Generator, config: ViewsConfig, height: int, width: int, crop: int) -> Geometry:
    """Draws resize, crop and flip of an image of the given size.

    The longer side becomes a uniform integer of [int(low * side), int(high * side)], the other one follows; the image
    is padded right and below to the crop, whose corner is uniform.
    """
    u = rng.random(4)
    side = max(height, width)
    low, high = (max(int(bound * side), 1) for bound in config.scale)
    long = low + int(u[0] * (high - low + 1))
    resized_height, resized_width = (max(int(length * long / side + 0.5), 1) for length in (height, width))
    top = int(u[1] * (max(resized_height, crop) - crop + 1))
    left = int(u[2] * (max(resized_width, crop) - crop + 1))
    return Geometry(height, width, resized_height, resized_width, top, left, crop, bool(u[3] < config.flip))


def draw_any_size(rng: np.random.Generator, config: ViewsConfig, height: int, width: int, crop: int) -> Geometry:
    """As `draw_geometry`, but resized to 0.1 to 1 of its size in half of the draws, to 1 to 2 in the others.

    Source: what AEL (Hu et al. 2021, arXiv:2110.05474) pastes from.
    """
    scale = (0.1, 1.0) if rng.random() < 0.5 else (1.0, 2.0)
    return draw_geometry(rng, config.model_copy(update={"scale": scale}), height, width, crop)


def weak_view(image: Image.Image, geometry: Geometry, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """The image under a geometry, bilinear, antialiased when it shrinks: uint8 [S, S, 3], padding 0; made in `out`."""
    view_HW3 = _blank(geometry, (3,), 0, out)
    resized, corner = (geometry.resized_height, geometry.resized_width), (geometry.top, geometry.left)
    view_HW3[geometry.inside] = resized_part(image, resized, corner, geometry.shown, geometry.flip)
    return view_HW3


def label_view(mask: NDArray[np.uint8], geometry: Geometry, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """The mask under a geometry, nearest pixel: uint8 [S, S], padding 255; made in `out`.

    In whole numbers, source = floor((2 * i + 1) * length / (2 * resized)): the pixel under the centre of the image's
    resized pixel, with no rounding that a crop could shift.
    """
    height, width = geometry.shown
    rows = (2 * np.arange(geometry.top, geometry.top + height) + 1) * geometry.height // (2 * geometry.resized_height)
    columns = (2 * np.arange(geometry.left, geometry.left + width) + 1) * geometry.width // (2 * geometry.resized_width)
    view = _blank(geometry, (), NOT_ANNOTATED, out)
    columns = columns[::-1] if geometry.flip else columns
    view[geometry.inside] = mask[rows][:, columns]  # rows first: a fifth of the time of both at once
    return view


def valid_view(geometry: Geometry, out: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """bool [S, S], True where the view shows the image, False where it is padding; made in `out`."""
    view = _blank(geometry, (), False, out, np.bool_)
    view[geometry.inside] = True
    return view


def _blank(
    geometry: Geometry, channels: tuple[int, ...], padding: int, out: NDArray[Any] | None, kind: type = np.uint8
) -> NDArray[Any]:
    """[S, S, ...] whose padding is filled; what the image will cover may hold anything."""
    side = geometry.crop
    view = np.empty((side, side, *channels), dtype=kind) if out is None else out
    if geometry.shown != (side, side):
        view.fill(padding)
    return view


def draw_box(rng: np.random.Generator, config: ViewsConfig, crop: int) -> tuple[int, int, int, int]:
    """Draws a CutMix box (left, top, right, bottom), half open; all 0 when there is none.

    The area is drawn once; ratio and corner again until the box fits.
    """
    u = rng.random(2)
    if u[0] >= config.cutmix:
        return 0, 0, 0, 0
    low, high = config.cutmix_area
    area = (low + (high - low) * u[1]) * crop * crop
    narrow, tall = config.cutmix_ratio, 1.0 / config.cutmix_ratio
    while True:
        u = rng.random(3)
        ratio = narrow + (tall - narrow) * u[0]
        width, height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        left, top = int(u[1] * crop), int(u[2] * crop)
        if left + width <= crop and top + height <= crop:
            return left, top, left + width, top + height


def on_device(host: HostBatch, device: torch.device, memory_format: torch.memory_format) -> SemiBatch:
    """Brings a batch to its device and makes the strong views there; the host does not wait for the device.

    Args:
        host: bytes and drawn parameters of one step.
        device: where the networks are.
        memory_format: layout of the images, `torch.channels_last` or `torch.contiguous_format`.

    Returns:
        The batch with float32 RGB in [0, 1] and int64 labels.
    """

    @overload
    def moved(tensor: Tensor) -> Tensor: ...
    @overload
    def moved(tensor: None) -> None: ...
    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()  # only from pinned memory does a copy not hold the host up
        return tensor.to(device, non_blocking=True)

    def images(bytes_B3HW: Tensor) -> Tensor:
        return bytes_B3HW.to(torch.float32, memory_format=memory_format).div_(255.0)

    def strong(bytes_B3HW: Tensor, images_B3HW: Tensor, parameters_BP: Tensor) -> Tensor:
        if host.strong == "intensity":  # 8-bit operations
            return images(intensity.apply(bytes_B3HW, parameters_BP))
        return photometric.apply(images_B3HW, parameters_BP).contiguous(memory_format=memory_format)

    bytes_U3HW = moved(host.weak_U3HW)
    weak_U3HW = images(bytes_U3HW)
    views = [strong(bytes_U3HW, weak_U3HW, parameters_UP) for parameters_UP in host.photometric_VUP]
    second_weak_U3HW = second_strong_U3HW = None
    if host.second_weak_U3HW is not None and host.second_photometric_UP is not None:
        bytes_U3HW = moved(host.second_weak_U3HW)
        second_weak_U3HW = images(bytes_U3HW)
        second_strong_U3HW = strong(bytes_U3HW, second_weak_U3HW, host.second_photometric_UP)
    return SemiBatch(
        image_L3HW=images(moved(host.image_L3HW)),
        label_LHW=moved(host.label_LHW).long(),
        slots_L=moved(host.slots_L),
        weak_U3HW=weak_U3HW,
        valid_UHW=moved(host.valid_UHW),
        slots_U=moved(host.slots_U),
        strong_VU3HW=_stacked(views, weak_U3HW, memory_format),
        boxes_VU4=moved(host.boxes_VU4),
        given_L3HW=None if host.given_L3HW is None else images(moved(host.given_L3HW)),
        given_label_LHW=None if host.given_label_LHW is None else moved(host.given_label_LHW).long(),
        second_weak_U3HW=second_weak_U3HW,
        second_strong_U3HW=second_strong_U3HW,
        second_valid_UHW=moved(host.second_valid_UHW),
        found_UN5=moved(host.found_UN5),
    )


def _stacked(views: list[Tensor], like_U3HW: Tensor, memory_format: torch.memory_format) -> Tensor:
    """[V, U, 3, H, W] whose every view keeps the layout of its images, which a plain stack would lose."""
    if not views:
        return like_U3HW.new_zeros((0, *like_U3HW.shape))
    if memory_format == torch.channels_last:
        return torch.stack([view.permute(0, 2, 3, 1) for view in views]).permute(0, 1, 4, 2, 3)
    return torch.stack(views)
