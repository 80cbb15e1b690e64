"""Training of a detector on the boxes of labeled masks, and its search through a pool.

Source: "Weighting Pseudo-Labels via High-Activation Feature Index Similarity and Object Detection for Semi-Supervised
Semantic Segmentation", RPPI: Faster R-CNN, trained on the labeled images of the split alone. Differs: crops at several
scales, the cuts of the masks in them give the boxes; an averaged copy is kept instead of the epoch of lowest loss.
One process trains it. torchvision's losses and proposals wait for the device in every step; a detector's run is short.
Axes: B images, N boxes, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from raysemi.base import Config, choices
from raysemi.data.boxes import MOST, SCHEMA, mask_boxes
from raysemi.data.loader import DataConfig
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.types import HostBatch
from raysemi.data.views import ViewsConfig, generator
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.evaluate import read_ahead, same_size_batches
from raysemi.engine.optim import OptimConfig, Optimizer
from raysemi.engine.record import Meter
from raysemi.engine.teacher import AveragedCopy
from raysemi.errors import ConfigError
from raysemi.methods.base import Average, SingleRank
from raysemi.models.detector import Detections, Detector, DetectorConfig, build_detector
from raysemi.ops import photometric
from raysemi.ops.boxes import SAME, overlap


class BoxesConfig(Config):
    """`boxes.*` of a detector: what is a thing, how it is searched for, which boxes count."""

    classes: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the classes that are things; null: all but `background`."""
    min_area: int = Field(64, ge=0, json_schema_extra={"unit": "pixels"})
    """A connected component of a mask is a thing when it has more pixels than this, in training those of the view."""
    scale: float = Field(1.0, gt=0.0, le=8.0)
    """Size at which an image is searched, as a share of its own; about the middle of `data.views.scale`."""
    mirrored: bool = False
    """True: an image is searched as its mirror image too, and a box counts where both ways agree on it (same class,
    overlap 0.8 or more): their mean, with the lower of the two scores. Fewer boxes, better placed; twice the work."""
    score: float = Field(0.5, ge=0.0, lt=1.0)
    """Least score of a box that is stored."""
    accepted: float = Field(0.85, ge=0.0, lt=1.0, json_schema_extra=choices([0.8, 0.85, 0.9, 0.95]))
    """Score from which on `detect check` counts a box as accepted (paper: 0.85 on Pascal, 0.95 on Cityscapes); a run
    chooses its own, `weighting.score`."""
    most: int = Field(MOST, ge=1, le=MOST)
    """Boxes of an image at most."""
    batch: int = Field(4, ge=1)
    """Images that are searched in one pass."""

    @property
    def source_area(self) -> float:
        """`min_area` in pixels of the source image, for what is searched at `scale`."""
        return self.min_area / self.scale**2


class DetectTrainConfig(Config):
    """`train.*` of a detector."""

    steps: int = Field(10_000, ge=1)
    """Optimizer updates."""
    stop_at: int | None = Field(None, ge=1)
    """Ends cleanly with a checkpoint at this step; the same command without it goes on."""
    batch: int = Field(8, ge=1)
    """Images of a step."""
    warmup: int = Field(100, ge=0, json_schema_extra={"unit": "steps"})
    """Steps over which the learning rate rises to `optim.lr`."""
    average: float = Field(0.998, ge=0.0, lt=1.0, json_schema_extra=choices([0.99, 0.998, 0.9995]))
    """Largest decay of the averaged copy, per step; the copy is the detector that searches."""
    max_grad_norm: float = Field(10.0, ge=0.0)
    """Largest norm of the gradient; 0 = no clipping."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast: auto is bf16 on CUDA and fp32 elsewhere."""
    log_every: int = Field(20, ge=1)
    """Steps between two log lines."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between two checkpoints; null = a tenth of the run."""
    keep: int = Field(1, ge=1)
    """Newest checkpoints that are kept."""


class DetectConfig(Config):
    """A detector's run, complete: what `config.yaml` in its folder holds."""

    run: str = Field(min_length=1)
    """Run folder: a local path or a URL; the same command with the same folder goes on where it stopped."""
    seed: int = Field(0, ge=0)
    """Seed of every draw."""
    data: DataConfig = DataConfig(crop=512, views=ViewsConfig(greyscale=0.0, blur=0.0))
    """The labeled pool, and how its images are scaled, cut, flipped and coloured. `unlabeled` is not read; `val`, where
    it is given, is checked at the end."""
    model: DetectorConfig = DetectorConfig()
    """The network."""
    boxes: BoxesConfig = BoxesConfig()
    """Things and boxes."""
    train: DetectTrainConfig = DetectTrainConfig()
    """Steps and batch."""
    optim: OptimConfig = OptimConfig(lr=0.01, head_multiplier=1.0)
    """Optimizer and schedule."""

    @model_validator(mode="after")
    def _rules(self) -> DetectConfig:
        faults = []
        if not self.data.labeled:
            faults.append(
                "data.labeled must name a pool; got nothing. Make pools with `raysemi pack ... --out DIR` and add "
                "data.pools=DIR (short for its three pools)."
            )
        if self.train.stop_at is not None and self.train.stop_at > self.train.steps:
            faults.append(
                f"train.stop_at must be at most train.steps ({self.train.steps}); got {self.train.stop_at}. Lower it."
            )
        if self.boxes.accepted < self.boxes.score:
            faults.append(
                f"boxes.accepted must be at least boxes.score, {self.boxes.score}, below which no box is stored; got "
                f"{self.boxes.accepted}. Raise it, or lower boxes.score."
            )
        if faults:
            raise ConfigError(faults)
        return self


