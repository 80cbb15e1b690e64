"""Colour jitter, greyscale and blur of a batch on its device, each image with its own drawn parameters.

Order: jitter (brightness, contrast, saturation and hue, in a drawn order), greyscale, Gaussian blur.
Source: UniMatch's recipe; the four operations are torchvision's on float images. Differs: a true Gaussian of at most
4 sigma, where PIL stacks three box filters.

Brightness, contrast, saturation and greyscale are one formula, out = clamp(f * image + (1 - f) * reference), whose
reference is black, the image's mean grey, or the pixel's grey. So the batch runs through three blends, the hue, and
three blends more, and an image whose hue comes early is left alone by the first ones (f = 1): no image waits for
another, and nothing is read back from the device.

Axes: B images, P parameters, H x W pixels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PARAMETERS = (
    "brightness", "contrast", "saturation", "hue", "first", "second", "third", "fourth", "greyscale", "sigma",
)  # fmt: skip
"""Columns: three factors (1 = unchanged), the hue shift (share of the circle), which of the four acts at each place
(0 brightness, 1 contrast, 2 saturation, 3 hue), greyscale (0 or 1), and the blur's sigma in pixels (0 = none)."""

LARGEST_SIGMA = 4.0
_HUE = 3
_RADIUS = 4  # of the kernel, in sigmas


class Strengths(Protocol):
    """What `draw` reads of the views' config: probabilities, strengths, and the blur's range of sigma."""

    @property
    def jitter(self) -> float: ...  # noqa: D102
    @property
    def brightness(self) -> float: ...  # noqa: D102
    @property
    def contrast(self) -> float: ...  # noqa: D102
    @property
    def saturation(self) -> float: ...  # noqa: D102
    @property
    def hue(self) -> float: ...  # noqa: D102
    @property
    def greyscale(self) -> float: ...  # noqa: D102
    @property
    def blur(self) -> float: ...  # noqa: D102
    @property
    def blur_sigma(self) -> tuple[float, float]: ...  # noqa: D102


def draw(rng: np.random.Generator, views: Strengths) -> NDArray[np.float32]:
    """Draws one image's parameters; always the same count of numbers, so that no setting shifts another's draw.

    Args:
        rng: generator of this image and view.
        views: probabilities and strengths.

    Returns:
        float32 [P], the columns of `PARAMETERS`.
    """
    u = rng.random(12)
    drawn = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0], dtype=np.float32)
    if u[0] < views.jitter:
        strengths = np.array([views.brightness, views.contrast, views.saturation, views.hue])
        drawn[:4] += strengths * (2.0 * u[1:5] - 1.0)
        drawn[4:8] = np.argsort(u[5:9], kind="stable")
    drawn[8] = u[9] < views.greyscale
    if u[10] < views.blur:
        low, high = views.blur_sigma
        drawn[9] = low + (high - low) * u[11]
    return drawn


def apply(images_B3HW: Tensor, parameters_BP: Tensor) -> Tensor:
    """Jitters, greys and blurs each image with its own parameters; unchanged to the bit where these say so.

    Args:
        images_B3HW: float RGB in [0, 1].
        parameters_BP: float32, columns of `PARAMETERS`; on the CPU or on the images' device.

    Returns:
        images of the same shape, dtype and range.
    """
    if len(images_B3HW) == 0:
        return images_B3HW
    # where the parameters lie on the CPU, the host knows at no wait whether any image is blurred, and how widely
    sigma = float(parameters_BP[:, 9].max()) if parameters_BP.device.type == "cpu" else LARGEST_SIGMA
    parameters_BP = parameters_BP.to(images_B3HW.device, non_blocking=True)
    operation_B4 = parameters_BP[:, 4:8].long()
    factor_B4 = parameters_BP[:, :3].gather(1, operation_B4.clamp(max=_HUE - 1))
    early_B4 = (operation_B4 == _HUE).cumsum(1) == 0
    late_B4 = ~early_B4 & (operation_B4 != _HUE)
    for place in range(3):
        images_B3HW = _blend(images_B3HW, factor_B4[:, place], operation_B4[:, place], early_B4[:, place])
    images_B3HW = _shift_hue(images_B3HW, parameters_BP[:, 3])
    for place in range(1, 4):
        images_B3HW = _blend(images_B3HW, factor_B4[:, place], operation_B4[:, place], late_B4[:, place])
    grey_B111 = parameters_BP[:, 8].view(-1, 1, 1, 1) > 0.5
    images_B3HW = torch.where(grey_B111, _grey(images_B3HW), images_B3HW)
    return _blur(images_B3HW, parameters_BP[:, 9], round(_RADIUS * sigma + 0.5))


