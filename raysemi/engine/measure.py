"""How good the pseudo-labels are, and pictures of them: looks at a method from outside and changes nothing in it.

Copies of student, teacher and method run one step's forward work on fixed views of fixed unlabeled images, without
CutMix, so that every map lies on the truth. Masks of unlabeled images are opened only when `eval.pseudo_images` asks
for it.

Axes: U unlabeled images, K classes, H x W pixels.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.types import HostBatch, SemiBatch
from raysemi.data.views import on_device
from raysemi.engine.evaluate import EvalConfig, image_tensor, inference, predict_labels
from raysemi.engine.trainer import Trainer
from raysemi.methods.base import SingleRank
from raysemi.ops.losses import IGNORE

Palette = tuple[tuple[int, int, int], ...]
Panels = list[tuple[str, bytes]]
"""(title, PNG bytes) each, from left to right."""
LARGEST_WIDTH = 480
STAGES = {"before": ("pseudo", "trusted_before"), "after": ("propagated", "trusted")}
"""Observed maps of each stage: labels, and which pixels are kept."""


@dataclass(frozen=True)
class Look:
    """What a method made of one batch: its observed maps, and the prediction of the network that is evaluated."""

    batch: SemiBatch
    keys_U: tuple[str, ...]
    truth_UHW: Tensor | None
    maps: dict[str, Tensor]
    predicted_UHW: Tensor


@torch.no_grad()
def look(trainer: Trainer, hosts: Iterable[HostBatch]) -> Iterator[Look]:
    """Runs copies of student, teacher and method on batches; the trainer's state stays as it is to the last bit.

    Args:
        trainer: the run; all ranks look equally often, since SyncBatchNorm (several GPUs) joins them.
        hosts: batches with labeled and unlabeled images.
    """
    student, method = copy.deepcopy(trainer.student).train(), copy.deepcopy(trainer.method).train()
    teacher = copy.deepcopy(trainer.context().teacher)  # its statistics may be its own
    for host in hosts:
        # Un-mixed: inside a CutMix box the maps would belong to another image than the truth.
        batch = on_device(
            replace(host, boxes_VU4=torch.zeros_like(host.boxes_VU4)), trainer.device, trainer.memory_format
        )
        maps: dict[str, Tensor] = {}
        context = replace(trainer.context(maps.__setitem__), student=student, teacher=teacher, across=SingleRank())
        with torch.autocast(trainer.device.type, trainer.precision, enabled=trainer.precision != torch.float32):
            method.objectives(batch, context)
        with inference(trainer.evaluated, trainer.device, trainer.precision):
            predicted = trainer.evaluated(batch.weak_U3HW).logits_BKHW.argmax(dim=1)
        truth = host.truth_UHW.to(trainer.device) if host.truth_UHW is not None else None
        yield Look(batch, host.keys_U, truth, {k: v for k, v in maps.items() if v.ndim == 3}, predicted)


class PseudoQuality:
    """Counts of valid, correct, kept, kept and correct pixels, per class of the truth, before and after propagation.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self.counts = {stage: torch.zeros(4, num_classes, dtype=torch.int64) for stage in STAGES}

    def add(self, look: Look) -> None:
        """Adds a batch; a stage that the method does not observe stays empty."""
        assert look.truth_UHW is not None  # measuring streams carry truth
        truth, valid = look.truth_UHW.long(), look.batch.valid_UHW & (look.truth_UHW != IGNORE)
        for stage, (label_name, kept_name) in STAGES.items():
            labels = look.maps.get(label_name)
            kept = look.maps.get(kept_name, look.maps.get("trusted"))
            if labels is None or kept is None:
                continue
            correct = labels == truth
            for row, mask in enumerate((valid, valid & correct, valid & kept, valid & kept & correct)):
                self.counts[stage][row] += torch.bincount(truth[mask], minlength=self._num_classes).cpu()

    def metrics(self, classes: tuple[str, ...]) -> dict[str, float]:
        """Shares in percent, by name: overall, and per class of the truth.

        accuracy: correct / valid. kept_accuracy: kept and correct / kept. mining: kept and correct / correct.
        effective: kept and correct / valid.
        """
        metrics: dict[str, float] = {}
        for stage, counts in self.counts.items():
            if not counts[0].sum():
                continue
            columns = [("", counts.sum(dim=1))] + [(f"/{name}", counts[:, k]) for k, name in enumerate(classes)]
            for suffix, column in columns:
                valid, correct, kept, both = (float(value) for value in column)
                for name, part, whole in (
                    ("accuracy", correct, valid),
                    ("kept_accuracy", both, kept),
                    ("mining", both, correct),
                    ("effective", both, valid),
                ):
                    if whole:
                        metrics[f"pseudo/{name}_{stage}{suffix}"] = 100.0 * part / whole
        return metrics


