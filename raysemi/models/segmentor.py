"""The network of every method: encoder, decoder, and the extra heads that a method asks for.

Axes: B images, K classes, D channels, H x W pixels, h x w cells of the low map.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysemi.base import Config, choices
from raysemi.models.decoders import Decoded, DeepLabV3Plus, Keep, WideDeepLabV3Plus, resize
from raysemi.models.dpt import DPT, WIDTHS
from raysemi.models.encoders import DINOV2, DINOV2_CHANNELS, LITE0, PAPER_RESNETS, Encoder, Features, build_encoder
from raysemi.models.weights import load_encoder

_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}
_LOW_CHANNELS = 48


@dataclass(frozen=True)
class Channels:
    """Channels of everything that a method's head may read."""

    maps: tuple[int, ...]
    """Of `Features.maps`."""
    middle: int | None
    """Of `Features.middle_BDhw`."""
    joined: int
    """Of `Prediction.joined_BDhw`."""
    penultimate: int
    """Of `Prediction.penultimate_BDhw`."""
    pyramid: int | None
    """Of `Prediction.pyramid_BDhw`."""


@dataclass(frozen=True)
class Prediction:
    """What the network says of a batch of images."""

    logits_BKHW: Tensor
    """Class scores at the size of the images, in the type of the pass (bfloat16 under autocast)."""
    features: Features
    penultimate_BDhw: Tensor
    """Input of the classifier, after ReLU and before any dropout, at stride 4 (dpt: 8 cells a patch)."""
    joined_BDhw: Tensor
    """All that the decoder has gathered, before the convolutions that make the penultimate map of it, at its size."""
    pyramid_BDhw: Tensor | None = None
    """Output of the decoder's atrous pyramid, at the size of the encoder's last map; None of dpt, which has none."""

    def images(self, rows: slice) -> Prediction:
        """What it says of some of the images."""
        return Prediction(
            self.logits_BKHW[rows],
            self.features.images(rows),
            self.penultimate_BDhw[rows],
            self.joined_BDhw[rows],
            None if self.pyramid_BDhw is None else self.pyramid_BDhw[rows],
        )

    def split(self, sizes: Sequence[int]) -> list[Prediction]:
        """What it says of the first `sizes[0]` images, of the next `sizes[1]`, and so on."""
        ends = list(itertools.accumulate(sizes))
        return [self.images(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


class ModelConfig(Config):
    """Settings of the network."""

    name: Literal["deeplabv3plus", "deeplabv3plus_wide", "dpt"] = "deeplabv3plus"
    """Decoder. deeplabv3plus_wide: the one of U2PL and AEL. dpt: the one of UniMatch V2, for transformers."""
    encoder: str = LITE0
    """`resnet50`, `resnet101` or `xception65` (the papers'), or the name of a convolutional network of timm; with dpt
    `vit_small_patch14_dinov2`, `vit_base_patch14_dinov2` or `vit_large_patch14_dinov2`."""
    weights: str = "auto"
    """First weights of the encoder: `auto` (ImageNet weights that came with the installation; tf_efficientnet_lite0
    only), `timm` (downloads the published ones, see `raysemi weights`), `random`, or a file (.safetensors, or a torch
    file of plain tensors)."""
    stem: Literal["deep", "plain"] = "deep"
    """Stem of resnet50 and resnet101: three 3x3 convolutions (the papers') or one 7x7 (torchvision's weights)."""
    output_stride: Literal[8, 16] = Field(16, json_schema_extra=choices([8, 16]))
    """Pixels a cell of the last map; the last stages are dilated."""
    multi_grid: tuple[int, int, int] | None = None
    """Factors on the dilations of the three blocks of the last stage of resnet50 and resnet101: 2, 2, 4 in U2PL, AEL
    and AugSeg; null: 1, 1, 1."""
    channels: int = Field(256, ge=8)
    """Width of the decoder."""
    low_channels: int | None = Field(None, ge=4)
    """Channels to which the decoder reduces the stride-4 map; null: 48, and in deeplabv3plus_wide `channels`."""
    atrous_rates: tuple[int, int, int] | None = None
    """Dilations of the pyramid, in cells; null: 6, 12, 18 at output stride 16 and 12, 24, 36 at 8."""
    batch_norm: Literal["train", "frozen"] = "train"
    """frozen: every BatchNorm keeps its statistics and its factors; then batches may be small and ranks unequal."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.stem == "plain" and self.encoder not in PAPER_RESNETS:
            raise ValueError(
                f"stem must be deep (the default) unless encoder is resnet50 or resnet101; got plain with "
                f"{self.encoder}. Remove model.stem."
            )
        for name in ("atrous_rates", "multi_grid"):
            factors = getattr(self, name)
            if factors is not None and min(factors) < 1:
                raise ValueError(f"{name} must be at least 1; got {list(factors)}. Use null for the default.")
        if self.multi_grid is not None and self.encoder not in PAPER_RESNETS:
            raise ValueError(
                f"multi_grid must be null (the default) unless encoder is resnet50 or resnet101; got "
                f"{list(self.multi_grid)} with {self.encoder}. Remove model.multi_grid."
            )
        transformer = self.encoder.partition(".")[0] in DINOV2
        if (self.name == "dpt") != transformer:
            known = ", ".join(DINOV2)
            raise ValueError(
                f"name must be dpt for the encoders {known}, and for these alone; got {self.name} with {self.encoder}. "
                f"Set model.name={'dpt' if transformer else 'deeplabv3plus'}, or another model.encoder."
            )
        fields = type(self).model_fields
        unread = ("output_stride", "channels", "low_channels", "atrous_rates")
        given = [name for name in unread if transformer and getattr(self, name) != fields[name].default]
        if given:
            defaults = " ".join(f"model.{name}={fields[name].default or 'null'}" for name in given)
            raise ValueError(
                f"{' and '.join(given)} must be left as they are by default with dpt, whose sizes follow the encoder; "
                f"got {', '.join(str(getattr(self, name)) for name in given)}. Set {defaults}."
            )
        return self

    @property
    def penultimate_channels(self) -> int:
        """Channels of the map that the network's classifier reads, known before the network is made."""
        if self.name != "dpt":
            return self.channels
        return WIDTHS[DINOV2_CHANNELS[self.encoder.partition(".")[0]]][0]


class Segmentor(nn.Module):
    """Images in [0, 1] -> class scores per pixel, with the features on the way.

    With `frozen`, every BatchNorm stays in eval mode whatever `.train()` says, and its affine parameters get no
    gradient. `mean` and `std` (buffers, saved with the weights) normalise the images as the encoder expects.

    Args:
        encoder: see `encoders.build_encoder`.
        decoder: `Features.maps`, factors of its dropout or None -> `decoders.Decoded`.
        heads: extra heads of a method, by name.
        num_classes: K.
        frozen: keep BatchNorm as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: Encoder, decoder: nn.Module, heads: Mapping[str, nn.Module], num_classes: int, frozen: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.heads = nn.ModuleDict(heads)
        self.num_classes = num_classes
        self.frozen = frozen
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in encoder.statistics)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        if frozen:
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train()

    @property
    def penultimate_channels(self) -> int:
        """D of `Prediction.penultimate_BDhw`."""
        return cast(int, self.decoder.penultimate_channels)

    def _norms(self) -> Iterator[nn.Module]:
        return (module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))

    def train(self, mode: bool = True) -> Segmentor:
        """As any module's, except that frozen BatchNorms stay in eval mode."""
        super().train(mode)
        if self.frozen:
            for norm in self._norms():
                norm.eval()
        return self

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that train with the encoder's learning rate."""
        return (parameter for parameter in self.encoder.parameters() if parameter.requires_grad)

    def other_parameters(self) -> Iterator[nn.Parameter]:
        """All other parameters that train: decoder and heads."""
        encoder = {id(parameter) for parameter in self.encoder.parameters()}
        return (p for p in self.parameters() if p.requires_grad and id(p) not in encoder)

    def seen_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Size at which the encoder sees images of a size: the nearest multiples of a patch, as in UniMatch V2."""
        multiple = self.encoder.multiple
        if multiple == 1:
            return tuple(size)
        return tuple(max(1, (2 * side + multiple) // (2 * multiple)) * multiple for side in size)

    def encode(self, images_B3HW: Tensor) -> Features:
        """Features of RGB images in [0, 1], any size."""
        normalised_B3HW = (images_B3HW - self.mean) / self.std
        features: Features = self.encoder(resize(normalised_B3HW, self.seen_size(images_B3HW.shape[-2:])))
        return features

    def decode(self, features: Features, size: Sequence[int], keep: Keep | None = None) -> Prediction:
        """Prediction from features.

        Args:
            features: of `encode`.
            size: H, W of the logits, those of the images.
            keep: factors of the decoder's channel dropout, where it has one; None drops nothing.
        """
        decoded: Decoded = self.decoder(features.maps, keep)
        logits_BKHW = resize(resize(decoded.logits_BKhw, self.seen_size(size)), size)
        return Prediction(logits_BKHW, features, decoded.penultimate_BDhw, decoded.joined_BDhw, decoded.pyramid_BDhw)

    def forward(self, images_B3HW: Tensor) -> Prediction:
        """Prediction for RGB images in [0, 1], float, any size."""
        return self.decode(self.encode(images_B3HW), images_B3HW.shape[-2:])


def build_segmentor(
    config: ModelConfig,
    num_classes: int,
    heads_of: Callable[[Channels], dict[str, nn.Module]] | None,
    seed: int,
) -> Segmentor:
    """The network with its first weights, on the CPU in float32.

    Encoder, decoder and heads draw their first weights each from a stream of its own: the decoder starts alike
    whatever the encoder's weights and whatever heads a method asks for. Global generators are left as they were.

    Args:
        config: `model.*`.
        num_classes: K.
        heads_of: channels of what heads may read -> extra heads by name; None = no heads.
        seed: seed of the run; decides the first weights.

    Raises:
        ConfigError: unknown encoder, an output stride it does not have, weights that do not fit.
    """
    with _seeded(seed, "encoder"):
        encoder = build_encoder(config.encoder, config.stem, config.output_stride, config.multi_grid)
    load_encoder(encoder, config.encoder, config.weights)
    with _seeded(seed, "decoder"):
        decoder = _build_decoder(config, encoder.channels, num_classes)
    with _seeded(seed, "heads"):
        channels = Channels(
            encoder.channels,
            encoder.middle_channels,
            decoder.joined_channels,
            decoder.penultimate_channels,
            decoder.pyramid_channels,
        )
        heads = {} if heads_of is None else heads_of(channels)
    return Segmentor(encoder, decoder, heads, num_classes, frozen=config.batch_norm == "frozen")


def _build_decoder(
    config: ModelConfig, channels: Sequence[int], num_classes: int
) -> DeepLabV3Plus | WideDeepLabV3Plus | DPT:
    if config.name == "dpt":
        return DPT(channels[0], num_classes, *WIDTHS[channels[0]])
    low, high = channels
    rates = config.atrous_rates or _RATES[config.output_stride]
    if config.name == "deeplabv3plus_wide":
        low_channels = config.low_channels or config.channels
        return WideDeepLabV3Plus(low, high, num_classes, config.channels, low_channels, rates)
    return DeepLabV3Plus(low, high, num_classes, config.channels, config.low_channels or _LOW_CHANNELS, rates)


@contextmanager
def _seeded(seed: int, part: str) -> Iterator[None]:
    digest = hashlib.blake2b(f"{seed}/{part}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the accelerators, which fork_rng does not restore
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        yield
