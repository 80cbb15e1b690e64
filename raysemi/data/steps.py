"""What one process makes of a step: which samples, what is drawn of each, their bytes read, decoded and stacked.

Rows are looked up and views drawn for a whole step before its first image is decoded: between two decodings, which
empty the processor's caches, the same work takes several times as long.
Axes: L labeled, U unlabeled images of this rank, V strong views, N boxes of an image, P parameters, S side of the crop.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from raysemi.data.ahead import Ahead, Payloads
from raysemi.data.boxes import PoolBoxes
from raysemi.data.joined import AnyPool
from raysemi.data.mixture import order_of
from raysemi.data.pool import NOT_ANNOTATED, Row
from raysemi.data.reader import Reader, Sample, Skipped
from raysemi.data.types import HostBatch, StrongViews
from raysemi.data.views import (
    FAMILIES,
    Geometry,
    draw_any_size,
    draw_box,
    draw_geometry,
    generator,
    label_view,
    valid_view,
    weak_view,
)
from raysemi.errors import RaysemiError

if TYPE_CHECKING:
    from raysemi.data.loader import DataConfig

_TABLE_STEPS = 64  # steps whose rows are looked up together


class Fault(NamedTuple):
    """An error on its way out of a loader process, which alone would lose its cause there."""

    error: RaysemiError
    cause: BaseException | None


class Fetched(NamedTuple):
    """A step on its way into a loader process, with the bytes of remote pools that it needs, or the error instead."""

    step: int
    payloads: dict[str, Payloads]
    fault: Fault | None


class _Strong(NamedTuple):
    """What is drawn of an unlabeled image besides the geometry of its weak view."""

    photometric_VP: list[NDArray[np.float32]]
    boxes_V4: list[tuple[int, int, int, int]]
    second: Geometry | None
    second_P: NDArray[np.float32] | None


class _Planned(NamedTuple):
    """A sample of a step before it is read."""

    row_index: int
    row: Row
    number: int
    """Pass over the pool in which it stands here."""
    geometry: Geometry
    strong: _Strong | None
    """None for a labeled sample."""


class Steps(Dataset[Any]):
    """Step -> (batch or the error that it met, what was skipped). Errors travel as values: their text stays."""

    def __init__(
        self,
        config: DataConfig,
        pools: Mapping[str, AnyPool],
        seed: int,
        batches: Mapping[str, int],
        rank: int,
        world: int,
        strong_views: int,
        second_view: bool,
        with_truth: bool,
        strong: StrongViews,
        given: float,
        boxes: PoolBoxes | None,
    ) -> None:
        self.config, self.seed, self.strong = config, seed, strong
        self.given, self.boxes = given, boxes
        self.strong_views, self.second_view, self.with_truth = strong_views, second_view, with_truth
        self.readers = {name: Reader(pool, config.on_corrupt) for name, pool in pools.items()}
        self.orders = {name: order_of(pool, seed, batches[name]) for name, pool in pools.items()}
        self.slots = {name: (rank * batches[name] // world, (rank + 1) * batches[name] // world) for name in pools}

    def __getitem__(self, step: int | Fetched) -> tuple[HostBatch | Fault, tuple[Skipped, ...]]:
        skipped: list[Skipped] = []
        if isinstance(step, Fetched):
            if step.fault is not None:
                return step.fault, ()
            for name, payloads in step.payloads.items():
                self.readers[name].given = payloads
            step = step.step
        try:
            return self._batch(step, skipped), tuple(skipped)
        except RaysemiError as error:
            return Fault(error, error.__cause__), ()

    def _batch(self, step: int, skipped: list[Skipped]) -> HostBatch:
        side, views, family = self.config.crop, self.strong_views, FAMILIES[self.strong]
        labeled, unlabeled = self._planned("labeled", step), self._planned("unlabeled", step)

        # Views are made in the batch's own memory: to stack them would copy each once more.
        pasted = len(labeled) if self.given > 0.0 else 0
        image_LHW3, given_LHW3 = _pictures(len(labeled), side), _pictures(pasted, side)
        label_LHW, given_label_LHW = _maps(len(labeled), side), _maps(pasted, side)
        keys_L = []
        for i, (sample, planned) in enumerate(self._samples("labeled", labeled, True, skipped)):
            assert sample.mask is not None
            weak_view(sample.image, planned.geometry, image_LHW3[i])
            label_view(sample.mask, planned.geometry, label_LHW[i])
            keys_L.append(sample.key)
            if self.given > 0.0:
                self._another(sample.key, planned.number, skipped, given_LHW3[i], given_label_LHW[i])

        num = len(unlabeled)
        seconds, truths = num if self.second_view else 0, num if self.with_truth else 0
        weak_UHW3, second_UHW3 = _pictures(num, side), _pictures(seconds, side)
        valid_UHW, second_valid_UHW = _maps(num, side, np.bool_), _maps(seconds, side, np.bool_)
        truth_UHW, keys_U = _maps(truths, side), []
        boxes_VU4 = np.zeros((views, num, 4), dtype=np.int64)
        photometric_VUP = np.zeros((views, num, len(family.PARAMETERS)), dtype=np.float32)
        second_UP = np.zeros((num, len(family.PARAMETERS)), dtype=np.float32)
        found_UN5 = np.empty((num, self.boxes.most if self.boxes is not None else 0, 5), dtype=np.float32)
        for u, (sample, planned) in enumerate(self._samples("unlabeled", unlabeled, self.with_truth, skipped)):
            geometry, strong = planned.geometry, planned.strong
            assert strong is not None
            weak_view(sample.image, geometry, weak_UHW3[u])
            valid_view(geometry, valid_UHW[u])
            keys_U.append(sample.key)
            if self.boxes is not None:
                found_UN5[u] = self.boxes.view(sample.row, geometry)
            if views:
                photometric_VUP[:, u] = strong.photometric_VP
                boxes_VU4[:, u] = strong.boxes_V4
            if sample.mask is not None:
                label_view(sample.mask, geometry, truth_UHW[u])
            if strong.second is not None:
                weak_view(sample.image, strong.second, second_UHW3[u])
                valid_view(strong.second, second_valid_UHW[u])
                second_UP[u] = strong.second_P

        return HostBatch(
            step=step,
            image_L3HW=_channels_first(image_LHW3),
            label_LHW=torch.from_numpy(label_LHW),
            slots_L=self._slots("labeled"),
            keys_L=tuple(keys_L),
            weak_U3HW=_channels_first(weak_UHW3),
            valid_UHW=torch.from_numpy(valid_UHW),
            slots_U=self._slots("unlabeled"),
            keys_U=tuple(keys_U),
            boxes_VU4=torch.from_numpy(boxes_VU4),
            photometric_VUP=torch.from_numpy(photometric_VUP),
            second_weak_U3HW=_channels_first(second_UHW3) if self.second_view else None,
            second_valid_UHW=torch.from_numpy(second_valid_UHW) if self.second_view else None,
            second_photometric_UP=torch.from_numpy(second_UP) if self.second_view else None,
            given_L3HW=_channels_first(given_LHW3) if self.given > 0.0 else None,
            given_label_LHW=torch.from_numpy(given_label_LHW) if self.given > 0.0 else None,
            truth_UHW=torch.from_numpy(truth_UHW) if self.with_truth else None,
            strong=self.strong,
            found_UN5=torch.from_numpy(found_UN5) if self.boxes is not None else None,
        )

    def _planned(self, name: str, step: int) -> list[_Planned]:
        """This rank's samples of a step, by slot, with all that is drawn of them."""
        if name not in self.readers:
            return []
        pool = self.readers[name].pool
        rows, numbers = (found.tolist() for found in self.orders[name].slots(step, *self.slots[name]))
        return [self._drawn(name, i, pool.row(i), number) for i, number in zip(rows, numbers, strict=True)]

    def _drawn(self, name: str, row_index: int, row: Row, number: int) -> _Planned:
        strong = self._strong(row, number) if name == "unlabeled" else None
        return _Planned(row_index, row, number, self._geometry(row, number, "geometry"), strong)

    def _strong(self, row: Row, number: int) -> _Strong:
        family, config, draws = FAMILIES[self.strong], self.config, (self.seed, number, row.key)
        photometric_VP, boxes_V4 = [], []
        for v in range(self.strong_views):
            photometric_VP.append(family.draw(generator(*draws, f"photometric {v}"), config.views))
            box = (
                (0, 0, 0, 0)
                if self.with_truth
                else draw_box(generator(*draws, f"cutmix {v}"), config.views, config.crop)
            )
            boxes_V4.append(box)
        if not self.second_view:
            return _Strong(photometric_VP, boxes_V4, None, None)
        second_P = family.draw(generator(*draws, "second photometric"), config.views)
        return _Strong(photometric_VP, boxes_V4, self._geometry(row, number, "second geometry"), second_P)

    def _geometry(self, row: Row, number: int, name: str) -> Geometry:
        rng = generator(self.seed, number, row.key, name)
        return draw_geometry(rng, self.config.views, row.height, row.width, self.config.crop)

    def _samples(
        self, name: str, planned: Sequence[_Planned], with_mask: bool, skipped: list[Skipped]
    ) -> Iterator[tuple[Sample, _Planned]]:
        """The samples decoded, one after the other; in place of a corrupt one another, with draws of its own."""
        for one in planned:
            sample = self.readers[name].sample(one.row_index, with_mask, one.row)
            skipped.extend(sample.skipped)
            if sample.row != one.row_index:
                one = self._drawn(name, sample.row, self.readers[name].pool.row(sample.row), one.number)
            yield sample, one

    def _slots(self, name: str) -> torch.Tensor:
        return torch.arange(*self.slots.get(name, (0, 0)))

    def _another(
        self, key: str, number: int, skipped: list[Skipped], image_HW3: NDArray[np.uint8], label_HW: NDArray[np.uint8]
    ) -> None:
        """View and label of any labeled sample, drawn with the sample that it is given to; or nothing but padding."""
        rng, row = self._other(key, number)
        if row is None:
            image_HW3.fill(0)
            label_HW.fill(NOT_ANNOTATED)
            return
        sample = self.readers["labeled"].sample(row, with_mask=True)
        skipped.extend(sample.skipped)
        width, height = sample.image.size
        geometry = draw_any_size(rng, self.config.views, height, width, self.config.crop)
        assert sample.mask is not None
        weak_view(sample.image, geometry, image_HW3)
        label_view(sample.mask, geometry, label_HW)

    def _other(self, key: str, number: int) -> tuple[np.random.Generator, int | None]:
        """Row of the labeled sample that another is given, or None; and the generator that goes on to its view."""
        rng = generator(self.seed, number, key, "given")
        comes, which = rng.random(2)
        return rng, int(which * self.readers["labeled"].pool.num_samples) if comes < self.given else None

    def fetched(self, start: int, stop: int) -> Generator[Fetched, None, None] | None:
        """The steps with the bytes that they need; None where all pools lie on this machine.

        The process that trains reads ahead for all its loader processes: only it sees every step, so that the bytes of
        neighbours come by one request, and no other process needs connections of its own.
        """
        remote = [name for name, reader in self.readers.items() if not reader.pool.local]
        return self._fetched(remote, start, stop) if remote else None

    def _fetched(self, remote: list[str], start: int, stop: int) -> Generator[Fetched, None, None]:
        pools = {name: self.readers[name].pool for name in remote}
        budgets = _shares({name: pool.num_bytes for name, pool in pools.items()}, self.config.store.prefetch_bytes)
        masks = {"labeled": True, "unlabeled": self.with_truth}
        ahead = {
            name: Ahead(pool, self._needs(name, start, stop), masks[name], budgets[name])
            for name, pool in pools.items()
        }
        try:
            for step in range(start, stop):
                try:
                    fetched = Fetched(step, {name: one.take() for name, one in ahead.items()}, None)
                except RaysemiError as error:
                    fetched = Fetched(step, {}, Fault(error, error.__cause__))
                yield fetched
                if fetched.fault is not None:
                    return
        finally:
            for one in ahead.values():
                one.close()

    def _needs(self, name: str, start: int, stop: int) -> Iterator[list[int]]:
        """Rows of this rank in each step, with those that are pasted from."""
        pool = self.readers[name].pool
        for first in range(start, stop, _TABLE_STEPS):
            last = min(first + _TABLE_STEPS, stop)
            for rows, numbers in zip(*self.orders[name].table(first, last, *self.slots[name]), strict=True):
                needed: list[int] = rows.tolist()
                if name == "labeled" and self.given > 0.0:
                    pairs = zip(list(needed), numbers.tolist(), strict=True)
                    others = (self._other(pool.key(row), number)[1] for row, number in pairs)
                    needed += [row for row in others if row is not None]
                yield needed


def _pictures(num: int, side: int) -> NDArray[np.uint8]:
    """Pixel by pixel, as images are decoded and resized: to turn them takes as long as half a resize."""
    return np.empty((num, side, side, 3), dtype=np.uint8)


def _maps(num: int, side: int, kind: type = np.uint8) -> NDArray[Any]:
    return np.empty((num, side, side), dtype=kind)


def _channels_first(pictures_BHW3: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 [B, 3, S, S]; its memory stays as it is."""
    return torch.from_numpy(pictures_BHW3).permute(0, 3, 1, 2)


def _shares(sizes: dict[str, int], budget: int) -> dict[str, int]:
    """Each pool's part of the budget: a small one takes what it can use, the largest the rest."""
    shares: dict[str, int] = {}
    for left, name in zip(range(len(sizes), 0, -1), sorted(sizes, key=sizes.__getitem__), strict=True):
        shares[name] = budget if left == 1 else min(budget // left, 2 * sizes[name])
        budget -= shares[name]
    return shares
