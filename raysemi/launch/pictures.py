"""What an evaluation shows besides its numbers: pictures for the report, and how good the pseudo-labels are.

Axes: U unlabeled images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from raysemi.data.pool import Pool
from raysemi.data.types import HostBatch
from raysemi.engine.evaluate import EvalConfig
from raysemi.engine.folder import RunFolder
from raysemi.engine.measure import Panels, PseudoQuality, look, unlabeled_panels, val_panels
from raysemi.engine.trainer import Trainer
from raysemi.methods.base import AcrossRanks

Picture = tuple[str, str, Panels]
"""(`unlabeled` or `val`, key, panels)."""


def look_around(
    trainer: Trainer,
    unlabeled: Iterable[HostBatch] | None,
    val: Pool,
    settings: EvalConfig,
    across: AcrossRanks,
    folder: RunFolder,
) -> dict[str, float]:
    """Writes pictures, and measures the pseudo-labels where their truth may be opened; called by every rank.

    Args:
        trainer: its networks make what is shown.
        unlabeled: batches of unlabeled images of this rank, with their truth where it may be opened; None: there are
            none to look at.
        val: the pool that is evaluated on.
        settings: `eval`.
        across: the ranks.
        folder: rank 0 writes `pictures/` there.

    Returns:
        Metrics of the pseudo-labels, of all ranks; empty without truth.
    """
    first = across.rank == 0
    quality = PseudoQuality(len(val.classes))
    pictures: list[Picture] = []
    for seen in look(trainer, unlabeled) if unlabeled is not None else ():
        if seen.truth_UHW is not None:
            quality.add(seen)
        keys = seen.keys_U[: settings.pictures - len(pictures)] if first else ()
        pictures += [("unlabeled", key, unlabeled_panels(seen, i, val.palette)) for i, key in enumerate(keys)]
    for stage in quality.counts:
        quality.counts[stage] = across.sum(quality.counts[stage].to(trainer.device)).cpu()
    if first and settings.pictures:
        pictures += [("val", key, panels) for key, panels in val_panels(trainer, val, settings, settings.pictures)]
        _write(folder, trainer.step, pictures)
    return quality.metrics(val.classes)


def _write(folder: RunFolder, step: int, pictures: list[Picture]) -> None:
    listing = []
    for number, (kind, key, panels) in enumerate(pictures):
        entries = []
        for title, content in panels:
            file = f"{number:02d}-{title.replace(' ', '-')}.png"
            folder.write_bytes(f"pictures/{file}", content)
            entries.append({"title": title, "file": file})
        listing.append({"kind": kind, "key": key, "step": step, "panels": entries})
    folder.write_bytes("pictures/pictures.json", json.dumps(listing, indent=1).encode())
