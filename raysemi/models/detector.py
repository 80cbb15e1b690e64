"""A detector of things: Faster R-CNN on a feature pyramid over an encoder of ours.

Anchors, proposals, region pooling, heads and losses are torchvision's.
Source: Ren et al. 2015, arXiv:1506.01497; Lin et al. 2017, arXiv:1612.03144.
Axes: B images, N boxes, H x W pixels.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from raysemi.base import Config, choices
from raysemi.errors import ConfigError
from raysemi.models.encoders import LITE0, TimmEncoder, build_encoder
from raysemi.models.weights import load_encoder

STRIDES = (4, 8, 16, 32)
"""Of the encoder's maps that the pyramid joins; it adds a coarser one."""


class DetectorConfig(Config):
    """`model.*` of a detector."""

    encoder: str = LITE0
    """`resnet50`, `resnet101` (deep stem), or the name of a convolutional network of timm with a map at stride 32."""
    weights: str = "auto"
    """First weights of the encoder: `auto` (ImageNet weights that came with the installation; tf_efficientnet_lite0
    only), `timm` (downloads the published ones), `random` (the paper's "from scratch"), or a file."""
    batch_norm: Literal["train", "frozen"] = "train"
    """frozen: the encoder's BatchNorm keeps the statistics and factors of its first weights; for batches below 4."""
    channels: int = Field(256, ge=8)
    """Width of the pyramid."""
    hidden: int = Field(1024, ge=8)
    """Width of the two layers that judge a region."""
    anchors: tuple[int, int, int, int, int] = Field((32, 64, 128, 256, 512), json_schema_extra={"unit": "pixels"})
    """Sides of the anchors at strides 4, 8, 16, 32 and 64, each as a square and as two rectangles of its area; about
    the sizes of the things."""
    regions: int = Field(512, ge=8)
    """Regions of an image that the heads learn from in a step; twice as many are proposed."""

    overlap: float = Field(0.5, gt=0.0, lt=1.0, json_schema_extra=choices([0.5, 0.6, 0.7]))
    """Overlap (intersection over union) with a true box from which on a region is taught to be that thing. A larger one
    makes the score say how well the box fits, too."""

    @field_validator("anchors")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"must be at least 1 each; got {list(value)}. Give sides in pixels.")
        return value


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes_N4: Tensor
    """float32 (left, top, right, bottom), edges of pixels."""
    labels_N: Tensor
    """int64, position in the list of classes that the detector was built for."""
    scores_N: Tensor
    """float32 in [0, 1]."""


class Pyramid(nn.Module):
    """Maps of an encoder at strides 4 to 64, all of one width.

    Args:
        encoder: with maps at `STRIDES`.
        channels: width.

    Raises:
        ConfigError: the encoder lacks one of these maps.
    """

    def __init__(self, encoder: TimmEncoder, channels: int) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        info: Any = encoder.net.feature_info
        strides = list(info.reduction())
        missing = [stride for stride in STRIDES if stride not in strides]
        if missing:
            raise ConfigError(
                f"model.encoder must give maps at strides {', '.join(map(str, STRIDES))}; got one with strides "
                f"{strides}. Take another, such as {LITE0}."
            )
        self.out_channels = channels
        self.encoder = encoder
        self._read = [strides.index(stride) for stride in STRIDES]
        widths = [info.channels()[index] for index in self._read]
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """The maps of normalised images, finest first."""
        maps = self.encoder.net(images_B3HW)
        joined: dict[str, Tensor] = self.fpn(OrderedDict((str(i), maps[i]) for i in self._read))
        return joined


