"""The stream of a run: labeled and unlabeled samples of each step, decoded, cropped and stacked for one rank.

A batch is a pure function of (pools, seed, step, global batch, rank, world): loader processes change the speed, no bit.
Axes: L labeled, U unlabeled images of this rank, V strong views, N boxes of an image, S side of the crop.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, field_validator
from torch.utils.data import DataLoader, Dataset

from raysemi.base import Config, choices
from raysemi.data.ahead import Ahead, Payloads
from raysemi.data.boxes import PoolBoxes
from raysemi.data.joined import AnyPool
from raysemi.data.mixture import order_of
from raysemi.data.pool import NOT_ANNOTATED
from raysemi.data.reader import Reader, Sample, Skipped
from raysemi.data.skips import Skips
from raysemi.data.store import StoreConfig
from raysemi.data.types import HostBatch, StrongViews
from raysemi.data.views import (
    FAMILIES,
    Geometry,
    ViewsConfig,
    draw_any_size,
    draw_box,
    draw_geometry,
    generator,
    label_view,
    valid_view,
    weak_view,
)
from raysemi.errors import ConfigError, DataError, DataFailure, RaysemiError

_TABLE_STEPS = 64  # steps whose rows are looked up together


class WeightedPool(Config):
    """A pool of a mixture."""

    path: str
    """A folder or a URL."""
    weight: float = Field(gt=0.0, allow_inf_nan=False)
    """Its share of every batch, in any unit; rounded to whole images."""


def _kind_of_pool(given: Any) -> str:
    return "path" if isinstance(given, str) else "weighted"


def _kind_of_pools(given: Any) -> str:
    return "path" if isinstance(given, str) else "several"


_APool = Annotated[Annotated[str, Tag("path")] | Annotated[WeightedPool, Tag("weighted")], Discriminator(_kind_of_pool)]
_Pools = Annotated[
    Annotated[str, Tag("path")] | Annotated[tuple[_APool, ...], Tag("several")],
    Discriminator(_kind_of_pools),
]
"""Told apart by kind, so that a mistake is told once."""


class DataConfig(Config):
    """Where the samples are, and how they become batches."""

    labeled: str | None = None
    """Pool in which every sample has a mask: a folder or a URL."""
    unlabeled: _Pools | None = None
    """Pool of images without masks, or a list of pools that are read as one, each image of all of them once a pass, or,
    where all are given as {path, weight}, each pool in its share of every batch and with passes of its own. Masks that
    they may carry are never used to train."""
    val: str | None = None
    """Pool that is evaluated on."""
    crop: int = Field(321, ge=1, json_schema_extra=choices([321, 513], unit="pixels"))
    """Side of the square that is trained on, pixels."""
    views: ViewsConfig = ViewsConfig()
    """How the views are drawn."""
    loader_processes: int | None = Field(None, ge=0)
    """Processes a rank that read and decode; 0 = in the training process; none = by the cores of the rank."""
    prefetch: int = Field(2, ge=1)
    """Steps that each loader process prepares ahead."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """A corrupt sample stops the run with an error that names it, or is counted, logged and replaced by another."""
    corrupt_limit: int = Field(100, ge=0)
    """Different corrupt samples that a run may skip before it stops, over all ranks and from its first step on."""
    store: StoreConfig = StoreConfig()
    """How pools in an object store are read."""

    @field_validator("unlabeled")
    @classmethod
    def _all_or_none_weighed(cls, unlabeled: Any) -> Any:
        if unlabeled == ():
            raise ValueError("must name at least one pool; got none. Name one, or remove the setting")
        paths = [pool for pool in unlabeled if isinstance(pool, str)] if isinstance(unlabeled, tuple) else []
        if paths and len(paths) < len(unlabeled):
            raise ValueError(
                f"must give a weight to all of its pools or to none; got none for {', '.join(paths)}. "
                "Write {path: POOL, weight: SHARE}"
            )
        return unlabeled

    @property
    def unlabeled_pools(self) -> tuple[str, ...]:
        """Paths of the unlabeled pools, none or one or several."""
        if self.unlabeled is None:
            return ()
        listed = (self.unlabeled,) if isinstance(self.unlabeled, str) else self.unlabeled
        return tuple(pool if isinstance(pool, str) else pool.path for pool in listed)

    @property
    def unlabeled_weights(self) -> tuple[float, ...] | None:
        """Weight of each of several unlabeled pools; None where they have none."""
        if not isinstance(self.unlabeled, tuple):
            return None
        return tuple(pool.weight for pool in self.unlabeled if not isinstance(pool, str)) or None


def loader_processes(setting: int | None, cores: int) -> int:
    """Loader processes of a rank: the setting, or 0 where the rank has one core, else all but one, at most 4."""
    if setting is not None:
        return setting
    return 0 if cores <= 1 else min(4, cores - 1)


class Stream:
    """Batches of the steps start to stop - 1 for one rank, in order.

    Args:
        config: crop, views, processes, what to do with corrupt samples.
        pools: open pools by name: `labeled` and `unlabeled`, or one of them.
        seed: seed of the run.
        batch_labeled, batch_unlabeled: global batches, images a step over all ranks.
        rank, world: this rank and the number of ranks, which divides both batches.
        strong_views: strong views of each unlabeled image; 0 = its weak view alone.
        second_view: whether each unlabeled image comes in a second random geometry too.
        start, stop: global steps.
        with_truth: read the masks of the unlabeled images, to measure pseudo-labels; there are no CutMix boxes then.
        cores: cores of this rank, for `loader_processes: none`.
        given: probability that a labeled image comes with another one to paste from; 0 = the method pastes nothing.
        pinned: hand out page-locked tensors, which a CUDA device copies without holding the host up.
        strong: family of the strong views, unless `config.views.strong` names one.
        boxes: of a detector, in the unlabeled pool; handed out with each image.
        skips: where corrupt samples are counted, together with those of other streams; None: a count of its own. With
            several ranks it is the caller who compares it with the limit, on all of them alike.

    Raises:
        ConfigError: a batch that the ranks cannot share.
        DataError: pools without the masks that they need, or, while iterating, a sample that cannot be read.
    """

    def __init__(
        self,
        config: DataConfig,
        pools: Mapping[str, AnyPool],
        seed: int,
        batch_labeled: int,
        batch_unlabeled: int,
        rank: int,
        world: int,
        strong_views: int,
        second_view: bool,
        start: int,
        stop: int,
        with_truth: bool = False,
        *,
        cores: int = 1,
        given: float = 0.0,
        pinned: bool = False,
        strong: StrongViews = "jitter",
        boxes: PoolBoxes | None = None,
        skips: Skips | None = None,
    ) -> None:
        self.config = config
        self.start, self.stop = start, stop
        self.processes = loader_processes(config.loader_processes, cores)
        self.pinned = pinned
        self.skips = Skips(config.corrupt_limit) if skips is None else skips
        self._alone = world == 1
        used = [name for name in ("labeled", "unlabeled") if pools.get(name) is not None]
        batches = {"labeled": batch_labeled, "unlabeled": batch_unlabeled}
        faults = [] if used else ["a stream must read at least one pool; got none. Pack one."]
        faults += [
            f"train.batch.{name} must be a positive multiple of the number of ranks, {world}; got {batches[name]}. "
            f"Change the batch or the number of ranks."
            for name in used
            if batches[name] < 1 or batches[name] % world
        ]
        if faults:
            raise ConfigError(faults)
        masked = {"labeled": True, "unlabeled": with_truth}
        self._pools = [pools[name] for name in used]
        for name, pool in zip(used, self._pools, strict=True):
            if masked[name] and not pool.labeled:
                raise DataError(
                    f"data.{name} must be a pool whose samples all have masks; got {pool.path} with {pool.num_masks} "
                    f"masks for {pool.num_samples} samples. Pack it with masks."
                )
        shared = dict(zip(used, self._pools, strict=True))
        family = config.views.strong or strong
        self._steps = _Steps(
            config, shared, seed, batches, rank, world, strong_views, second_view, with_truth, family, given, boxes
        )

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[HostBatch]:
        for pool in self._pools:
            pool.open_index()  # once, before it is shared with the processes; a broken index shows here
        fetched = self._steps.fetched(self.start, self.stop)
        steps: Iterable[Any] = range(self.start, self.stop) if fetched is None else fetched
        try:
            yield from self._batches(steps)
        finally:
            if fetched is not None:
                fetched.close()

    def _batches(self, steps: Iterable[Any]) -> Iterator[HostBatch]:
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork beside threads, torch of more processes than cores: these only read and
            # decode, and their number is a setting
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*worker processes in total", category=UserWarning)
            loader = DataLoader(
                self._steps,
                batch_size=None,
                sampler=steps,
                num_workers=self.processes,
                collate_fn=_unchanged,
                prefetch_factor=self.config.prefetch if self.processes else None,
                multiprocessing_context=_start_method(self._pools) if self.processes else None,
                worker_init_fn=_one_thread,
                generator=torch.Generator(),  # of its own: the loader else draws from the global one
            )
            batches = iter(loader)
        while True:
            try:
                made = next(batches, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataFailure(
                    f"loader processes must stay alive; got: {error}. Free memory or shared memory (/dev/shm), or "
                    f"lower data.loader_processes."
                ) from error
            if made is None:
                return
            batch, skipped = made
            if isinstance(batch, _Fault):
                raise batch.error from batch.cause
            self.skips.add(skipped)
            if self._alone:
                self.skips.check()
            yield batch.pinned() if self.pinned else batch

    @property
    def corrupt(self) -> int:
        """Different corrupt samples that have been skipped."""
        return len(self.skips)


class _Fault(NamedTuple):
    """An error on its way out of a loader process, which alone would lose its cause there."""

    error: RaysemiError
    cause: BaseException | None


class _Fetched(NamedTuple):
    """A step on its way into a loader process, with the bytes of remote pools that it needs, or the error instead."""

    step: int
    payloads: dict[str, Payloads]
    fault: _Fault | None


class _Steps(Dataset[Any]):
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

    def __getitem__(self, step: int | _Fetched) -> tuple[HostBatch | _Fault, tuple[Skipped, ...]]:
        skipped: list[Skipped] = []
        if isinstance(step, _Fetched):
            if step.fault is not None:
                return step.fault, ()
            for name, payloads in step.payloads.items():
                self.readers[name].given = payloads
            step = step.step
        try:
            return self._batch(step, skipped), tuple(skipped)
        except RaysemiError as error:
            return _Fault(error, error.__cause__), ()

    def _batch(self, step: int, skipped: list[Skipped]) -> HostBatch:
        side, views, family = self.config.crop, self.strong_views, FAMILIES[self.strong]
        image_L3HW, label_LHW, keys_L, slots_L = [], [], [], self._slots("labeled")
        given_L3HW, given_label_LHW = [], []
        for sample, number in self._samples("labeled", step, True, skipped):
            geometry = self._geometry(sample, number, "geometry")
            image_L3HW.append(weak_view(sample.image, geometry))
            assert sample.mask is not None
            label_LHW.append(label_view(sample.mask, geometry))
            keys_L.append(sample.key)
            if self.given > 0.0:
                image_3HW, given_label_HW = self._another(sample.key, number, skipped)
                given_L3HW.append(image_3HW)
                given_label_LHW.append(given_label_HW)

        slots_U = self._slots("unlabeled")
        num = len(slots_U)
        weak_U3HW, valid_UHW, truth_UHW, second_U3HW, second_valid_UHW, keys_U = [], [], [], [], [], []
        boxes_VU4 = np.zeros((views, num, 4), dtype=np.int64)
        photometric_VUP = np.zeros((views, num, len(family.PARAMETERS)), dtype=np.float32)
        second_UP = np.zeros((num, len(family.PARAMETERS)), dtype=np.float32)
        found_UN5: list[NDArray[np.float32]] = []
        for u, (sample, number) in enumerate(self._samples("unlabeled", step, self.with_truth, skipped)):
            draws = (self.seed, number, sample.key)
            geometry = self._geometry(sample, number, "geometry")
            weak_U3HW.append(weak_view(sample.image, geometry))
            valid_UHW.append(valid_view(geometry))
            keys_U.append(sample.key)
            if self.boxes is not None:
                found_UN5.append(self.boxes.view(sample.row, geometry))
            for v in range(views):
                photometric_VUP[v, u] = family.draw(generator(*draws, f"photometric {v}"), self.config.views)
                if not self.with_truth:
                    boxes_VU4[v, u] = draw_box(generator(*draws, f"cutmix {v}"), self.config.views, side)
            if sample.mask is not None:
                truth_UHW.append(label_view(sample.mask, geometry))
            if self.second_view:
                geometry = self._geometry(sample, number, "second geometry")
                second_U3HW.append(weak_view(sample.image, geometry))
                second_valid_UHW.append(valid_view(geometry))
                second_UP[u] = family.draw(generator(*draws, "second photometric"), self.config.views)

        plane = (side, side)
        return HostBatch(
            step=step,
            image_L3HW=_pictures(image_L3HW, side),
            label_LHW=_stack(label_LHW, plane, np.uint8),
            slots_L=slots_L,
            keys_L=tuple(keys_L),
            weak_U3HW=_pictures(weak_U3HW, side),
            valid_UHW=_stack(valid_UHW, plane, np.bool_),
            slots_U=slots_U,
            keys_U=tuple(keys_U),
            boxes_VU4=torch.from_numpy(boxes_VU4),
            photometric_VUP=torch.from_numpy(photometric_VUP),
            second_weak_U3HW=_pictures(second_U3HW, side) if self.second_view else None,
            second_valid_UHW=_stack(second_valid_UHW, plane, np.bool_) if self.second_view else None,
            second_photometric_UP=torch.from_numpy(second_UP) if self.second_view else None,
            given_L3HW=_pictures(given_L3HW, side) if self.given > 0.0 else None,
            given_label_LHW=_stack(given_label_LHW, plane, np.uint8) if self.given > 0.0 else None,
            truth_UHW=_stack(truth_UHW, plane, np.uint8) if self.with_truth else None,
            strong=self.strong,
            found_UN5=_stack(found_UN5, (self.boxes.most, 5), np.float32) if self.boxes is not None else None,
        )

    def fetched(self, start: int, stop: int) -> Generator[_Fetched, None, None] | None:
        """The steps with the bytes that they need; None where all pools lie on this machine.

        The process that trains reads ahead for all its loader processes: only it sees every step, so that the bytes of
        neighbours come by one request, and no other process needs connections of its own.
        """
        remote = [name for name, reader in self.readers.items() if not reader.pool.local]
        return self._fetched(remote, start, stop) if remote else None

    def _fetched(self, remote: list[str], start: int, stop: int) -> Generator[_Fetched, None, None]:
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
                    fetched = _Fetched(step, {name: one.take() for name, one in ahead.items()}, None)
                except RaysemiError as error:
                    fetched = _Fetched(step, {}, _Fault(error, error.__cause__))
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

    def _slots(self, name: str) -> torch.Tensor:
        return torch.arange(*self.slots.get(name, (0, 0)))

    def _samples(self, name: str, step: int, with_mask: bool, skipped: list[Skipped]) -> Iterator[tuple[Sample, int]]:
        if name not in self.readers:
            return
        for row, number in zip(*self.orders[name].slots(step, *self.slots[name]), strict=True):
            sample = self.readers[name].sample(int(row), with_mask)
            skipped.extend(sample.skipped)
            yield sample, int(number)

    def _another(self, key: str, number: int, skipped: list[Skipped]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """View and label of any labeled sample, drawn with the sample that it is given to; or nothing but padding."""
        side = self.config.crop
        rng, row = self._other(key, number)
        if row is None:
            return np.zeros((3, side, side), np.uint8), np.full((side, side), NOT_ANNOTATED, np.uint8)
        sample = self.readers["labeled"].sample(row, with_mask=True)
        skipped.extend(sample.skipped)
        width, height = sample.image.size
        geometry = draw_any_size(rng, self.config.views, height, width, side)
        assert sample.mask is not None
        return weak_view(sample.image, geometry), label_view(sample.mask, geometry)

    def _other(self, key: str, number: int) -> tuple[np.random.Generator, int | None]:
        """Row of the labeled sample that another is given, or None; and the generator that goes on to its view."""
        rng = generator(self.seed, number, key, "given")
        comes, which = rng.random(2)
        return rng, int(which * self.readers["labeled"].pool.num_samples) if comes < self.given else None

    def _geometry(self, sample: Sample, number: int, name: str) -> Geometry:
        width, height = sample.image.size
        rng = generator(self.seed, number, sample.key, name)
        return draw_geometry(rng, self.config.views, height, width, self.config.crop)


def _stack(arrays: list[NDArray[Any]], shape: tuple[int, ...], kind: type[np.generic]) -> torch.Tensor:
    stacked = np.empty((len(arrays), *shape), dtype=kind)
    for i, array in enumerate(arrays):
        stacked[i] = array
    return torch.from_numpy(stacked)


def _pictures(views: list[NDArray[np.uint8]], side: int) -> torch.Tensor:
    """uint8 [n, 3, S, S], in memory pixel by pixel as the views are: to turn them takes as long as half a resize."""
    stacked = np.empty((len(views), side, side, 3), dtype=np.uint8)
    for i, view in enumerate(views):
        stacked[i] = view.transpose(1, 2, 0)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def _shares(sizes: dict[str, int], budget: int) -> dict[str, int]:
    """Each pool's part of the budget: a small one takes what it can use, the largest the rest."""
    shares: dict[str, int] = {}
    for left, name in zip(range(len(sizes), 0, -1), sorted(sizes, key=sizes.__getitem__), strict=True):
        shares[name] = budget if left == 1 else min(budget // left, 2 * sizes[name])
        budget -= shares[name]
    return shares


def _unchanged(made: Any) -> Any:
    return made


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _start_method(pools: list[AnyPool]) -> str:
    # a forked client of an object store has lost its threads; fork is unsafe on macOS
    local = all(pool.local for pool in pools)
    return "fork" if local and sys.platform == "linux" else "forkserver"
