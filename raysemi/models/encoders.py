"""Encoders by name: images in, the feature maps that decoder and heads read out.

The papers' networks: `resnet50` and `resnet101` with the deep stem (three 3x3 convolutions, timm's `resnet50s`,
`resnet101s`) or the plain one (torchvision's), `xception65`, and the DINOv2 transformers `vit_{small,base,large}_
patch14_dinov2`. Every other name is a convolutional network of timm.
Axes: B images, 3 or D channels, H x W pixels, h x w cells, N = h w tokens.
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysemi.errors import ConfigError

PAPER_RESNETS = {"resnet50": "resnet50s", "resnet101": "resnet101s"}
"""The papers' networks -> timm's name of the same network with the deep stem."""
XCEPTION = "xception65"
DINOV2 = {
    "vit_small_patch14_dinov2": (2, 5, 8, 11),
    "vit_base_patch14_dinov2": (2, 5, 8, 11),
    "vit_large_patch14_dinov2": (4, 11, 17, 23),
}
"""The papers' transformers -> the blocks, from 0, whose outputs the decoder reads."""
DINOV2_CHANNELS = {
    "vit_small_patch14_dinov2": 384,
    "vit_base_patch14_dinov2": 768,
    "vit_large_patch14_dinov2": 1024,
}
"""The papers' transformers -> channels of each of their maps."""
PATCH = 14
"""Side of a patch of theirs, in pixels: sides of what they see are multiples of it."""
LITE0 = "tf_efficientnet_lite0"
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LITE0 = ((127 / 255,) * 3, (128 / 255,) * 3)  # its published weights saw (x - 127) / 128


@dataclass(frozen=True)
class Features:
    """What the encoder sees in some images."""

    maps: tuple[Tensor, ...]
    """The maps that the decoder reads, [B, D, h, w] each; of a convolutional network those at stride 4 and at the
    output stride (8 or 16), of a transformer those of four blocks, one cell a patch, shallowest first."""
    middle_BDhw: Tensor | None = None
    """The last map but one of a convolutional network (of a ResNet: stage 3), which auxiliary heads read; None of a
    transformer."""

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
        published_as: timm's name and tag of the weights that `model.weights=timm` takes; None where there are none.
        multiple: both sides of an input are multiples of this, in pixels.
    """

    def __init__(
        self,
        net: nn.Module,
        channels: tuple[int, ...],
        middle_channels: int | None,
        statistics: Statistics,
        published_as: str | None = None,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self.middle_channels = middle_channels
        self.statistics = statistics
        self.published_as = published_as
        self.multiple = multiple

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
        statistics, published_as = _published(name)
        if name == LITE0:
            statistics = _LITE0
        super().__init__(net, (channels[low], channels[-1]), channels[-2], statistics, published_as)
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
        return _whole_shapes(self._name)

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
        super().__init__(net, (256, 2048), 1024, _IMAGENET, f"{name}.tv_in1k")

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


class Xception65(Encoder):
    """Aligned Xception-65, as UniMatch uses it on COCO.

    Its low map is that of the second separable convolution of the 256-wide block, before its ReLU. No separable
    convolution is dilated at output stride 16 (timm dilates the last three by 2), all behind the stride by 2 at 8.
    Running statistics move by 0.0003 a step: from random weights they need 10,000 steps.

    Args:
        name: `xception65`, with or without a tag of timm.
        output_stride: 8 or 16.

    Source: Chen et al. 2018, arXiv:1802.02611, figure 4; timm's network. Differs from UniMatch: a shortcut carries x,
    as when the published weights were made, and not relu(x), which a ReLU in place makes of it there.
    """

    def __init__(self, name: str, output_stride: int) -> None:
        import timm  # takes seconds to import

        net: Any = timm.create_model(XCEPTION, pretrained=False, num_classes=0, output_stride=output_stride)
        net.blocks[1].stack.act3.inplace = False  # its input is the low map
        for module in net.blocks[20].modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (16 // output_stride,) * 2
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                area = module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=math.sqrt(2 / (area * module.out_channels)))
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0003
        # the tag that DeepLab published; timm's own default is another training
        statistics, published_as = _published(name if "." in name else f"{XCEPTION}.tf_in1k")
        super().__init__(net, (256, 2048), 1024, statistics, published_as)

    def classifier_shapes(self) -> Mapping[str, torch.Size]:
        """Every tensor of timm's whole classifier, by published name in its published order, with its shape."""
        return _whole_shapes(XCEPTION)

    def forward(self, images_B3HW: Tensor) -> Features:
        """Features of normalised images."""
        net: Any = self.net
        x = net.blocks[0](net.stem(images_B3HW))
        second = net.blocks[1]
        low = second.stack.conv2(second.stack.act2(second.stack.conv1(second.stack.act1(x))))
        x = second.stack.conv3(second.stack.act3(low)) + second.shortcut(x)
        middle = net.blocks[2:20](x)
        return Features((low, net.blocks[20](middle)), middle)


