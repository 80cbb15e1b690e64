"""How a step's images are spread: over ranks, and over the micro-batches of a rank's share.

A micro-batch is to a method what a rank is: both get whole pairs and groups of images that are mixed with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raysemi.data.loader import DataConfig
from raysemi.engine.trainer import TrainConfig
from raysemi.methods import METHODS
from raysemi.methods.base import group_size
from raysemi.models.segmentor import ModelConfig


@dataclass(frozen=True)
class Spread:
    """A batch and what may not be torn apart in it."""

    train: TrainConfig
    method: Any
    data: DataConfig
    model: ModelConfig
    world: int
    """Ranks."""
    gpu: bool
    """Each rank has a GPU; then BatchNorm is one over several."""

    def faults(self) -> Iterator[str]:
        """Why the run cannot be spread over so many ranks, or their shares not into such micro-batches."""
        if self.train.strategy == "single" and self.world > 1:
            yield (
                f"train.strategy must be ddp on {self.world} ranks; got single. Set train.strategy=auto or use one "
                "rank."
            )
        yield from list(self._uneven(self.world)) or self._micro_batch()

    def smaller(self) -> list[int]:
        """Values of `train.micro_batch` that take less memory than the present one and give the same steps, from the
        largest on."""
        present = self.train.micro_batch or self._share
        return [] if self._of_a_rank() else [size for size in self._sizes() if size < present]

    @property
    def _share(self) -> int:
        batch = self.train.batch
        return (batch.unlabeled if uses_unlabeled(self.method, self.data) else batch.labeled) // self.world

    def _sizes(self) -> list[int]:
        """Sizes of micro-batches below a rank's share: those of which every one could be a rank."""
        share = self._share
        fitting = (size for size in range(share - 1, 0, -1) if share % size == 0)
        return [size for size in fitting if not any(self._uneven(self.world * share // size))]

    def _of_a_rank(self) -> str | None:
        """A setting that takes something of a rank's whole share: in micro-batches it would be another one."""
        criterion = self.method.criterion
        if criterion.name == "ohem" and criterion.scope == "local":
            return "method.criterion.scope"
        return "method.entropy_scope" if getattr(self.method, "entropy_scope", None) == "local" else None

    def _micro_batch(self) -> Iterator[str]:
        size = self.train.micro_batch
        if size is None or size >= self._share:
            return
        if setting := self._of_a_rank():
            yield (
                f"train.micro_batch must be null with {setting}=local, which selects in a rank's whole share; got "
                f"{size}. Remove it, or set {setting}=global."
            )
        elif size not in (sizes := self._sizes()):
            fitting = "".join(f"{each} or " for each in sizes)
            yield (
                f"train.micro_batch must split each rank's {self._share} images, and its labeled ones into as many "
                f"parts, so that images that are mixed stay together; got {size}. Set it to {fitting}null."
            )

    def _uneven(self, ranks: int) -> Iterator[str]:
        """Why the batch cannot be spread over ranks, or over as many micro-batches of all of them."""
        train, method, data, model = self.train, self.method, self.data, self.model
        labeled, unlabeled = train.batch.labeled, train.batch.unlabeled
        if labeled % ranks:
            yield (
                f"train.batch.labeled must be divisible by the number of ranks, {ranks}; got {labeled}. "
                f"Set it to {next_multiple(labeled, ranks)}, or use another number of ranks."
            )
        normalises = model.batch_norm == "train" and model.name != "dpt"  # which has no BatchNorm
        # a method may begin with the labeled images alone
        joined = uses_unlabeled(method, data) and not getattr(method, "warmup_periods", 0)
        if labeled == ranks and normalises and not (joined or (self.gpu and self.world > 1)):
            yield (
                "train.batch.labeled must give each rank at least 2 images, since BatchNorm cannot normalise the "
                f"decoder's pooled branch over one value; got 1. Set it to {2 * ranks}, use fewer ranks or set "
                "model.batch_norm=frozen."
            )
        # CutMix partners are neighbouring slots and stay on one rank: an odd share would tear a pair apart.
        if not uses_unlabeled(method, data):
            return
        if hasattr(method, "group"):
            yield from _groups(method.group, unlabeled, ranks)
        elif not _mixes_pairs(method):
            if unlabeled % ranks:
                yield (
                    f"train.batch.unlabeled must be divisible by the number of ranks, {ranks}; got {unlabeled}. Set it "
                    f"to {next_multiple(unlabeled, ranks)}, or use another number of ranks."
                )
        elif unlabeled % (2 * ranks):
            yield (
                f"train.batch.unlabeled must be divisible by twice the number of ranks, 2 x {ranks}, since "
                f"neighbouring images are mixed in pairs; got {unlabeled}. Set it to "
                f"{next_multiple(unlabeled, 2 * ranks)}, or use another number of ranks."
            )


def _groups(group: int | None, unlabeled: int, world: int) -> Iterator[str]:
    size = max(2, group_size(group, unlabeled))  # a single image has no partner
    if unlabeled % (size * world) == 0:
        return
    share = unlabeled // world
    fitting = [s for s in range(2, min(share, size) + 1) if unlabeled % (s * world) == 0]
    other = f"method.group={fitting[-1]} or " if fitting else ""
    yield (
        f"method.group must divide the unlabeled images of each rank, since images are mixed within groups; got {size}"
        f"{'' if group else ' (the default)'} for train.batch.unlabeled={unlabeled} on {world} rank"
        f"{'s' if world > 1 else ''}. Set {other}train.batch.unlabeled={next_multiple(unlabeled, size * world)}."
    )


def _mixes_pairs(method: Any) -> bool:
    return learner_of(method).mixes and pastes_own(method)


def pastes_own(method: Any) -> bool:
    """Whether what is pasted comes from the batch's own views, not from another view of each image."""
    own: bool = getattr(getattr(method, "cutmix", None), "pairs", True)
    return own


def uses_unlabeled(method: Any, data: DataConfig) -> bool:
    """Whether a run of this method on these pools has unlabeled images in its batches."""
    return data.unlabeled is not None and learner_of(method).uses_unlabeled


def learner_of(method: Any) -> Any:
    """The class of a method's config."""
    return METHODS[method.name][1]


def next_multiple(value: int, of: int) -> int:
    """The smallest multiple that is not below a value."""
    return -(-value // of) * of