def thing_classes(config: BoxesConfig, pool: Pool) -> list[int]:
    """Indices of the pool's classes that are things, in the order of `boxes.classes`.

    Raises:
        ConfigError: a name that the pool does not have, or no class at all.
    """
    names = config.classes or tuple(name for name in pool.classes if name != "background")
    unknown = [name for name in names if name not in pool.classes]
    if unknown or not names or len(set(names)) < len(names):
        raise ConfigError(
            f"boxes.classes must name classes of {pool.path}, each once: {', '.join(pool.classes)}; got "
            f"{', '.join(unknown or names) or 'none'}. Correct the names."
        )
    return [pool.classes.index(name) for name in names]


def precision_of(config: DetectTrainConfig, device: torch.device) -> torch.dtype:
    """Autocast type of a device."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


class DetectorTrainer:
    """Everything that a step changes: detector, averaged copy, optimizer and the step counter.

    Args:
        config: the run.
        things: class indices of the detector's classes.
        device: where it trains.
    """

    def __init__(self, config: DetectConfig, things: Sequence[int], device: torch.device) -> None:
        self.config = config
        self.things = list(things)
        self.device = device
        self.precision = precision_of(config.train, device)
        boxes = config.boxes
        student = build_detector(config.model, len(things), boxes.score, boxes.most, config.seed)
        self.student = student.to(device).to(memory_format=torch.channels_last).train()
        average = Average(kind="ema", decay=config.train.average)
        self.average = AveragedCopy(self.student, average, period=1)
        self.optimizer = Optimizer(self.student, config.optim, config.train.steps, config.train.warmup)
        self.step = 0
        self._parameters = list(self.optimizer.names)
        self._meter = Meter()

    def train_step(self, host: HostBatch) -> dict[str, Tensor]:
        """One optimizer update on the labeled images of a batch; its terms and the gradient's norm."""
        config = self.config
        drawn = [
            photometric.draw(generator(config.seed, host.step, key, "photometric"), config.data.views)
            for key in host.keys_L
        ]
        images_B3HW = host.image_L3HW.to(self.device, torch.float32).div_(255.0)
        images_B3HW = photometric.apply(images_B3HW, torch.from_numpy(np.stack(drawn)))
        images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        targets = [mask_boxes(label_HW, self.things, config.boxes.min_area) for label_HW in host.label_LHW.numpy()]
        boxes = [torch.from_numpy(boxes_N4).to(self.device) for boxes_N4, _ in targets]
        labels = [torch.from_numpy(labels_N).to(self.device) for _, labels_N in targets]

        with _drawing(config.seed, host.step, self.device):  # torchvision samples from the global generator
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                losses = self.student.losses(images_B3HW, boxes, labels)
            total = torch.stack([value.float() for value in losses.values()]).sum()
            total.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if config.train.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, config.train.max_grad_norm, norm)
        finite = torch.isfinite(norm) & torch.isfinite(total)
        self.optimizer.step(self.step, finite)
        self.optimizer.zero_grad()
        self.average.after_step(self.student, self.step, finite)
        self.step += 1
        terms = {f"loss/{name}": value for name, value in losses.items()}
        return {"loss/total": total, **terms, "gradient_norm": norm, "skipped_steps": (~finite).float()}

    def fit(
        self,
        stream: Iterable[HostBatch],
        log: Callable[[int, dict[str, float]], None],
        save: Callable[[int], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Trains until the stream ends.

        Args:
            stream: the batches from `self.step` on.
            log: told (steps done, metrics) every `train.log_every` steps.
            save: told (steps done) every `train.checkpoint_every` steps and at the end.
            should_stop: asked after every step.

        Returns:
            False when `should_stop` ended it.
        """
        config = self.config.train
        save_every = config.checkpoint_every or max(1, config.steps // 10)
        stopped, saved = False, self.step
        self._meter.restart_clock()
        for host in stream:
            self._meter.add(self.train_step(host), images=len(host.keys_L))
            if self.step % config.log_every == 0 or self.step == config.steps:
                metrics = self._meter.read(SingleRank())
                log(self.step, metrics | {"lr": self.optimizer.learning_rate(self.step - 1)})
            stopped = should_stop()
            if self.step % save_every == 0 or stopped:
                save(self.step)
                saved = self.step
            if stopped:
                break
        if saved != self.step:
            save(self.step)
        return not stopped

    def snapshot(self) -> Snapshot:
        """The whole state, for a checkpoint."""
        tensors = {"student": self.student.state_dict(), "teacher": self.average.model.state_dict()}
        return Snapshot(self.step, {**tensors, "optimizer": self.optimizer.tensors()})

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a checkpoint of the same config."""
        self.student.load_state_dict(snapshot.tensors["student"])
        self.average.model.load_state_dict(snapshot.tensors["teacher"])
        self.optimizer.load_tensors(snapshot.tensors["optimizer"])
        self.step = snapshot.step


def search_pool(
    detector: Detector,
    things: Sequence[int],
    pool: Pool,
    config: BoxesConfig,
    device: torch.device,
    *,
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Detections]]:
    """What the detector finds in each image of a pool: (row of the index, boxes), on the CPU.

    The boxes are in source pixels, their labels class indices of the pool.

    Args:
        detector: on the device, in eval mode.
        things: class index of each of the detector's labels.
        pool: its masks are not opened.
        config: `boxes.*`.
        device: where the detector is.
        precision: autocast type; float32 = no autocast.
        progress: told (images done, images in all).

    Raises:
        DataError: a sample that cannot be read.
    """
    reader = Reader(pool)

    def read(rows: list[int]) -> tuple[list[int], list[Tensor], tuple[int, int]]:
        pictures = [reader.picture(row) for row in rows]
        width, height = pictures[0].size
        if config.scale != 1.0:
            size = max(1, round(width * config.scale)), max(1, round(height * config.scale))
            pictures = [picture.resize(size, Image.Resampling.BILINEAR) for picture in pictures]
        return rows, [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures], (height, width)

    done, class_of = 0, torch.tensor(list(things))
    batches = same_size_batches(pool, config.batch)
    reader.expect(batches)
    for rows, images, (height, width) in read_ahead(read, batches):
        batch = [image.to(device, torch.float32).div_(255.0) for image in images]
        with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            found = detector(batch)
            if config.mirrored:
                flipped = detector([image.flip(2) for image in batch])
                found = [agreed(*each, images[0].shape[2]) for each in zip(found, flipped, strict=True)]
        shrink_4 = torch.tensor([width / images[0].shape[2], height / images[0].shape[1]]).repeat(2)
        for row, one in zip(rows, found, strict=True):
            boxes_N4, labels_N, scores_N = (part.cpu() for part in one)
            yield row, Detections(boxes_N4.float() * shrink_4, class_of[labels_N], scores_N.float())
        done += len(rows)
        if progress is not None:
            progress(done, pool.num_samples)


def agreed(own: Detections, mirrored: Detections, width: int) -> Detections:
    """Boxes on which an image and its mirror image agree.

    Args:
        own: found in the image.
        mirrored: found in its mirror image.
        width: of both, pixels.

    Returns:
        For each box of `own` that overlaps one of its class by `SAME` or more once that is mirrored back: the mean of
        the two, with the lower score; best first.
    """
    if not len(own.boxes_N4) or not len(mirrored.boxes_N4):
        return Detections(*(part[:0] for part in own))
    x1_N, y1_N, x2_N, y2_N = mirrored.boxes_N4.unbind(dim=1)
    back_N4 = torch.stack((width - x2_N, y1_N, width - x1_N, y2_N), dim=1)
    same_NM = overlap(own.boxes_N4, back_N4) * (own.labels_N[:, None] == mirrored.labels_N)
    best_N, partner_N = same_NM.max(dim=1)
    scores_N = torch.minimum(own.scores_N, mirrored.scores_N[partner_N])
    both = Detections((own.boxes_N4 + back_N4[partner_N]) / 2, own.labels_N, scores_N)
    order = scores_N.argsort(descending=True, stable=True)
    return Detections(*(part[order[(best_N >= SAME)[order]]] for part in both))


def box_rows(key: str, found: Detections) -> pa.RecordBatch:
    """The boxes of one image as rows of `boxes-NAME.parquet`."""
    boxes_N4, labels_N, scores_N = (part.numpy() for part in found)
    columns = [*boxes_N4.T, labels_N.astype(np.uint8), scores_N]
    keys = pa.array([key] * len(scores_N), pa.string())
    return pa.RecordBatch.from_arrays([keys, *(pa.array(column) for column in columns)], schema=SCHEMA)


@contextmanager
def _drawing(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """torch's global generators, seeded by (seed, step); afterwards as they were before."""
    digest = hashlib.blake2b(f"{seed}/detector/{step}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest, "little"))
        yield
