"""Projection heads that a method asks for, beside the decoder; nothing of them runs at inference.

Axes: B images, C channels of the map that is read, D projected channels, K classes, h x w its cells.
"""

from __future__ import annotations

from torch import Tensor, nn

from raysemi.models.decoders import Keep, convolution, dropout


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


class RepresentationHead(nn.Module):
    """U2PL's features for its contrast: what the wide decoder's classifier is, with D outputs for K.

    Its dropouts, published with 0.1, are named `representation/first` and `representation/second`.

    Args:
        in_channels: channels of the decoder's joined map.
        dim: D.
        hidden: channels of the two 3x3 convolutions.

    Source: Wang et al. 2022 (U2PL), arXiv:2203.03884, as released. Differs: dropped channels are given by the caller.
    """

    def __init__(self, in_channels: int, dim: int = 256, hidden: int = 256) -> None:
        super().__init__()
        self.first = convolution(in_channels, hidden, 3, bias=True)
        self.second = convolution(hidden, hidden, 3, bias=True)
        self.project = nn.Conv2d(hidden, dim, kernel_size=1)
        self.dropouts = {"representation/first": hidden, "representation/second": hidden}

    def forward(self, joined_BChw: Tensor, keep: Keep | None = None) -> Tensor:
        """The decoder's joined map -> [B, D, h, w]."""
        hidden_BDhw = dropout(self.first(joined_BChw), keep, "representation/first")
        hidden_BDhw = dropout(self.second(hidden_BDhw), keep, "representation/second")
        result: Tensor = self.project(hidden_BDhw)
        return result


class AuxiliaryHead(nn.Module):
    """Class scores from the last map but one (of a ResNet: stage 3), a second place for the labeled loss.

    Its dropout, published with 0.1, is named `auxiliary`.

    Args:
        in_channels: channels of the map.
        num_classes: K.
        hidden: channels of the 3x3 convolution.

    Source: Zhao et al. 2017 (PSPNet), arXiv:1612.01105, section 3.3; as in U2PL and AEL. Differs: dropped channels are
    given by the caller.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.reduce = convolution(in_channels, hidden, 3, bias=True)
        self.classifier = nn.Conv2d(hidden, num_classes, kernel_size=1)
        self.dropouts = {"auxiliary": hidden}

    def forward(self, middle_BChw: Tensor, keep: Keep | None = None) -> Tensor:
        """The map -> logits [B, K, h, w]."""
        result: Tensor = self.classifier(dropout(self.reduce(middle_BChw), keep, "auxiliary"))
        return result
