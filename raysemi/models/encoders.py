"""Encoders by name: images in, the feature maps that decoder and heads read out.

`resnet50` and `resnet101` are the papers' networks: with the deep stem (three 3x3 convolutions, timm's `resnet50s`,
`resnet101s`) or the plain one (torchvision's). Every other name is a convolutional network of timm.
Axes: B images, 3 or D channels, H x W pixels, h x w cells.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raysemi.errors import ConfigError

PAPER_RESNETS = {"resnet50": "resnet50s", "resnet101": "resnet101s"}
"""The papers' networks -> timm's name of the same network with the deep stem."""
LITE0 = "tf_efficientnet_lite0"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LITE0 = ((127 / 255,) * 3, (128 / 255,) * 3)  # its published weights saw (x - 127) / 128


@dataclass(frozen=True)
class Features:
    """What the encoder sees in some images."""

    maps: tuple[Tensor, ...]
    """The maps that the decoder reads, [B, D, h, w] each, finest first; of a convolutional network those at stride 4
    and at the output stride (8 or 16)."""
    middle_BDhw: Tensor | None = None
    """The last map but one of a convolutional network (of a ResNet: stage 3), which auxiliary heads read."""

    @property
    def high_BDhw(self) -> Tensor:
        """The last map that the decoder reads."""
        return self.maps[-1]

    def images(self, rows: slice) -> Features:
        """Those of some of the images."""
        middle_BDhw = None if self.middle_BDhw is None else self.middle_BDhw[rows]
        return Features(tuple(map_BDhw[rows] for map_BDhw in self.maps), middle_BDhw)


class Encoder(nn.Module, ABC):
    """A classification network without its classifier.

    Args:
        net: the network.
        channels: of each of `Features.maps`.
        middle_channels: of `Features.middle_BDhw`; None where there is none.
        statistics: mean and standard deviation of its input, RGB in [0, 1].
    """

    def __init__(
        self,
        net: nn.Module,
        channels: tuple[int, ...],
        middle_channels: int | None,
        statistics: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self.middle_channels = middle_channels
        self.statistics = statistics

    def published_names(self) -> dict[str, str]:
        """Name of each tensor in `net.state_dict()` -> its name in a published file of the whole classifier."""
        return {name: name for name in self.net.state_dict()}

    @abstractmethod
    def classifier_shapes(self) -> Mapping[str, torch.Size]:
        """Every tensor of the whole classifier, by published name in its published order, with its shape."""

    @abstractmethod
    def forward(self, images_B3HW: Tensor) -> Features:
        """Features of normalised images."""


class TimmEncoder(Encoder):
    """A `features_only` network of timm.

    Args:
        name: timm's name.
        output_stride: 8 or 16.

    Raises:
        ConfigError: unknown name, or a network without a map at stride 4 or without that output stride.
    """

    def __init__(self, name: str, output_stride: int) -> None:
        import timm  # takes seconds to import

        if not timm.is_model(name):
            known = [*PAPER_RESNETS, *timm.list_models()]
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"Nearest: {', '.join(near)}." if near else "`timm.list_models()` lists the names."
            raise ConfigError(
                f"model.encoder must be resnet50, resnet101 or a name that timm {timm.__version__} knows; "
                f"got {name}. {hint}"
            )
        # identity blocks at the start (timm's default for ResNets) are not the papers' initialisation
        extra: dict[str, Any] = {"zero_init_last": False} if name in PAPER_RESNETS.values() else {}
        try:
            net: Any = timm.create_model(
                name, pretrained=False, features_only=True, output_stride=output_stride, **extra
            )
        except (AssertionError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(
                f"model.encoder must be a convolutional network that timm builds with output stride {output_stride}; "
                f"got {name} ({str(error) or type(error).__name__}). Take another encoder, such as {LITE0}."
            ) from error
        strides = list(net.feature_info.reduction())
        layout = str(getattr(net, "output_fmt", "NCHW"))
        if 4 not in strides or strides[-1] != output_stride or not layout.endswith("NCHW"):
            raise ConfigError(
                f"model.encoder must give maps [B, D, h, w] at strides 4 and {output_stride}; got {name} with strides "
                f"{strides}. Take another encoder, such as {LITE0}, or another model.output_stride."
            )
        channels = net.feature_info.channels()
        low = strides.index(4)
        published = timm.get_pretrained_cfg(name)
        statistics: tuple[tuple[float, ...], tuple[float, ...]] = _LITE0
        if name != LITE0:
            statistics = _IMAGENET if published is None else (tuple(published.mean), tuple(published.std))
        super().__init__(net, (channels[low], channels[-1]), channels[-2], statistics)
        self._name = name
        self._low = low

    def published_names(self) -> dict[str, str]:
        """Name of each tensor of the encoder -> its name in a file of timm's whole classifier."""
        whole = self.classifier_shapes()
        # features_only flattens the first level of nesting: stages.0.x becomes stages_0.x
        return {
            name: name if name in whole else re.sub(r"^([^.]+)_([^._]+)\.", r"\1.\2.", name)
            for name in self.net.state_dict()
        }

    def classifier_shapes(self) -> Mapping[str, torch.Size]:
        """Every tensor of timm's whole classifier, by published name in its published order, with its shape."""
        import timm

        with torch.device("meta"):
            whole = timm.create_model(self._name, pretrained=False)
        return {name: tensor.shape for name, tensor in whole.state_dict().items()}

    def forward(self, images_B3HW: Tensor) -> Features:
        """Features of normalised images."""
        maps = self.net(images_B3HW)
        return Features((maps[self._low], maps[-1]), maps[-2])


class PlainResNet(Encoder):
    """torchvision's ResNet (7x7 stem), strides replaced by dilation from the end.

    Args:
        name: resnet50 or resnet101.
        output_stride: 8 or 16.
    """

    def __init__(self, name: str, output_stride: int) -> None:
        from torchvision.models import get_model  # takes seconds to import

        net = get_model(name, weights=None, replace_stride_with_dilation=[False, output_stride == 8, True])
        self._classifier = {key: tensor.shape for key, tensor in net.state_dict().items()}
        net.fc = nn.Identity()
        super().__init__(net, (256, 2048), 1024, _IMAGENET)

    def classifier_shapes(self) -> Mapping[str, torch.Size]:
        """Every tensor of torchvision's whole classifier, by published name, with its shape."""
        return self._classifier

    def forward(self, images_B3HW: Tensor) -> Features:
        """Features of normalised images."""
        net: Any = self.net  # its layers are attributes of torchvision's class
        x = net.maxpool(net.relu(net.bn1(net.conv1(images_B3HW))))
        low = net.layer1(x)
        middle = net.layer3(net.layer2(low))
        return Features((low, net.layer4(middle)), middle)


def build_encoder(name: str, stem: Literal["deep", "plain"], output_stride: int) -> Encoder:
    """An encoder with random weights, drawn from torch's present CPU generator.

    Args:
        name: `resnet50`, `resnet101`, or timm's name of a convolutional network.
        stem: of `resnet50` and `resnet101`.
        output_stride: 8 or 16; the last stages trade stride for dilation.

    Raises:
        ConfigError: the network is unknown or has no such strides.
    """
    if name in PAPER_RESNETS:
        if stem == "plain":
            return PlainResNet(name, output_stride)
        return TimmEncoder(PAPER_RESNETS[name], output_stride)
    return TimmEncoder(name, output_stride)
