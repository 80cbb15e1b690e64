"""Prediction of whole images, of their centre or in windows, and the confusion matrix of a labeled pool.

Axes: B images of one size, K classes, H x W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from raysemi.base import Config
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.errors import DataError
from raysemi.methods.base import AcrossRanks
from raysemi.models.segmentor import Segmentor
from raysemi.ops.confusion import confusion_matrix
from raysemi.ops.losses import IGNORE

T = TypeVar("T")
R = TypeVar("R")


class EvalConfig(Config):
    """How and how often the network is evaluated."""

    mode: Literal["original", "center_crop", "sliding_window"] = "original"
    """original: one pass over the whole image. center_crop: the centred window alone is predicted and scored.
    sliding_window: overlapping windows, probabilities summed."""
    window: int | None = Field(None, ge=8)
    """Side of the window, in pixels; needed by center_crop and sliding_window (801 for Cityscapes in UniMatch)."""
    stride: int | None = Field(None, ge=1)
    """Pixels between two windows; null: two thirds of the window, rounded down."""
    shifted: bool | None = None
    """sliding_window: the last window of a row or column is shifted back into the image instead of cut off at its
    edge; then all windows have one size. null: for transformers alone, as UniMatch V2 does and UniMatch does not."""
    batch: int = Field(4, ge=1)
    """Images, or windows, in one pass."""
    every: int = Field(1000, ge=1)
    """Steps between two evaluations; the last step is always evaluated."""
    pseudo_images: int = Field(0, ge=0)
    """Unlabeled images on which pseudo-labels are measured at each evaluation; their kept masks are opened only
    then."""
    pictures: int = Field(4, ge=0)
    """Images of each kind that are drawn at each evaluation."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.mode != "original" and self.window is None:
            raise ValueError(f"window must be given for mode {self.mode}; got null. Set eval.window, such as 801.")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"stride must be at most the window ({self.window}), or pixels are missed; got {self.stride}. "
                "Lower eval.stride."
            )
        return self


class Window(NamedTuple):
    """A part of an image, in pixels, half open."""

    top: int
    bottom: int
    left: int
    right: int


def windows(height: int, width: int, window: int, stride: int, shifted: bool) -> list[Window]:
    """The windows that cover an image, row by row.

    A row or column of windows ends with the first one that reaches the edge: on Cityscapes these are the windows of
    the published protocols, and a smaller image gets no extra strip.

    Args:
        height, width: of the image.
        window: side of a window.
        stride: pixels between two windows, at most `window`.
        shifted: shift the last ones back into the image instead of cutting them off.
    """
    rows, columns = (_spans(length, window, stride, shifted) for length in (height, width))
    return [Window(top, bottom, left, right) for top, bottom in rows for left, right in columns]


