"""The DPT decoder: four maps of a transformer, brought to four sizes and fused from the coarsest up.

Source: Ranftl et al. 2021, arXiv:2103.13413, with the widths of UniMatch V2, arXiv:2410.10777; no BatchNorm.
Axes: B images, K classes, D channels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysemi.models.decoders import Decoded, Keep, resize

WIDTHS = {
    384: (64, (48, 96, 192, 384)),
    768: (128, (96, 192, 384, 768)),
    1024: (256, (256, 512, 1024, 1024)),
}
"""Width of the transformer -> width of the fused maps, widths of the four levels (small, base, large)."""


class Residual(nn.Module):
    """x + Conv3x3(ReLU(Conv3x3(ReLU(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """Same shape."""
        result: Tensor = x_BDhw + self.second(self.first(x_BDhw.relu()).relu())
        return result


class Fusion(nn.Module):
    """Conv1x1(resized(Residual(coarse + Residual(lateral)))).

    Args:
        channels: of all maps.
        coarsest: there is only a lateral map, taken as it is; no parameter stands unused.
    """

    def __init__(self, channels: int, coarsest: bool) -> None:
        super().__init__()
        self.lateral = None if coarsest else Residual(channels)
        self.fused = Residual(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, coarse_BDhw: Tensor | None, lateral_BDhw: Tensor, size: Sequence[int]) -> Tensor:
        """Coarse and lateral map of one size -> [B, channels, *size]."""
        if self.lateral is not None and coarse_BDhw is not None:
            lateral_BDhw = coarse_BDhw + self.lateral(lateral_BDhw)
        result: Tensor = self.project(resize(self.fused(lateral_BDhw), size))
        return result


class DPT(nn.Module):
    """Four levels at 4, 2, 1 and 1/2 cells a patch, fused to 8 cells a patch.

    Args:
        in_channels: of each of the four maps.
        num_classes: K.
        channels: of the fused maps.
        widths: channels of the four levels.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, _, last = widths
        self.project = nn.ModuleList([nn.Conv2d(in_channels, width, 1) for width in widths])
        self.scale = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, kernel_size=4, stride=4),
                nn.ConvTranspose2d(second, second, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, kernel_size=3, stride=2, padding=1),
            ]
        )
        self.lateral = nn.ModuleList([nn.Conv2d(width, channels, 3, padding=1, bias=False) for width in widths])
        self.fusions = nn.ModuleList([Fusion(channels, coarsest=level == 3) for level in range(4)])
        self.output = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.joined_channels = channels
        self.penultimate_channels = channels
        self.pyramid_channels = None

    def forward(self, maps: Sequence[Tensor], keep: Keep | None = None) -> Decoded:
        """Four maps [B, D, h, w] -> logits, penultimate and joined map, all at 8h x 8w cells.

        The joined map is the last fused one. It has no dropout for `keep` to act on.
        """
        levels = [
            lateral(scale(project(map_BDhw)))
            for map_BDhw, project, scale, lateral in zip(maps, self.project, self.scale, self.lateral, strict=True)
        ]
        height, width = levels[0].shape[-2:]
        sizes = [torch.Size((2 * height, 2 * width)), *(level.shape[-2:] for level in levels[:-1])]
        joined_BDhw: Tensor | None = None
        for fusion, level_BDhw, size in reversed(list(zip(self.fusions, levels, sizes, strict=True))):
            joined_BDhw = fusion(joined_BDhw, level_BDhw, size)
        assert joined_BDhw is not None  # there are four levels
        penultimate_BDhw = self.output(joined_BDhw)
        return Decoded(self.classifier(penultimate_BDhw), penultimate_BDhw, joined_BDhw, None)
