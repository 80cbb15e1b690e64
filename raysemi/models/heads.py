"""Heads that a method asks for, beside the decoder; nothing of them runs at inference.

Axes: B images, C channels of the map that a head reads, D projected channels, K classes, h x w its cells.
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
            g_BCHW = _kept(g_BCHW, keep_BC)
        first_BDhw = self.first(g_BCHW)
        return first_BDhw, first_BDhw if self.second is None else self.second(g_BCHW)


class RepresentationHead(nn.Module):
    """A vector of each cell for contrastive losses, from the decoder's joined map.

    r = Conv1x1(g2), g_i = keep_i * ReLU(BN(Conv3x3(g_(i-1)))), all with bias: the classifier's path with another end.

    Args:
        in_channels: channels of the joined map.
        hidden: channels of g.
        dim: D, channels of r.

    Source: Wang et al. 2022 (U2PL), arXiv:2203.03884, its code. Differs: dropped channels are given by the caller, so
    that they do not depend on the rank.
    """

    def __init__(self, in_channels: int, hidden: int = 256, dim: int = 256) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1)
        self.first_norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1)
        self.second_norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, dim, kernel_size=1)

    def forward(self, joined_BDhw: Tensor, keep: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The vectors, [B, D, h, w].

        Args:
            joined_BDhw: see `Prediction.joined_BDhw`.
            keep: factors of the channels of g1 and g2, [B, hidden] each, as in `CorrelationHead`; None keeps all.
        """
        first_BChw = self.first_norm(self.first(joined_BDhw)).relu()
        if keep is not None:
            first_BChw = _kept(first_BChw, keep[0])
        second_BChw = self.second_norm(self.second(first_BChw)).relu()
        if keep is not None:
            second_BChw = _kept(second_BChw, keep[1])
        projected_BDhw: Tensor = self.project(second_BChw)
        return projected_BDhw


class AuxiliaryHead(nn.Module):
    """Class scores from the encoder's last map but one, a second labeled loss for deep encoders.

    Conv1x1(keep * ReLU(BN(Conv3x3(middle)))), all with bias.

    Args:
        in_channels: channels of the middle map.
        num_classes: K.
        hidden: channels between the convolutions.

    Source: Zhao et al. 2017 (PSPNet), arXiv:1612.01105, section 3.3, in the form of U2PL's code.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.hidden = hidden
        self.reduce = nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(hidden)
        self.classifier = nn.Conv2d(hidden, num_classes, kernel_size=1)

    def forward(self, middle_BDhw: Tensor, keep_BC: Tensor | None = None) -> Tensor:
        """Class scores, [B, K, h, w].

        Args:
            middle_BDhw: see `Features.middle_BDhw`.
            keep_BC: [B, hidden], factors of the channels, as in `CorrelationHead`; None keeps all.
        """
        hidden_BChw = self.norm(self.reduce(middle_BDhw)).relu()
        if keep_BC is not None:
            hidden_BChw = _kept(hidden_BChw, keep_BC)
        logits_BKhw: Tensor = self.classifier(hidden_BChw)
        return logits_BKhw


def _kept(map_BChw: Tensor, keep_BC: Tensor) -> Tensor:
    return map_BChw * keep_BC[:, :, None, None].to(map_BChw.dtype)