def unlabeled_panels(look: Look, image: int, palette: Palette) -> Panels:
    """Pictures of one unlabeled image: weak view, pseudo-labels, kept pixels, weights, prediction, truth if opened."""
    shown = (look.batch.weak_U3HW[image].permute(1, 2, 0).float().cpu().numpy() * 255).round().astype(np.uint8)
    maps = {name: values[image].cpu().numpy() for name, values in look.maps.items()}
    after = maps.get("propagated", maps.get("pseudo"))
    panels = [("image", encode(shown))]
    if "pseudo" in maps:
        panels.append(("pseudo-label", encode(colour(maps["pseudo"], palette))))
    if "propagated" in maps:
        panels.append(("after propagation", encode(colour(maps["propagated"], palette))))
    if "trusted" in maps and after is not None:
        kept = np.where(maps["trusted"].astype(bool), after, IGNORE)
        panels.append(("kept pixels", encode(colour(kept, palette))))
    if "weight" in maps:
        panels.append(("weight", encode(grey(maps["weight"]))))
    panels.append(("prediction", encode(colour(look.predicted_UHW[image].cpu().numpy(), palette))))
    if look.truth_UHW is not None:
        panels.append(("truth", encode(colour(look.truth_UHW[image].cpu().numpy(), palette))))
    return panels


def val_panels(trainer: Trainer, pool: Pool, config: EvalConfig, count: int) -> Iterator[tuple[str, Panels]]:
    """Image, prediction and truth of a few images of a labeled pool, evenly spaced, as (key, panels)."""
    reader = Reader(pool)
    for row in np.linspace(0, pool.num_samples - 1, min(count, pool.num_samples)).round().astype(int).tolist():
        image, truth = reader.image(row), reader.mask(row)
        with inference(trainer.evaluated, trainer.device, trainer.precision):
            predicted = (
                predict_labels(trainer.evaluated, image_tensor([image], trainer.device), config)[0].cpu().numpy()
            )
        pictures = {"image": image, "prediction": colour(predicted, pool.palette), "truth": colour(truth, pool.palette)}
        yield pool.key(row), [(title, encode(picture)) for title, picture in pictures.items()]


def colour(labels_HW: NDArray[Any], palette: Palette) -> NDArray[np.uint8]:
    """Label map -> uint8 RGB picture; ignored pixels are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[labels_HW.astype(np.uint8)]


def grey(weight_HW: NDArray[Any]) -> NDArray[np.uint8]:
    """Weights of pixels, from 0 (black) to the larger of 1 and the largest weight (white) -> uint8 RGB picture."""
    shade_HW = (weight_HW / max(1.0, float(weight_HW.max())) * 255.0).round().astype(np.uint8)
    return np.repeat(shade_HW[:, :, None], 3, axis=2)


def encode(picture_HW3: NDArray[np.uint8]) -> bytes:
    """PNG bytes of an RGB picture, at most 480 pixels wide: pictures are for looking at."""
    picture, buffer = Image.fromarray(picture_HW3), io.BytesIO()
    if picture.width > LARGEST_WIDTH:
        size = LARGEST_WIDTH, max(1, round(picture.height * LARGEST_WIDTH / picture.width))
        picture = picture.resize(size, Image.Resampling.BOX)
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
