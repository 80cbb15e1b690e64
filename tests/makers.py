"""Small real parts for tests: a network with a tiny encoder, a batch, a step's context, boxes of masks, a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from raysemi import config_io
from raysemi.cli import app
from raysemi.config import RunConfig
from raysemi.data.boxes import mask_boxes, write_boxes
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.types import SemiBatch
from raysemi.engine.detect import box_rows
from raysemi.methods.base import SingleRank, StepContext
from raysemi.models.decoders import DeepLabV3Plus
from raysemi.models.detector import Detections
from raysemi.models.encoders import Encoder, Features
from raysemi.models.segmentor import Channels, Prediction, Segmentor


class TinyEncoder(Encoder):
    """Three convolutions: 6 channels at stride 4, 10 at stride 8."""

    def __init__(self) -> None:
        low = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        high = nn.Sequential(nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10), nn.ReLU())
        net = nn.ModuleDict({"low": low, "high": high})
        super().__init__(net, (6, 10), 6, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def classifier_shapes(self) -> dict[str, torch.Size]:
        return {}

    def forward(self, images_B3HW: Tensor) -> Features:
        low_BDhw = self.net["low"](images_B3HW)
        return Features((low_BDhw, self.net["high"](low_BDhw)), low_BDhw)


def tiny_segmentor(
    num_classes: int,
    heads_of: Callable[[Channels], dict[str, nn.Module]] | None = None,
    seed: int = 0,
    frozen: bool = False,
) -> Segmentor:
    """The real network around a tiny encoder: some thousands of parameters besides the heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = TinyEncoder()
        decoder = DeepLabV3Plus(6, 10, num_classes, channels=8, low_channels=4, rates=(1, 2, 3))
        channels = Channels((6, 10), 6, decoder.joined_channels, decoder.penultimate_channels, decoder.pyramid_channels)
        heads = {} if heads_of is None else heads_of(channels)
        return Segmentor(encoder, decoder, heads, num_classes, frozen=frozen)


class PixelNet(nn.Module):
    """Logits that a pixel's own three channels decide: the channels themselves, until it learns. For worked numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor_K3 = nn.Parameter(torch.eye(3))

    def forward(self, images_B3HW: Tensor) -> Prediction:
        logits_BKHW = torch.einsum("kc,bchw->bkhw", self.factor_K3, images_B3HW)
        return Prediction(logits_BKHW, Features((logits_BKHW, logits_BKHW)), logits_BKHW, logits_BKHW)


def semi_batch(
    num_classes: int,
    labeled: int = 2,
    unlabeled: int = 2,
    height: int = 33,
    width: int = 41,
    seed: int = 0,
    second_view: bool = False,
    views: int = 1,
) -> SemiBatch:
    """Smooth random images: a strip of ignored labels, a padded strip, a CutMix box in each first unlabeled image."""
    generator = torch.Generator().manual_seed(seed)

    def images(count: int) -> Tensor:
        coarse = torch.rand(count, 3, 5, 6, generator=generator)
        return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)

    def valid() -> Tensor:
        valid_UHW = torch.ones(unlabeled, height, width, dtype=torch.bool)
        valid_UHW[-1:, :, width - 9 :] = False
        return valid_UHW

    label_LHW = torch.randint(0, num_classes, (labeled, height, width), generator=generator)
    label_LHW[:, : height // 4] = 255
    weak_U3HW = images(unlabeled)
    noise = torch.rand(views, unlabeled, 3, height, width, generator=generator)
    boxes_VU4 = torch.zeros(views, unlabeled, 4, dtype=torch.int64)
    boxes_VU4[:, :1] = torch.tensor([7, 5, 36, 22])
    second_weak_U3HW = images(unlabeled) if second_view else None
    return SemiBatch(
        image_L3HW=images(labeled),
        label_LHW=label_LHW,
        slots_L=torch.arange(labeled),
        weak_U3HW=weak_U3HW,
        valid_UHW=valid(),
        slots_U=torch.arange(unlabeled),
        strong_VU3HW=(0.7 * weak_U3HW + 0.3 * noise),
        boxes_VU4=boxes_VU4,
        second_weak_U3HW=second_weak_U3HW,
        second_strong_U3HW=None if second_weak_U3HW is None else 0.8 * second_weak_U3HW,
        second_valid_UHW=valid() if second_view else None,
    )


def step_context(
    student: Segmentor,
    teacher: Segmentor | None = None,
    step: int = 0,
    steps: int = 100,
    period: int = 10,
    **rest: object,
) -> StepContext:
    """The context of a step of a run with one rank and seed 0."""
    return StepContext(
        student=student,
        teacher=teacher,
        step=step,
        steps=steps,
        period=period,
        seed=0,
        **{"across": SingleRank(), **rest},
    )


def tiny_run(pools: Path, run: Path, method: str, *overrides: str) -> RunConfig:
    """A run on the drawn pools of `conftest.scenes` with timm's smallest test network; one process, seconds."""
    recipe = run.parent / f"{run.name}.yaml"
    recipe.write_text(f"method: {method}\n", encoding="utf-8")
    return config_io.load(recipe, [f"run={run}", *tiny_settings(pools), "ray=none", *overrides])


def tiny_settings(pools: Path) -> list[str]:
    """What makes any recipe a run of seconds on the drawn pools of `conftest.scenes`."""
    return [
        *(f"data.{name}={pools / name}" for name in ("labeled", "unlabeled", "val")),
        "data.crop=49",
        "data.loader_processes=0",
        "model.encoder=test_efficientnet",
        "model.weights=random",
        "model.channels=16",
        "model.low_channels=8",
        "train.batch.labeled=2",
        "train.batch.unlabeled=2",
        "train.log_every=1",
        "eval.every=1000",
        "eval.pictures=0",
        "optim.lr=0.01",
    ]


def true_boxes(pool: Pool, name: str = "masks", share: float = 1.0) -> None:
    """Boxes of the masks beside the pool, as a detector that is always right would write them."""
    reader, found = Reader(pool), []
    for row in range(int(share * pool.num_samples)):
        boxes, labels = mask_boxes(reader.mask(row), range(1, 7), 20)
        one = Detections(torch.from_numpy(boxes), torch.from_numpy(labels + 1), torch.ones(len(boxes)))
        found.append(box_rows(pool.key(row), one))
    write_boxes(pool, name, found, {"things": list(pool.classes[1:]), "min_area": 20})


def call(*arguments: object) -> Result:
    """`raysemi ARGUMENTS`, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
