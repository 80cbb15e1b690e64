"""Whether a run's steps have room on their device: what is said before the first one, and when one does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from raysemi.config import RunConfig, spread_of
from raysemi.engine.footprint import footprint
from raysemi.engine.memory import gib, is_out_of_memory, peak_bytes, total_bytes
from raysemi.engine.trainer import resolve_precision
from raysemi.engine.zero_config import spread
from raysemi.errors import OutOfMemory, RaysemiError
from raysemi.methods.base import AcrossRanks, Method
from raysemi.models.segmentor import Segmentor

_log = logging.getLogger(__name__)

_SMALL = 2**19
"""Pixels of a rank's images below which the estimate takes longer than a step, and is not made."""
_ROOM = 0.9
"""Share of a device that a step may be expected to take: allocators and libraries need some too."""


def tell_footprint(
    config: RunConfig, student: Segmentor, method: Method, world: int, device: torch.device, *, joined: bool
) -> None:
    """Logs what a step takes of each rank's memory, and warns of a GPU that has less.

    Args:
        config: the run.
        student, method: as `restore.build` makes them, on the CPU.
        world: ranks.
        device: of a rank.
        joined: whether the batches have unlabeled images.
    """
    batch, crop = config.train.batch, config.data.crop
    share = batch.labeled // world, batch.unlabeled // world if joined else 0
    if sum(share) * crop**2 < _SMALL:
        return
    parts = config.train.parts(*share)
    try:
        found = footprint(
            student, method, optim=config.optim, gradients=config.gradients, share=share, parts=parts, crop=crop,
            world=world, precision=resolve_precision(config.train, device),
        )  # fmt: skip
    except Exception as error:  # an encoder may do what fake tensors cannot, and a run does not depend on it
        _log.info("memory that a step takes of a rank: not known before the first one (%s)", error)
        return
    if config.train.strategy == "deepspeed":
        pareto = config.gradients.name == "pareto"
        found = spread(found, config.train.zero, world, pareto=pareto, cuda=device.type == "cuda")
    _log.info("memory that a step takes of a rank: %s", found)
    if device.type != "cuda" or found.total <= (room := total_bytes(device)):
        return
    passed = (share[1] or share[0]) / parts
    fitting = (
        size for size in spread_of(config, world, gpu=True).smaller() if found.with_passes(size / passed) < _ROOM * room
    )
    size = next(fitting, None)
    way = "Use a smaller data.crop or more ranks" if size is None else f"train.micro_batch={size} should fit"
    _log.warning("a step may need more memory than the %s of %s: %s. %s.", gib(room), device, gib(found.total), way)


@contextmanager
def one_line_without_room(
    config: RunConfig, across: AcrossRanks, device: torch.device, what: Callable[[], str], way: str | None = None
) -> Iterator[None]:
    """Turns an allocator's error into one line with what there is, what was taken, and what would fit.

    Args:
        config: the run.
        across: the ranks.
        device: of this one.
        what: says what was being done.
        way: what to do; None: pass fewer images of a step at once.

    Raises:
        OutOfMemory: in place of any error that means it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RaysemiError) or not is_out_of_memory(error):
            raise
        sizes = spread_of(config, across.world, gpu=device.type == "cuda").smaller()
        smaller = (
            f"Set train.micro_batch={sizes[0]}: the same steps in smaller passes"
            if sizes
            else "Use a smaller data.crop or more ranks, since no smaller train.micro_batch gives the same steps"
        )
        raise OutOfMemory(
            f"memory of rank {across.rank} must hold {what()}; got {gib(total_bytes(device))} on {device}, of which "
            f"{gib(peak_bytes(device))} were taken at most. {way or smaller}."
        ) from error