class DinoV2(Encoder):
    """A DINOv2 transformer: the outputs of four blocks, each through the final LayerNorm, without the class token.

    Position embeddings, made for 37 x 37 patches, are interpolated as DINOv2 does: bicubic, not antialiased, by the
    scale of a grid larger by 0.1. The mask token of Meta's files has no use here and is no parameter.

    Args:
        name: timm's name, with or without its tag.

    Source: Oquab et al. 2023, arXiv:2304.07193; which blocks: UniMatch V2, arXiv:2410.10777.
    """

    def __init__(self, name: str) -> None:
        import timm  # takes seconds to import

        architecture = _architecture(name)
        # LayerScale begins at 1, not timm's 1e-5: random weights would not learn
        net: Any = timm.create_model(architecture, pretrained=False, num_classes=0, init_values=1.0)
        self._blocks = DINOV2[architecture]
        self._grid: tuple[int, int] = net.patch_embed.grid_size
        statistics, published_as = _published(name)
        super().__init__(net, (net.embed_dim,) * len(self._blocks), None, statistics, published_as, PATCH)

    def classifier_shapes(self) -> Mapping[str, torch.Size]:
        """Every tensor of a published file: timm's, and the mask token of Meta's."""
        own = {name: tensor.shape for name, tensor in self.net.state_dict().items()}
        return {**own, "mask_token": torch.Size((1, self.channels[0]))}

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Position embeddings of the class token and of a grid of patches, [1, 1 + N, D]."""
        net: Any = self.net
        positions_1ND: Tensor = net.pos_embed
        if tuple(grid) == self._grid:
            return positions_1ND
        patches_1Dhw = positions_1ND[:, 1:].unflatten(1, self._grid).permute(0, 3, 1, 2)
        scale = tuple((cells + 0.1) / own for cells, own in zip(grid, self._grid, strict=True))
        patches_1Dhw = functional.interpolate(patches_1Dhw, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat((positions_1ND[:, :1], patches_1Dhw.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, images_B3HW: Tensor) -> Features:
        """Features of normalised images, whose sides are multiples of 14 pixels."""
        net: Any = self.net
        patches_BDhw = net.patch_embed.proj(images_B3HW)
        grid = patches_BDhw.shape[-2:]
        tokens_BND = torch.cat(
            (net.cls_token.expand(len(images_B3HW), -1, -1), patches_BDhw.flatten(2).transpose(1, 2)), dim=1
        )
        tokens_BND = tokens_BND + self.positions(grid)
        maps = []
        for index, block in enumerate(net.blocks):
            tokens_BND = block(tokens_BND)
            if index in self._blocks:
                maps.append(net.norm(tokens_BND)[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2))
        return Features(tuple(maps))


def build_encoder(
    name: str,
    stem: Literal["deep", "plain"],
    output_stride: int,
    multi_grid: tuple[int, int, int] | None = None,
) -> Encoder:
    """An encoder with random weights, drawn from torch's present CPU generator.

    Args:
        name: of a network of the papers, or timm's name of a convolutional network.
        stem: of `resnet50` and `resnet101`.
        output_stride: 8 or 16; the last stages trade stride for dilation. Transformers have none.
        multi_grid: of `resnet50` and `resnet101`, factors on the dilations of the three blocks of the last stage.

    Raises:
        ConfigError: the network is unknown or has no such strides.
    """
    if name in PAPER_RESNETS:
        plain = stem == "plain"
        encoder = PlainResNet(name, output_stride) if plain else TimmEncoder(PAPER_RESNETS[name], output_stride)
        for block, factor in zip(encoder.net.layer4, multi_grid or (1, 1, 1), strict=True):  # type: ignore[arg-type]
            convolution = block.conv2
            convolution.dilation = convolution.padding = tuple(factor * d for d in convolution.dilation)
        return encoder
    if _architecture(name) in DINOV2:
        return DinoV2(name)
    return Xception65(name, output_stride) if _architecture(name) == XCEPTION else TimmEncoder(name, output_stride)


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def _published(name: str) -> tuple[Statistics, str | None]:
    """Mean and standard deviation of the input of timm's published weights, and their name with its tag."""
    import timm

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that timm does not know
        raise ConfigError(
            f"model.encoder must be a name that timm {timm.__version__} knows; got {name} ({error}). "
            "Remove what follows the dot for the usual weights."
        ) from error
    if config is None:
        return _IMAGENET, None
    found = config.hf_hub_id or config.url
    return (tuple(config.mean), tuple(config.std)), f"{config.architecture}.{config.tag}" if found else None


def _whole_shapes(name: str) -> dict[str, torch.Size]:
    """Shape of every tensor of timm's whole classifier."""
    import timm

    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False)
    return {key: tensor.shape for key, tensor in whole.state_dict().items()}
