"""The DeepLabV3+ decoder, as UniMatch has it and in the wider form of U2PL and AEL.

Source: Chen et al. 2018, arXiv:1802.02611, with plain (not separable) convolutions and `align_corners` everywhere.
Axes: B images, K classes, D channels, h x w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysemi.errors import ConfigError

Keep = Callable[[str, int], Tensor]
"""Name of a dropout, channels there -> factors [B, channels]: 0 where dropped, 1 / (1 - drop) elsewhere."""


class Decoded(NamedTuple):
    """What a decoder makes of an encoder's maps."""

    logits_BKhw: Tensor
    penultimate_BDhw: Tensor
    joined_BDhw: Tensor
    pyramid_BDhw: Tensor | None
    """Output of the atrous pyramid, at the size of the high map; None of a decoder without one."""


def dropout(x_BDhw: Tensor, keep: Keep | None, name: str) -> Tensor:
    """The map with dropped channels, by the caller's factors: no generator of the device is read. None keeps all."""
    if keep is None:
        return x_BDhw
    return x_BDhw * keep(name, x_BDhw.shape[1])[:, :, None, None].to(x_BDhw.dtype)


def dropouts(network: nn.Module) -> dict[str, int]:
    """Every dropout of a network, decoder and heads, by name, with the channels on which it acts.

    Who draws them all before a pass keeps the drawing out of parts that torch.compile has made.
    """
    found: dict[str, int] = {}
    for part in network.modules():
        found |= getattr(part, "dropouts", {})
    return found


def resize(x_BDhw: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners aligned; a map that has the size already is returned as it is."""
    # an exported graph is for all sizes: there it is resampled, to the same numbers, rather than compared
    if not torch.compiler.is_exporting() and tuple(x_BDhw.shape[-2:]) == tuple(size):
        return x_BDhw
    return functional.interpolate(x_BDhw, size=tuple(size), mode="bilinear", align_corners=True)


def convolution(channels: int, out_channels: int, kernel: int, dilation: int = 1, bias: bool = False) -> nn.Sequential:
    """Convolution at stride 1, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=padding, dilation=dilation, bias=bias),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class AtrousPyramid(nn.Module):
    """ASPP: a 1x1, three dilated 3x3 and a pooled branch, concatenated and projected.

    Args:
        in_channels: channels of the high map.
        channels: channels of each branch and of the result.
        rates: dilations of the three 3x3 branches, in cells.
        kernel: side of the projection.
    """

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int], kernel: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [convolution(in_channels, channels, 1), *(convolution(in_channels, channels, 3, rate) for rate in rates)]
        )
        self.pooled = convolution(in_channels, channels, 1)
        self.project = convolution(channels * (len(rates) + 2), channels, kernel)

    def forward(self, high_BDhw: Tensor) -> Tensor:
        """High map -> [B, channels, h, w].

        Raises:
            ConfigError: training with one image, from which BatchNorm cannot normalise the pooled branch.
        """
        norm = self.pooled[1]
        if type(norm) is nn.BatchNorm2d and norm.training and len(high_BDhw) == 1:
            raise ConfigError(
                "train.batch must give each rank at least 2 images a pass, since BatchNorm cannot normalise the pooled "
                "branch over one value; got 1. Raise train.batch, use fewer ranks or set model.batch_norm=frozen."
            )
        maps = [branch(high_BDhw) for branch in self.branches]
        pooled_BD11 = self.pooled(high_BDhw.mean(dim=(2, 3), keepdim=True))
        maps.append(pooled_BD11.expand(-1, -1, *high_BDhw.shape[-2:]))  # bilinear from one cell is constant
        return self.project(torch.cat(maps, dim=1))


class DeepLabV3Plus(nn.Module):
    """High map through the pyramid, joined with the reduced low map; the classifier stands apart.

    Args:
        low_in, high_in: channels of the encoder's two maps.
        num_classes: K.
        channels: width of the pyramid and of the fused map.
        low_channels: width to which the low map is reduced.
        rates: dilations of the pyramid, in cells of the high map.
    """

    def __init__(
        self, low_in: int, high_in: int, num_classes: int, channels: int, low_channels: int, rates: Sequence[int]
    ) -> None:
        super().__init__()
        self.pyramid = AtrousPyramid(high_in, channels, rates)
        self.reduce = convolution(low_in, low_channels, 1)
        self.fuse = nn.Sequential(convolution(low_channels + channels, channels, 3), convolution(channels, channels, 3))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.joined_channels = low_channels + channels
        self.penultimate_channels = self.pyramid_channels = channels

    def forward(self, maps: Sequence[Tensor], keep: Keep | None = None) -> Decoded:
        """Low and high map -> logits, penultimate and joined map, all at the size of the low one, and the pyramid.

        The joined map is what the two convolutions before the classifier read. It has no dropout for `keep` to act on.
        """
        low_BDhw, high_BDhw = maps
        pyramid_BDhw = self.pyramid(high_BDhw)
        joined_BDhw = torch.cat((self.reduce(low_BDhw), resize(pyramid_BDhw, low_BDhw.shape[-2:])), dim=1)
        penultimate_BDhw = self.fuse(joined_BDhw)
        return Decoded(self.classifier(penultimate_BDhw), penultimate_BDhw, joined_BDhw, pyramid_BDhw)


class WideDeepLabV3Plus(nn.Module):
    """The decoder of U2PL and AEL: a low map as wide as the high one, a 3x3 projection, channel dropout thrice.

    The published probability of all dropouts is 0.1. They are named `decoder/high`, `decoder/first` and
    `decoder/penultimate`; the penultimate map is the one before its dropout.

    Args:
        low_in, high_in: channels of the encoder's two maps.
        num_classes: K.
        channels: width of the pyramid and of the maps before the classifier.
        low_channels: width to which the low map is reduced.
        rates: dilations of the pyramid, in cells of the high map.

    Source: Wang et al. 2022 (U2PL), arXiv:2203.03884, as released. Differs: dropped channels are given by the caller.
    """

    def __init__(
        self, low_in: int, high_in: int, num_classes: int, channels: int, low_channels: int, rates: Sequence[int]
    ) -> None:
        super().__init__()
        self.pyramid = AtrousPyramid(high_in, channels, rates, kernel=3)
        self.reduce = convolution(low_in, low_channels, 1, bias=True)
        self.first = convolution(low_channels + channels, channels, 3, bias=True)
        self.second = convolution(channels, channels, 3, bias=True)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.joined_channels = low_channels + channels
        self.penultimate_channels = self.pyramid_channels = channels
        self.dropouts = dict.fromkeys(("decoder/high", "decoder/first", "decoder/penultimate"), channels)

    def forward(self, maps: Sequence[Tensor], keep: Keep | None = None) -> Decoded:
        """Low and high map -> logits, penultimate and joined map, all at the size of the low one, and the pyramid."""
        low_BDhw, high_BDhw = maps
        pyramid_BDhw = self.pyramid(high_BDhw)
        high_BDhw = resize(dropout(pyramid_BDhw, keep, "decoder/high"), low_BDhw.shape[-2:])
        joined_BDhw = torch.cat((self.reduce(low_BDhw), high_BDhw), dim=1)
        penultimate_BDhw = self.second(dropout(self.first(joined_BDhw), keep, "decoder/first"))
        logits_BKhw = self.classifier(dropout(penultimate_BDhw, keep, "decoder/penultimate"))
        return Decoded(logits_BKhw, penultimate_BDhw, joined_BDhw, pyramid_BDhw)
