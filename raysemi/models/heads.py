"""Projection heads that a method asks for, beside the decoder; nothing of them runs at inference.

Axes: B images, C channels of the encoder's last map, D projected channels, h x w its cells.
"""

from __future__ import annotations

from torch import Tensor, nn


class CorrelationHead(nn.Module):
    """Projects the encoder's last map to the two features whose products make a similarity map.

    g = keep * ReLU(BN(Conv3x3(high))); f1 = Conv1x1(g), f2 = Conv1x1(g), all with bias.

    Args:
        in_channels: channels of the encoder's last map.
        dim: D, channels of each projection.
        hidden: channels of g.
        shared: one projection for both sides, so that the maps are symmetric.

    Source: Sun et al. 2024 (CorrMatch), section 3.2; `shared`: Derivative Label Propagation, section "Derivative
    Label Propagation". Differs: dropped channels are given by the caller, so that they do not depend on the rank.
    """

    def __init__(self, in_channels: int, dim: int, hidden: int = 256, shared: bool = False) -> None:
        super().__init__()
        self.hidden = hidden
        self.reduce = nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(hidden)
        self.first = nn.Conv2d(hidden, dim, kernel_size=1)
        self.second = None if shared else nn.Conv2d(hidden, dim, kernel_size=1)

    def forward(self, high_BCHW: Tensor, keep_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both projections.

        Args:
            high_BCHW: the encoder's last map.
            keep_BC: [B, hidden], factor of each channel of g: 0 where dropped, 1 / (1 - drop) elsewhere; None keeps
                all.

        Returns:
            f1, f2, [B, D, h, w] each; one and the same tensor when `shared`.
        """
        g_BCHW = self.norm(self.reduce(high_BCHW)).relu()
        if keep_BC is not None:
            g_BCHW = g_BCHW * keep_BC[:, :, None, None].to(g_BCHW.dtype)
        first_BDhw = self.first(g_BCHW)
        return first_BDhw, first_BDhw if self.second is None else self.second(g_BCHW)
