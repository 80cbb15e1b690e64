"""The DeepLabV3+ decoder.

Source: Chen et al. 2018, arXiv:1802.02611, as in the code of UniMatch: plain (not separable) convolutions, no dropout,
`align_corners` everywhere. Axes: B images, K classes, D channels, h x w cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysemi.errors import ConfigError


def resize(x_BDhw: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners aligned; a map that has the size already is returned as it is."""
    if tuple(x_BDhw.shape[-2:]) == tuple(size):
        return x_BDhw
    return functional.interpolate(x_BDhw, size=tuple(size), mode="bilinear", align_corners=True)


def _conv(channels: int, out_channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias at stride 1, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class AtrousPyramid(nn.Module):
    """ASPP: a 1x1, three dilated 3x3 and a pooled branch, concatenated and projected.

    Args:
        in_channels: channels of the high map.
        channels: channels of each branch and of the result.
        rates: dilations of the three 3x3 branches, in cells.
    """

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_conv(in_channels, channels, 1), *(_conv(in_channels, channels, 3, rate) for rate in rates)]
        )
        self.pooled = _conv(in_channels, channels, 1)
        self.project = _conv(channels * (len(rates) + 2), channels, 1)

    def forward(self, high_BDhw: Tensor) -> Tensor:
        """High map -> [B, channels, h, w].

        Raises:
            ConfigError: training with one image, from which BatchNorm cannot normalise the pooled branch.
        """
        norm = self.pooled[1]
        if len(high_BDhw) == 1 and type(norm) is nn.BatchNorm2d and norm.training:
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
        self.reduce = _conv(low_in, low_channels, 1)
        self.fuse = nn.Sequential(_conv(low_channels + channels, channels, 3), _conv(channels, channels, 3))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.joined_channels = low_channels + channels
        self.penultimate_channels = channels

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Low and high map -> (logits_BKhw, penultimate_BDhw, joined_BDhw), all at the size of the low map.

        The joined map is what the two convolutions before the classifier read.
        """
        low_BDhw, high_BDhw = maps
        high_BDhw = resize(self.pyramid(high_BDhw), low_BDhw.shape[-2:])
        joined_BDhw = torch.cat((self.reduce(low_BDhw), high_BDhw), dim=1)
        penultimate_BDhw = self.fuse(joined_BDhw)
        return self.classifier(penultimate_BDhw), penultimate_BDhw, joined_BDhw
