"""The stream of a run: labeled and unlabeled samples of each step, decoded, cropped and stacked for one rank.

A batch is a pure function of (pools, seed, step, global batch, rank, world): loader processes change the speed, no bit.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, field_validator
from torch.utils.data import DataLoader

from raysemi.base import Config, choices
from raysemi.data.boxes import PoolBoxes
from raysemi.data.joined import AnyPool
from raysemi.data.skips import Skips
from raysemi.data.steps import Fault, Steps
from raysemi.data.store import StoreConfig
from raysemi.data.types import HostBatch, StrongViews
from raysemi.data.views import ViewsConfig
from raysemi.errors import ConfigError, DataError, DataFailure


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
        self._steps = Steps(
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
        try:
            while True:
                died = None
                try:
                    made = next(batches, None)
                except RuntimeError as error:
                    if "DataLoader worker" not in str(error):
                        raise
                    died = str(error)
                if died is not None:  # not from that error, whose frames hold the loader
                    raise DataFailure(
                        f"loader processes must stay alive; got: {died}. Free memory or shared memory (/dev/shm), or "
                        "lower data.loader_processes."
                    )
                if made is None:
                    return
                batch, skipped = made
                if isinstance(batch, Fault):
                    raise batch.error from batch.cause
                self.skips.add(skipped)
                if self._alone:
                    self.skips.check()
                yield batch.pinned() if self.pinned else batch
        finally:
            # Now: as part of an error's frames it would wait for Python's collector, which ends its queues before its
            # processes, so that each takes 5 s to notice.
            del batches

    @property
    def corrupt(self) -> int:
        """Different corrupt samples that have been skipped."""
        return len(self.skips)


def _unchanged(made: Any) -> Any:
    return made


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _start_method(pools: list[AnyPool]) -> str:
    # a forked client of an object store has lost its threads; fork is unsafe on macOS
    local = all(pool.local for pool in pools)
    return "fork" if local and sys.platform == "linux" else "forkserver"
