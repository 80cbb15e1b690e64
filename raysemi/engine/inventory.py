"""What checkpoints a run holds, and whether each is whole: for those who look, not for a run that goes on."""

from __future__ import annotations

from typing import Any

from raysemi.engine import retention
from raysemi.engine.checkpoint import FOLDER, MANIFEST, STEP, WRITING, checkpoint_name, faults, read_manifest, steps
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, CheckpointFailure


def find_steps(folder: RunFolder, step: int | None) -> list[int]:
    """The steps to look at: that one, or all of a run that have a manifest.

    Raises:
        CheckpointError: there is none.
    """
    found = [one for one in steps(folder) if step in (None, one)]
    if not found:
        what = f"{folder.location}/{checkpoint_name(step)}" if step is not None else folder.location
        raise CheckpointError(f"{what} must hold a checkpoint; got none. Give a run folder, or one of its checkpoints.")
    return found


def show(folder: RunFolder, step: int) -> dict[str, Any]:
    """A checkpoint as its manifest has it: `step, format, world, bytes, versions, files, fault`.

    `fault` is None where every file has the size that it should have; the bytes are not read. `world` and `versions`
    are None before format 2.
    """
    shown = dict.fromkeys(("format", "world", "versions")) | {"step": step, "bytes": 0, "files": {}, "fault": None}
    try:
        manifest = read_manifest(folder, step)
    except CheckpointFailure:
        raise
    except CheckpointError as error:
        return shown | {"fault": str(error)}
    files = manifest["files"]
    found = folder.sizes(checkpoint_name(step))
    wrong = [name for name, entry in files.items() if found.get(name) != entry["bytes"]]
    fault = f"{', '.join(wrong)}: missing, or not of the size that the manifest states" if wrong else None
    size = sum(entry["bytes"] for entry in files.values())
    return shown | {name: value for name, value in manifest.items() if name in shown} | {"bytes": size, "fault": fault}


def verify(folder: RunFolder, step: int) -> dict[str, Any]:
    """Reads every byte of a checkpoint: `step, ok, faults, others`; `others` are files that no manifest names."""
    found = faults(folder, step)
    others: list[str] = []
    if not found:
        others = sorted(folder.sizes(checkpoint_name(step)).keys() - read_manifest(folder, step)["files"] - {MANIFEST})
    return {"step": step, "ok": not found, "faults": found, "others": others}


def unfinished(folder: RunFolder) -> list[str]:
    """Folders of checkpoints that are being written, or whose writer was killed: the next start sweeps them."""
    names = folder.names(FOLDER)
    return [
        f"{FOLDER}/{name}"
        for name in names
        if name.startswith(WRITING) or (STEP.fullmatch(name) and not folder.exists(f"{FOLDER}/{name}/{MANIFEST}"))
    ]


def best(folder: RunFolder) -> dict[str, Any] | None:
    """`step, miou` (percent) of the best checkpoint, and `fault`: None, or that it is not there."""
    named = retention.read_best(folder)
    if named is None:
        return None
    step, miou = named
    there = step in steps(folder)
    fault = None if there else f"{folder.location}/{retention.BEST} must name a checkpoint; got step {step}, of none."
    return {"step": step, "miou": miou, "fault": fault}
