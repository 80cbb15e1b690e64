"""Which checkpoints of a run stay: the newest ones and the best, which `best.json` names; and what is swept."""

from __future__ import annotations

import json
import logging
import re

from raysemi.engine.checkpoint import FOLDER, MANIFEST, SHARD, STATE, STEP, WRITING, checkpoint_name, load, steps
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, CheckpointFailure

BEST = "best.json"
_log = logging.getLogger(__name__)


def sweep(folder: RunFolder) -> None:
    """Removes what writers of this run that were killed have left: at a start, on one rank, before anyone writes."""
    for name in folder.names(FOLDER):
        path = f"{FOLDER}/{name}"
        if name.startswith(WRITING):
            folder.remove(path)
        elif STEP.fullmatch(name):
            files = folder.names(path)
            if MANIFEST not in files and all(_ours(file) for file in files):
                folder.remove(path)


def _ours(file: str) -> bool:
    return file == STATE or SHARD.fullmatch(file) is not None or re.fullmatch(r"part-\d{5}\.json", file) is not None


def keep_newest(folder: RunFolder, keep: int, newest: int) -> None:
    """Removes all checkpoints but `keep` and the best.

    Args:
        folder: the run folder.
        keep: how many stay, beside the best.
        newest: the step just saved; later ones are broken, since the run went back behind them, and do not count.
    """
    protected = best_step(folder)
    found = steps(folder)
    kept = [step for step in found if step <= newest][-keep:]
    for step in found:
        if step not in kept and step != protected:
            # the files go one by one: with the manifest first, a half is what the next start sweeps
            folder.remove(f"{checkpoint_name(step)}/{MANIFEST}")
            folder.remove(checkpoint_name(step))


def read_best(folder: RunFolder) -> tuple[int, float] | None:
    """Step and mIoU in percent of the best checkpoint; None before the first evaluation or where the file is broken."""
    if not folder.exists(BEST):
        return None
    try:
        best = json.loads(folder.read_bytes(BEST))
        return int(best["step"]), float(best["miou"])
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("%s/%s must name a step and a miou; got %r. It counts as none.", folder.location, BEST, error)
        return None


def best_step(folder: RunFolder) -> int | None:
    """Step of the best checkpoint, None before the first evaluation."""
    best = read_best(folder)
    return None if best is None else best[0]


def best_miou(folder: RunFolder) -> float:
    """mIoU in percent of the best checkpoint; minus infinity before the first evaluation.

    A best checkpoint that is broken is named in the log and counts as none: the next evaluation names another.
    """
    best = read_best(folder)
    if best is None:
        return float("-inf")
    try:
        load(folder, best[0])
    except CheckpointFailure:
        raise
    except CheckpointError as error:
        _log.warning("the best checkpoint is chosen anew: %s", error)
        return float("-inf")
    return best[1]


def mark_best(folder: RunFolder, step: int, miou: float) -> None:
    """Records which checkpoint is the best, with its mIoU in percent."""
    folder.write_bytes(BEST, json.dumps({"step": step, "miou": miou}).encode(), sync=True)
