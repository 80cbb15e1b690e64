"""Random-intensity views: a random number of 8-bit operations of random strength, as PIL does them, on the device.

Source: Zhao et al. 2023, AugSeg, arXiv:2212.04976, section 3.2, with the operations and strengths of its code. The
arithmetic is PIL's to the bit, 8-bit rounding included; a device without fp64 (MPS) may be a step off, of value or hue.

Of eleven operations and some dozen images a rank, groups of the same operation would mostly be single images. So each
image goes by itself: its strengths are Python numbers, and nothing is copied to the device or read back from it.

Axes: B images, P parameters, H x W pixels; an image is uint8 [3, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MOST = 4
"""Places for operations."""
PARAMETERS = tuple(f"{what} {place}" for place in range(MOST) for what in ("operation", "strength"))
"""Columns: at each place the index of an operation in `OPERATIONS` and its strength, in the operation's own unit."""


class Numbers(Protocol):
    """What `draw` reads of the views' config: how many operations act."""

    @property
    def operations(self) -> int: ...  # noqa: D102
    @property
    def operations_vary(self) -> bool: ...  # noqa: D102


def draw(rng: np.random.Generator, views: Numbers) -> NDArray[np.float32]:
    """Draws one image's operations, with replacement; always the same count of random numbers.

    Args:
        rng: generator of this image and view.
        views: the largest number of operations, and whether the number is uniform from 1 to it.

    Returns:
        float32 [P], the columns of `PARAMETERS`; places beyond the drawn number hold the identity.
    """
    u = rng.random(1 + 2 * MOST)
    number = 1 + int(u[0] * views.operations) if views.operations_vary else views.operations
    drawn = np.zeros(len(PARAMETERS), dtype=np.float32)
    for place in range(number):
        which = int(u[1 + 2 * place] * len(OPERATIONS))
        drawn[2 * place : 2 * place + 2] = which, OPERATIONS[which].strength(u[2 + 2 * place])
    return drawn


def apply(images_B3HW: Tensor, parameters_BP: Tensor) -> Tensor:
    """Each image after its own operations, in their order.

    Args:
        images_B3HW: uint8 RGB.
        parameters_BP: float32, columns of `PARAMETERS`, on the CPU: the host reads which operations to start.

    Returns:
        uint8 RGB of the same shape.
    """
    views = []
    for image_3HW, row in zip(images_B3HW, parameters_BP.tolist(), strict=True):
        for which, strength in zip(row[::2], row[1::2], strict=True):
            image_3HW = OPERATIONS[int(which)].act(image_3HW, strength)
        views.append(image_3HW)
    return torch.stack(views) if views else images_B3HW


def _wide(image_3HW: Tensor) -> torch.dtype:
    return torch.float32 if image_3HW.device.type == "mps" else torch.float64  # MPS has no fp64


def _identity(image_3HW: Tensor, _: float) -> Tensor:
    return image_3HW


def _autocontrast(image_3HW: Tensor, _: float) -> Tensor:
    low_311, high_311 = image_3HW.amin(dim=(1, 2), keepdim=True), image_3HW.amax(dim=(1, 2), keepdim=True)
    low_311, high_311 = low_311.to(_wide(image_3HW)), high_311.to(_wide(image_3HW))
    range_311 = (high_311 - low_311).clamp(min=1.0)
    scale_311 = torch.full_like(range_311, 255.0) / range_311  # a number / a tensor would multiply by its reciprocal
    stretched_3HW = (image_3HW * scale_311 + -low_311 * scale_311).clamp(0.0, 255.0).to(torch.uint8)
    return torch.where(high_311 > low_311, stretched_3HW, image_3HW)


def _equalize(image_3HW: Tensor, _: float) -> Tensor:
    values_3N = image_3HW.flatten(1).long()
    counts_3V = torch.zeros(3, 256, dtype=torch.int64, device=image_3HW.device)
    counts_3V = counts_3V.scatter_add_(1, values_3N, torch.ones_like(values_3N))
    of_largest_31 = counts_3V.gather(1, values_3N.amax(dim=1, keepdim=True))
    step_31 = (values_3N.shape[1] - of_largest_31) // 255  # 0 where the channel has one value, or hardly any other
    below_3V = counts_3V.cumsum(1) - counts_3V
    table_3V = (step_31 // 2 + below_3V) // step_31.clamp(min=1)
    equal_3N = table_3V.gather(1, values_3N).clamp(max=255)
    return torch.where(step_31 > 0, equal_3N, values_3N).to(torch.uint8).view_as(image_3HW)


def _blur(image_3HW: Tensor, sigma: float) -> Tensor:
    """Three boxes along each axis, each rounded to 8 bits, with weaker ends to meet sigma (Gwosdek et al. 2011)."""
    reach, centre, end = _box(np.float32(sigma))
    blurred_3HW = image_3HW.to(_wide(image_3HW))
    for _ in range(2):
        size = blurred_3HW.shape[-1]
        for _ in range(3):
            padded = F.pad(blurred_3HW, (reach + 1, reach + 1), mode="replicate")
            box = padded[..., 1 : 1 + size]
            for shift in range(2, 2 + 2 * reach):
                box = box + padded[..., shift : shift + size]
            ends = padded[..., :size] + padded[..., 2 + 2 * reach :]
            blurred_3HW = (centre * box + end * ends + 0.5).floor()
        blurred_3HW = blurred_3HW.transpose(1, 2)
    return blurred_3HW.to(torch.uint8)


def _box(sigma: np.float32) -> tuple[int, float, float]:
    """Radius of PIL's box, and the weights of its 2 * radius + 1 pixels and of the two beyond; in fp32, as PIL's."""
    variance = sigma * sigma / np.float32(3.0)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    reach = math.floor((float(length) - 1.0) / 2.0)
    rest = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance) / (6 * (variance - (reach + 1) ** 2))
    centre = int(np.float32(2**24) / ((reach + rest) * 2 + 1))  # in parts of 2**24
    return reach, centre / 2**24, (2**24 - (2 * reach + 1) * centre) // 2 / 2**24