class Detector(nn.Module):
    """Images in [0, 1] -> boxes of things; in train mode the losses.

    Args:
        config: `model.*`.
        num_classes: kinds of thing; a box's label counts from 0.
        score: least score of a box that is handed out.
        most: boxes of an image at most.

    Raises:
        ConfigError: the encoder cannot be used, or its weights cannot be loaded.
    """

    def __init__(self, config: DetectorConfig, num_classes: int, score: float, most: int) -> None:
        from torchvision.models.detection import FasterRCNN  # takes seconds to import
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.ops import MultiScaleRoIAlign

        super().__init__()
        encoder = build_encoder(config.encoder, "deep", output_stride=STRIDES[-1])
        if not isinstance(encoder, TimmEncoder):
            raise ConfigError(
                f"model.encoder must be a convolutional network of timm, resnet50 or resnet101 for a detector; got "
                f"{config.encoder}. Take another, such as {LITE0}."
            )
        load_encoder(encoder, config.encoder, config.weights)
        mean, std = encoder.statistics
        pyramid = Pyramid(encoder, config.channels)
        cells = 7
        self.num_classes = num_classes
        self.frozen = config.batch_norm == "frozen"
        maps = [str(index) for index in pyramid._read]
        self.net = FasterRCNN(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(
                tuple((side,) for side in config.anchors), ((0.5, 1.0, 2.0),) * len(config.anchors)
            ),
            box_roi_pool=MultiScaleRoIAlign(maps, output_size=cells, sampling_ratio=2),
            box_head=TwoMLPHead(config.channels * cells**2, config.hidden),
            box_predictor=FastRCNNPredictor(config.hidden, 1 + num_classes),
            rpn_pre_nms_top_n_train=4 * config.regions,
            rpn_post_nms_top_n_train=2 * config.regions,
            rpn_pre_nms_top_n_test=2 * config.regions,
            rpn_post_nms_top_n_test=2 * config.regions,
            box_fg_iou_thresh=config.overlap,
            box_bg_iou_thresh=config.overlap,
            box_batch_size_per_image=config.regions,
            box_score_thresh=score,
            box_detections_per_img=most,
        )
        self.net.transform = _transform(mean, std)
        if self.frozen:
            for module in _batch_norms(self):
                module.requires_grad_(False)

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the encoder."""
        encoder: Any = self.net.backbone
        return (p for p in encoder.encoder.parameters() if p.requires_grad)

    def other_parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of everything else."""
        own = set(self.encoder_parameters())
        return (p for p in self.parameters() if p.requires_grad and p not in own)

    def train(self, mode: bool = True) -> Detector:
        """Train or eval mode; frozen BatchNorm stays in eval mode."""
        super().train(mode)
        if self.frozen:
            for module in _batch_norms(self):
                module.eval()
        return self

    def losses(self, images_B3HW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """The four terms of the loss, means over the images; in train mode. Draws from torch's present generator.

        Args:
            images_B3HW: RGB in [0, 1].
            boxes: of each image, float32 [N, 4], edges of pixels; N may be 0.
            labels: of each image, int64 [N], below `num_classes`.
        """
        targets = [{"boxes": b, "labels": k + 1} for b, k in zip(boxes, labels, strict=True)]  # 0 is torchvision's none
        found: dict[str, Tensor] = self.net(list(images_B3HW), targets)
        return {name.removeprefix("loss_"): value for name, value in found.items()}

    def forward(self, images: Sequence[Tensor]) -> list[Detections]:
        """What is in each image; in eval mode.

        Args:
            images: RGB in [0, 1], float [3, H, W] each, of any sizes.
        """
        return [Detections(one["boxes"], one["labels"] - 1, one["scores"]) for one in self.net(list(images))]


def build_detector(config: DetectorConfig, num_classes: int, score: float, most: int, seed: int) -> Detector:
    """A detector whose first weights are a function of the seed; see `Detector`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(config, num_classes, score, most)


def _transform(mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """torchvision's first part, which normalises and joins images, without its resize: whoever calls has resized."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    class Unresized(GeneralizedRCNNTransform):
        def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
            return image, target

    return Unresized(0, 0, list(mean), list(std))


def _batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    return itertools.chain(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