def _spans(length: int, window: int, stride: int, shifted: bool) -> list[tuple[int, int]]:
    num_strides = max(0, -(-(length - window) // stride))
    starts = [stride * i for i in range(num_strides + 1)]
    if shifted:
        starts[-1] = max(0, length - window)
    return [(start, min(start + window, length)) for start in starts]


def image_tensor(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """RGB images HxWx3 of one size -> float32 [B, 3, H, W] in [0, 1] on the device, channels last in memory."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float().div_(255)


@contextmanager
def inference(network: Segmentor, device: torch.device, precision: torch.dtype = torch.float32) -> Iterator[None]:
    """Eval mode without gradients, under autocast unless `precision` is float32; every module's mode is restored."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict_probabilities(network: Segmentor, images_B3HW: Tensor, config: EvalConfig) -> Tensor:
    """Class probabilities per pixel; call it inside `inference`.

    Args:
        network: in eval mode.
        images_B3HW: RGB in [0, 1], float, on the network's device.
        config: `eval.*`.

    Returns:
        float32 [B, K, H, W]; sums to 1 over K, or to 0 outside the centre of `center_crop`.
    """
    if config.mode == "sliding_window":
        sum_BKHW, count_HW = _sliding(network, images_B3HW, config)
        return sum_BKHW / count_HW
    if config.mode == "center_crop":
        return _center(network, images_B3HW, config)
    return network(images_B3HW).logits_BKHW.float().softmax(dim=1)


def predict_labels(network: Segmentor, images_B3HW: Tensor, config: EvalConfig) -> Tensor:
    """Most probable class per pixel; call it inside `inference`.

    Args:
        network: in eval mode.
        images_B3HW: RGB in [0, 1], float, on the network's device.
        config: `eval.*`.

    Returns:
        uint8 [B, H, W]; 255 outside the centre of `center_crop`.
    """
    if config.mode == "original":
        return network(images_B3HW).logits_BKHW.argmax(dim=1).to(torch.uint8)
    if config.mode == "sliding_window":  # dividing by the count of windows would not move the maximum
        return _sliding(network, images_B3HW, config)[0].argmax(dim=1).to(torch.uint8)
    probabilities_BKHW = _center(network, images_B3HW, config)
    seen_BHW = probabilities_BKHW.sum(dim=1) > 0
    return probabilities_BKHW.argmax(dim=1).masked_fill_(~seen_BHW, IGNORE).to(torch.uint8)


def predict_confident(network: Segmentor, images_B3HW: Tensor, config: EvalConfig) -> tuple[Tensor, Tensor]:
    """Most probable class per pixel, and how probable it is; call it inside `inference`.

    Args:
        network: in eval mode.
        images_B3HW: RGB in [0, 1], float, on the network's device.
        config: `eval.*`, mode `original` or `sliding_window`.

    Returns:
        uint8 [B, H, W], the very labels of `predict_labels`; float32 [B, H, W] in [0, 1].
    """
    if config.mode == "original":
        scores_BKHW = network(images_B3HW).logits_BKHW
        confidence_BHW = scores_BKHW.float().softmax(dim=1).amax(dim=1)
    else:
        scores_BKHW, count_HW = _sliding(network, images_B3HW, config)
        confidence_BHW = scores_BKHW.amax(dim=1) / count_HW
    return scores_BKHW.argmax(dim=1).to(torch.uint8), confidence_BHW


def _sliding(network: Segmentor, images_B3HW: Tensor, config: EvalConfig) -> tuple[Tensor, Tensor]:
    """Sum of the windows' probabilities, and how many windows saw each pixel."""
    assert config.window is not None  # the config's validator has seen to it
    batch, _, height, width = images_B3HW.shape
    stride = config.stride or 2 * config.window // 3
    of_size: dict[tuple[int, int], list[tuple[int, Window]]] = defaultdict(list)
    shifted = network.encoder.multiple > 1 if config.shifted is None else config.shifted
    for part in windows(height, width, config.window, stride, shifted):
        of_size[part.bottom - part.top, part.right - part.left] += [(image, part) for image in range(batch)]
    sum_BKHW = images_B3HW.new_zeros((batch, network.num_classes, height, width), dtype=torch.float32)
    count_HW = images_B3HW.new_zeros((height, width), dtype=torch.float32)
    for jobs in of_size.values():
        for start in range(0, len(jobs), config.batch):
            chunk = jobs[start : start + config.batch]
            crops = torch.stack([images_B3HW[b, :, w.top : w.bottom, w.left : w.right] for b, w in chunk])
            crops = crops.contiguous(memory_format=torch.channels_last)
            for (b, w), probabilities in zip(chunk, network(crops).logits_BKHW.float().softmax(dim=1), strict=True):
                sum_BKHW[b, :, w.top : w.bottom, w.left : w.right] += probabilities
                if b == 0:
                    count_HW[w.top : w.bottom, w.left : w.right] += 1
    return sum_BKHW, count_HW


def _center(network: Segmentor, images_B3HW: Tensor, config: EvalConfig) -> Tensor:
    """Probabilities inside the centred window, 0 outside; smaller images are padded on all sides by the mean colour."""
    assert config.window is not None  # the config's validator has seen to it
    batch, _, height, width = images_B3HW.shape
    side = config.window
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    rows, columns = min(side, height), min(side, width)
    crop = images_B3HW[:, :, top : top + rows, left : left + columns]
    above, before = (side - rows) // 2, (side - columns) // 2
    margins = (before, side - columns - before, above, side - rows - above)
    padded = functional.pad(crop - network.mean, margins) + network.mean  # 0 for the encoder once normalised
    inside = network(padded).logits_BKHW[:, :, above : above + rows, before : before + columns].float().softmax(dim=1)
    result_BKHW = inside.new_zeros((batch, network.num_classes, height, width))
    result_BKHW[:, :, top : top + rows, left : left + columns] = inside
    return result_BKHW


def evaluate(
    network: Segmentor,
    pool: Pool,
    config: EvalConfig,
    across: AcrossRanks,
    device: torch.device,
    *,
    precision: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
    at_most: int | None = None,
) -> Tensor:
    """Confusion matrix of the network over a labeled pool, each image counted once over all ranks.

    Images are put into batches of one size before the batches are dealt to the ranks, so that every image meets the
    same neighbours, and the matrix has the same bits, on any number of ranks. All ranks must call it.

    Args:
        network: on the device; its modes are restored afterwards.
        pool: every sample has a mask.
        config: `eval.*`.
        across: the ranks; one sum at the end.
        device: where the network is.
        precision: autocast type; float32 = no autocast.
        progress: told (images done, images in all) of this rank.
        at_most: so many of the pool's images, evenly spread; None: all.

    Returns:
        int64 [K, K] on the CPU, rows labels, columns predictions; the same on every rank.

    Raises:
        DataError: the pool has samples without a mask, a sample cannot be read, or a mask does not fit; on all ranks.
    """
    matrix_KK = torch.zeros(network.num_classes, network.num_classes, dtype=torch.int64, device=device)
    failure: DataError | None = None
    try:
        matrix_KK += _own_share(network, pool, config, across, device, precision, progress, at_most)
    except DataError as error:
        failure = error  # the other ranks wait in the sum below: they are told there
    failed = torch.tensor([failure is not None], dtype=torch.int64, device=device)
    total = across.sum(torch.cat((matrix_KK.flatten(), failed))).cpu()
    if failure is not None:
        raise failure
    if total[-1]:
        raise DataError(
            f"{pool.path} must be readable on every rank; got {int(total[-1])} of {across.world} that failed. "
            f"See the log of the other ranks (this is rank {across.rank})."
        )
    return total[:-1].view_as(matrix_KK)


def _own_share(
    network: Segmentor,
    pool: Pool,
    config: EvalConfig,
    across: AcrossRanks,
    device: torch.device,
    precision: torch.dtype,
    progress: Callable[[int, int], None] | None,
    at_most: int | None,
) -> Tensor:
    """Confusion matrix of every world-th batch, on the device."""
    if not pool.num_samples or not pool.labeled:
        raise DataError(
            f"{pool.path} must have samples that all have a mask; got {pool.num_samples} samples, not all with one. "
            "Evaluate on a labeled pool, such as val."
        )
    if len(pool.classes) != network.num_classes:
        raise DataError(
            f"{pool.path} must have the {network.num_classes} classes of the network; got {len(pool.classes)}. "
            "Evaluate on a pool made with the same class map."
        )
    reader = Reader(pool)

    def read(rows: list[int]) -> tuple[list[int], list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
        return rows, [reader.image(row) for row in rows], [reader.mask(row) for row in rows]

    # windows fill a pass on their own, so that one image at a time is enough there
    batches = same_size_batches(pool, 1 if config.mode == "sliding_window" else config.batch)
    if at_most is not None:
        spread = set(range(0, pool.num_samples, -(-pool.num_samples // at_most)))
        batches = [chosen for rows in batches if (chosen := [row for row in rows if row in spread])]
    mine = batches[across.rank :: across.world]
    reader.expect(mine, masks=True)
    matrix_KK = torch.zeros(network.num_classes, network.num_classes, dtype=torch.int64, device=device)
    done, total = 0, sum(map(len, mine))
    with inference(network, device, precision):
        for rows, images, labels in read_ahead(read, mine):
            predicted_BHW = predict_labels(network, image_tensor(images, device), config)
            labels_BHW = torch.from_numpy(np.stack(labels)).to(device)
            if config.mode == "center_crop":
                labels_BHW = labels_BHW.masked_fill(predicted_BHW == IGNORE, IGNORE)
                predicted_BHW = predicted_BHW.masked_fill(predicted_BHW == IGNORE, 0)
            try:
                matrix_KK += confusion_matrix(predicted_BHW, labels_BHW, network.num_classes)
            except DataError as error:
                keys = ", ".join(pool.key(row) for row in rows)
                raise DataError(f"{pool.path}: {error} (among {keys})") from error
            done += len(rows)
            if progress is not None:
                progress(done, total)
    return matrix_KK


def same_size_batches(pool: Pool, batch: int) -> list[list[int]]:
    """All rows of a pool in batches of images of one size, nearly in the order of the index."""
    groups = pool.rows.groups(("height", "width"))
    sizes = (size for group in groups for size in zip(*(column.to_pylist() for column in group.columns), strict=True))
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
    batches = []
    for row, size in enumerate(sizes):
        waiting[size].append(row)
        if len(waiting[size]) == batch:
            batches.append(waiting.pop(size))
    return [*batches, *waiting.values()]


def read_ahead(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map(read, items)`, two items ahead on one other thread: decoding goes on while the network computes."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = []
        try:
            for item in items:
                pending.append(thread.submit(read, item))
                if len(pending) > 2:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
