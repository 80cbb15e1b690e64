"""Checkpoints: everything needed to go on as if never stopped, in files without pickle, the manifest written last.

A checkpoint is `checkpoints/step-000123/`: `student`, `teacher`, `method` and `optimizer` as safetensors, `state.json`
(step, data position, digests of the pools, versions), and `manifest.json` (size and sha256 of each file). A folder
without a valid manifest is no checkpoint. `best.json` names the best one so far.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from raysemi.engine.folder import RunFolder, _write_error
from raysemi.errors import CheckpointError

MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """What a checkpoint holds.

    `tensors` maps a file's stem (student, teacher, method, optimizer) to tensors by name; `state` is plain JSON.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """`checkpoints/step-000123`."""
    return f"checkpoints/step-{step:06d}"


def save(folder: RunFolder, snapshot: Snapshot) -> str:
    """Writes a checkpoint beside its place, then publishes it whole.

    Returns:
        Its name below the run folder.

    Raises:
        CheckpointError: no room or no permission; earlier checkpoints are untouched.
    """
    name = checkpoint_name(snapshot.step)
    try:
        if folder.is_local:
            Path(folder.path("checkpoints")).mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.path("checkpoints") if folder.is_local else None))
    except OSError as error:
        raise _write_error(folder.location, error) from error
    try:
        for stem, tensors in snapshot.tensors.items():
            # A contiguous copy: safetensors refuses views that share memory and channels-last layouts.
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, beside / f"{stem}.safetensors")
        text = json.dumps({"step": snapshot.step, **snapshot.state}, indent=1)
        (beside / "state.json").write_text(text, encoding="utf-8")
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(beside.iterdir())
        }
        (beside / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
        beside.chmod(0o755)  # mkdtemp's 0700 would hide the checkpoint from the rest of the team
        folder.publish(beside, name, last=MANIFEST)
    except (OSError, SafetensorError) as error:
        cause = error if isinstance(error, OSError) else OSError(str(error))
        raise _write_error(folder.location, cause) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return name


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def steps(folder: RunFolder) -> list[int]:
    """Steps that have a checkpoint with a manifest, ascending; the files are not checked."""
    found = []
    for name in folder.names("checkpoints"):
        digits = name.removeprefix("step-")
        if name != digits and digits.isdigit() and folder.size(f"checkpoints/{name}/{MANIFEST}") is not None:
            found.append(int(digits))
    return sorted(found)


def load(folder: RunFolder, step: int, stems: tuple[str, ...] | None = None) -> Snapshot:
    """Reads a checkpoint and checks every file against the manifest.

    Args:
        folder: the run folder.
        step: which checkpoint.
        stems: only these tensor files; None = all.

    Raises:
        CheckpointError: a file is missing, shorter, or has another digest.
    """
    name = checkpoint_name(step)
    try:
        files = json.loads(folder.read_bytes(f"{name}/{MANIFEST}"))["files"]
        contents: dict[str, bytes] = {}
        for file, expected in files.items():
            stem = file.removesuffix(".safetensors")
            if stems is not None and file != "state.json" and stem not in stems:
                continue
            content = folder.read_bytes(f"{name}/{file}")
            if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
                raise CheckpointError(
                    f"{folder.location}/{name}/{file} must have the digest that its manifest states; got other bytes. "
                    "Remove this checkpoint's folder; an earlier one will be used."
                )
            contents[file] = content
        state = json.loads(contents["state.json"])
        tensors = {
            file.removesuffix(".safetensors"): load_tensors(content)
            for file, content in contents.items()
            if file.endswith(".safetensors")
        }
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder.location}/{name} must be a whole checkpoint. {error}") from error
    return Snapshot(step=state.pop("step"), tensors=tensors, state=state)


def load_newest(folder: RunFolder) -> Snapshot | None:
    """The newest whole checkpoint, None when there is none; a broken one is named in the log and passed over."""
    for step in reversed(steps(folder)):
        try:
            return load(folder, step)
        except CheckpointError as error:
            _log.warning("%s", error)
    return None


def keep_newest(folder: RunFolder, keep: int, newest: int) -> None:
    """Removes all checkpoints but `keep` and the best, and what an interrupted writer left.

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
            folder.remove(checkpoint_name(step))
    if folder.is_local:
        for name in folder.names("checkpoints"):
            if name.startswith(".writing-"):
                folder.remove(f"checkpoints/{name}")


def best_step(folder: RunFolder) -> int | None:
    """Step of the best checkpoint, None before the first evaluation."""
    return json.loads(folder.read_bytes("best.json"))["step"] if folder.exists("best.json") else None


def best_miou(folder: RunFolder) -> float:
    """mIoU in percent of the best checkpoint; minus infinity before the first evaluation.

    A best checkpoint that is broken is named in the log and counts as none: the next evaluation names another.
    """
    step = best_step(folder)
    if step is None:
        return float("-inf")
    try:
        load(folder, step)
    except CheckpointError as error:
        _log.warning("the best checkpoint is chosen anew: %s", error)
        return float("-inf")
    return float(json.loads(folder.read_bytes("best.json"))["miou"])


def mark_best(folder: RunFolder, step: int, miou: float) -> None:
    """Records which checkpoint is the best, with its mIoU in percent."""
    folder.write_bytes("best.json", json.dumps({"step": step, "miou": miou}).encode())
