"""Label maps and confidences of a pool, a shard for a shard: what is written can be a pool again.

A sample of the new shard is the image's bytes as they were, `KEY.mask.png` and `KEY.confidence.png`.
Axes: B images of one size, H x W pixels.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raysemi.data.paths import AnyPath
from raysemi.data.pool import CONFIDENCE_SUFFIX, Pool
from raysemi.data.reader import Reader
from raysemi.data.shard import Entry, ShardDone, ShardPlan, png, write_shard
from raysemi.data.sources import Item
from raysemi.engine.evaluate import EvalConfig, image_tensor, inference, predict_confident, read_ahead
from raysemi.errors import DataError, DataFailure
from raysemi.models.segmentor import Segmentor
from raysemi.ops.losses import IGNORE

_WINDOW = 32
"""Neighbours among which images of one size are sought for a batch; so many label maps wait for their turn."""
_EFFORT = 1  # for confidences: nearly noise, which no effort makes smaller

_Map = NDArray[np.uint8]


class _Read(NamedTuple):
    row: int
    suffix: str
    encoded: bytes
    image_HW3: _Map


class _Predicted(NamedTuple):
    suffix: str
    encoded: bytes
    label_HW: _Map
    confidence_HW: _Map


class ShardPredictor:
    """Writes shards of predictions.

    Args:
        network: on the device.
        pool: whose images are predicted; its own masks are not read.
        classes: class names of the network.
        config: `eval.*`; mode `original` or `sliding_window`.
        min_confidence: pixels that are less probable become 255.
        device: where the network is.
        precision: autocast type; float32 = no autocast.
    """

    def __init__(
        self,
        network: Segmentor,
        pool: Pool,
        classes: Sequence[str],
        config: EvalConfig,
        *,
        min_confidence: float,
        device: torch.device,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self._network, self._pool, self._config = network, pool, config
        self._classes = tuple(classes)
        self._min_confidence = min_confidence
        self._device, self._precision = device, precision
        self._reader = Reader(pool)
        self._ends = np.cumsum(pool.shard_rows)

    def write(self, number: int, path: AnyPath, fingerprint: str) -> ShardDone:
        """Writes the predictions of a shard, unless they are there already.

        Args:
            number: of the shard in the pool.
            path: the file to write.
            fingerprint: name of what decides its bytes.

        Returns:
            Its samples; with corrupt images, each named in a fault, nothing is written.

        Raises:
            DataError: the shard cannot be stored; a DataFailure when it cannot be read or the disk is full.
        """
        rows = range(int(self._ends[number] - self._pool.shard_rows[number]), int(self._ends[number]))
        keys = [self._pool.key(row) for row in rows]
        entries = tuple(Entry(key, Item(key, has_mask=True), with_mask=True) for key in keys)
        with closing(self._predictions(rows)) as predictions:
            samples = _PredictedSamples(self._classes, predictions)
            return write_shard(samples, ShardPlan(path, entries, fingerprint), samples.sides)

    def _predictions(self, rows: range) -> Generator[_Predicted | DataError, None, None]:
        """Of each row, in order. One thread reads, another predicts, the caller's encodes and writes."""
        batches = list(self._batches(rows))
        self._reader.expect(batches)
        waiting: dict[int, _Predicted | DataError] = {}
        turn = count(rows.start)
        row = next(turn)
        for found in read_ahead(self._predict, read_ahead(self._read, batches)):
            waiting.update(found)
            while row in waiting:
                yield waiting.pop(row)
                row = next(turn)

    def _batches(self, rows: range) -> Iterator[list[int]]:
        # windows fill a pass on their own, so that one image at a time is enough there
        batch = 1 if self._config.mode == "sliding_window" else self._config.batch
        for start in range(0, len(rows), _WINDOW):
            of_size: dict[tuple[int, int], list[int]] = defaultdict(list)
            for row in rows[start : start + _WINDOW]:
                place = self._pool.row(row)
                of_size[place.height, place.width].append(row)
            for same in of_size.values():
                yield from (same[first : first + batch] for first in range(0, len(same), batch))

    def _read(self, rows: list[int]) -> dict[int, _Read | DataError]:
        found: dict[int, _Read | DataError] = {}
        for row in rows:
            try:
                image_HW3, encoded = self._reader.image(row), self._reader.encoded(row)
                found[row] = _Read(row, _suffix(encoded), encoded, image_HW3)
            except DataFailure:
                raise
            except DataError as error:
                found[row] = error
        return found

    def _predict(self, found: dict[int, _Read | DataError]) -> dict[int, _Predicted | DataError]:
        good = [one for one in found.values() if isinstance(one, _Read)]
        predicted: dict[int, _Predicted | DataError] = {
            row: one for row, one in found.items() if isinstance(one, DataError)
        }
        if good:
            with inference(self._network, self._device, self._precision):
                images_B3HW = image_tensor([one.image_HW3 for one in good], self._device)
                label_BHW, confidence_BHW = predict_confident(self._network, images_B3HW, self._config)
                label_BHW.masked_fill_(confidence_BHW < self._min_confidence, IGNORE)
                shares_BHW = (255 * confidence_BHW).round().to(torch.uint8)
            maps = zip(label_BHW.cpu().numpy(), shares_BHW.cpu().numpy(), strict=True)
            for one, (label_HW, share_HW) in zip(good, maps, strict=True):
                predicted[one.row] = _Predicted(one.suffix, one.encoded, label_HW, share_HW)
        return predicted


class _PredictedSamples:
    """A shard's predictions as `write_shard` asks for them: an image, then what belongs to it."""

    def __init__(self, classes: tuple[str, ...], predictions: Iterator[_Predicted | DataError]) -> None:
        self.classes = classes
        self._predictions = predictions
        self._one: _Predicted | None = None

    def image_bytes(self, item: Item) -> tuple[str, bytes]:
        one = next(self._predictions)
        if isinstance(one, DataError):
            raise one
        self._one = one
        return one.suffix, one.encoded

    def mask(self, item: Item) -> _Map:
        assert self._one is not None  # its image came first
        return self._one.label_HW

    def sides(self, item: Item) -> Mapping[str, bytes]:
        assert self._one is not None
        return {CONFIDENCE_SUFFIX: png(self._one.confidence_HW, _EFFORT)}


def _suffix(encoded: bytes) -> str:
    """Suffix of an image that has been decoded."""
    with Image.open(io.BytesIO(encoded)) as image:
        return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[image.format or ""]