def _grey(images_B3HW: Tensor) -> Tensor:
    red, green, blue = images_B3HW.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _blend(images_B3HW: Tensor, factor_B: Tensor, operation_B: Tensor, acts_B: Tensor) -> Tensor:
    grey_B1HW = _grey(images_B3HW)
    mean_B111 = grey_B1HW.mean(dim=(2, 3), keepdim=True)
    operation_B111 = operation_B.view(-1, 1, 1, 1)
    reference = torch.where(operation_B111 == 1, mean_B111, grey_B1HW) * (operation_B111 > 0)
    factor_B111 = torch.where(acts_B, factor_B, 1.0).to(images_B3HW.dtype).view(-1, 1, 1, 1)
    return (factor_B111 * images_B3HW + (1.0 - factor_B111) * reference).clamp(0.0, 1.0)


def _shift_hue(images_B3HW: Tensor, shift_B: Tensor) -> Tensor:
    red, green, blue = images_B3HW.split(1, dim=1)
    largest = images_B3HW.amax(dim=1, keepdim=True)
    chroma = largest - images_B3HW.amin(dim=1, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )
    shift_B111 = shift_B.to(images_B3HW.dtype).view(-1, 1, 1, 1)
    # where on the circle of 6 red, green and blue begin: 5, 3, 1, made on the device, since a copy would wait for it
    channels = torch.arange(5, 0, -2, device=images_B3HW.device, dtype=images_B3HW.dtype)
    place = (sextant + 6.0 * shift_B111 + channels.view(1, 3, 1, 1)) % 6.0
    shifted = largest - chroma * torch.minimum(place, 4.0 - place).clamp(0.0, 1.0)
    return torch.where(shift_B111 == 0, images_B3HW, shifted)


def _blur(images_B3HW: Tensor, sigma_B: Tensor, radius: int) -> Tensor:
    if radius == 0:
        return images_B3HW
    distance_R = torch.arange(-radius, radius + 1, device=images_B3HW.device, dtype=torch.float32)
    width_B1 = torch.where(sigma_B > 0, sigma_B, 1.0)[:, None]
    exponent_BR = -0.5 * (distance_R / width_B1) ** 2
    inside_BR = distance_R.abs() <= torch.where(sigma_B[:, None] > 0, torch.round(_RADIUS * width_B1), 0.0)
    taps_BR = torch.where(inside_BR, exponent_BR.exp(), 0.0)
    taps_BR = (taps_BR / taps_BR.sum(dim=1, keepdim=True)).to(images_B3HW.dtype)
    batch, channels, height, width = images_B3HW.shape
    taps = taps_BR.repeat_interleave(channels, dim=0)[:, None, None, :]
    rows = images_B3HW.reshape(1, batch * channels, height, width)
    # in full precision whatever surrounds the call: bfloat16 would band smooth skies
    with torch.autocast(images_B3HW.device.type, enabled=False):
        rows = F.conv2d(F.pad(rows, (radius, radius, 0, 0), mode="replicate"), taps, groups=batch * channels)
        rows = F.pad(rows, (0, 0, radius, radius), mode="replicate")
        rows = F.conv2d(rows, taps.transpose(2, 3), groups=batch * channels)
    return rows.view(batch, channels, height, width)