def _grey(image_3HW: Tensor) -> Tensor:
    red, green, blue = image_3HW.to(torch.int32).split(1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(reference: Tensor, image_3HW: Tensor, factor: float) -> Tensor:
    reference = reference.float()  # in fp32 and cut off, as PIL has it
    return (reference + factor * (image_3HW.float() - reference)).to(torch.uint8)


def _contrast(image_3HW: Tensor, factor: float) -> Tensor:
    grey_1HW = _grey(image_3HW)
    mean = (2 * grey_1HW.sum(dtype=torch.int64) + grey_1HW.numel()) // (2 * grey_1HW.numel())  # rounded half up
    return _blend(mean, image_3HW, factor)


def _brightness(image_3HW: Tensor, factor: float) -> Tensor:
    return (factor * image_3HW.float()).to(torch.uint8)


def _colour(image_3HW: Tensor, factor: float) -> Tensor:
    return _blend(_grey(image_3HW), image_3HW, factor)


def _sharpness(image_3HW: Tensor, factor: float) -> Tensor:
    smooth_3HW = image_3HW.float()
    if min(smooth_3HW.shape[1:]) > 2:  # the outermost pixels stay
        inner_3HW = 9.0 * F.avg_pool2d(smooth_3HW, 3, stride=1) + 4.0 * smooth_3HW[:, 1:-1, 1:-1]
        smooth_3HW[:, 1:-1, 1:-1] = (inner_3HW / 13.0).round()
    return _blend(smooth_3HW, image_3HW, factor)


def _posterize(image_3HW: Tensor, bits: float) -> Tensor:
    return image_3HW & (256 - (1 << (8 - int(bits))))


def _solarize(image_3HW: Tensor, threshold: float) -> Tensor:
    return torch.where(image_3HW < int(threshold), image_3HW, 255 - image_3HW)


def _hue(image_3HW: Tensor, shift: float) -> Tensor:
    """RGB to HSV of 8 bits, the hue shifted modulo 256, and back; fp32 and fp64 change places where PIL's code does."""
    wide = _wide(image_3HW)
    largest_1HW = image_3HW.float().amax(dim=0, keepdim=True)
    chroma_1HW = largest_1HW - image_3HW.float().amin(dim=0, keepdim=True)
    distance_3HW = (largest_1HW - image_3HW.float()) / chroma_1HW.clamp(min=1.0)
    red, green, blue = distance_3HW.to(wide).split(1)  # 0 where the channel is the largest
    sextant_1HW = torch.where(red == 0, blue - green, torch.where(green == 0, 2.0 + red - blue, 4.0 + green - red))
    share_1HW = ((sextant_1HW.float().to(wide) / 6.0 + 1.0) % 1.0).float().to(wide)
    hue_1HW = ((share_1HW * 255.0).floor() + int(shift)) % 256.0
    saturation_1HW = ((chroma_1HW / largest_1HW.clamp(min=1.0)).to(wide) * 255.0).floor()

    place_1HW = hue_1HW * 6.0 / 255.0
    whole_1HW = place_1HW.floor()
    place_1HW = whole_1HW + (place_1HW - whole_1HW).float().to(wide)
    # where on the circle of 6 red, green and blue begin: 5, 3, 1
    channels_311 = torch.arange(5, 0, -2, device=image_3HW.device, dtype=wide).view(3, 1, 1)
    place_3HW = (place_1HW + channels_311) % 6.0
    lack_3HW = (saturation_1HW / 255.0).float().to(wide) * torch.minimum(place_3HW, 4.0 - place_3HW).clamp(0.0, 1.0)
    return (largest_1HW.to(wide) * (1.0 - lack_3HW) + 0.5).floor().to(torch.uint8)


class Operation(NamedTuple):
    """An operation of PIL, and how strong it is."""

    name: str
    strength: Callable[[float], float]
    """Of a uniform number in [0, 1)."""
    act: Callable[[Tensor, float], Tensor]
    """(image, strength) -> image."""


def _none(_: float) -> float:
    return 0.0


def _factor(u: float) -> float:
    return 0.95 - 0.9 * u  # (0.05, 0.95]: less of it, never more


OPERATIONS = (
    Operation("identity", _none, _identity),
    Operation("autocontrast", _none, _autocontrast),
    Operation("equalize", _none, _equalize),
    Operation("blur", lambda u: 0.1 + 1.9 * u, _blur),  # sigma in pixels
    Operation("contrast", _factor, _contrast),
    Operation("brightness", _factor, _brightness),
    Operation("colour", _factor, _colour),
    Operation("sharpness", _factor, _sharpness),
    Operation("posterize", lambda u: 8 - max(1, math.ceil(4.0 * u)), _posterize),  # bits that are kept: 4 to 7
    Operation("solarize", lambda u: 256 - max(1, math.ceil(255.0 * u)), _solarize),  # inverted from here on: 1 to 255
    Operation("hue", lambda u: int((2.0 * u - 1.0) * 0.5 * 255.0), _hue),  # steps of 256, either way
)
"""The eleven operations; the first leaves the image as it is."""
