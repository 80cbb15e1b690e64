"""Checkpoints: everything needed to go on as if never stopped, in files without pickle, the manifest written last.

A checkpoint is `checkpoints/step-000123/`: `student`, `teacher`, `method`, `optimizer` ... as safetensors, `state.json`
(data position, digests of the pools, classes), and `manifest.json` (step, ranks, versions, size and sha256 of each
file). Its tensors are whole and named alike whatever strategy and however many ranks made them; of W > 1 ranks each
writes its share of every group, `student-00001-of-00004.safetensors`. A folder without a valid manifest is no
checkpoint. Which ones stay is `retention`'s; `saver` writes them while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import __version__ as safetensors_version
from safetensors.torch import load as load_tensors
from safetensors.torch import save as as_bytes
from torch import Tensor

from raysemi import __version__
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, CheckpointFailure

FORMAT = 2
"""Of the manifest. 1 had one file a group, always, and neither step, ranks nor versions; it is read too."""
FOLDER, MANIFEST, STATE = "checkpoints", "manifest.json", "state.json"
WRITING = ".writing-"
"""How a folder begins whose checkpoint is not finished, on a disk."""
SHARD = re.compile(r"([a-z_]+)(?:-\d{5}-of-\d{5})?\.safetensors")
STEP = re.compile(r"step-(\d{6,})")
_log = logging.getLogger(__name__)
Files = dict[str, dict[str, Any]]
"""Name of each file -> `bytes`, `sha256`, and `tensors`, how many there are in it."""


@dataclass
class Snapshot:
    """What a checkpoint holds.

    `tensors` maps a group (student, teacher, method, optimizer, ...) to tensors by name; `state` is plain JSON.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """`checkpoints/step-000123`."""
    return f"{FOLDER}/step-{step:06d}"


def locate(path: str) -> tuple[RunFolder, int | None]:
    """The run folder that a path names, and the step where it is the path of one checkpoint in it."""
    location, mark, query = path.partition("?")
    parts = PurePosixPath(location).parts
    found = STEP.fullmatch(parts[-1]) if len(parts) > 2 and parts[-2] == FOLDER else None
    if found is None:
        return RunFolder(path), None
    run = location.rstrip("/").rsplit("/", 2)[0]
    return RunFolder(run + mark + query), int(found[1])


# --- Writing


def own_share(snapshot: Snapshot, rank: int = 0, world: int = 1) -> Snapshot:
    """A rank's share of a snapshot, copied to the host: training may go on and change what the snapshot shows.

    Each tensor goes to the rank that has fewest bytes so far, which every rank reckons alike: by name, since the ranks
    need not have them in one order (safetensors hands out what it reads in an order that differs between processes, and
    a state that was restored may keep it). A snapshot whose mappings make a tensor when it is asked for, on all ranks
    in that order, is never held whole. From a CUDA device the copies are queued behind the work under way, into pinned
    memory: synchronise with the device before they are read.
    """
    held = [0] * world
    share: dict[str, dict[str, Tensor]] = {}
    for group, tensors in snapshot.tensors.items():
        for name in sorted(tensors):
            value = tensors[name]
            owner = held.index(min(held))
            held[owner] += value.nbytes
            if owner == rank:
                share.setdefault(group, {})[name] = _on_host(value.detach())
    return Snapshot(snapshot.step, share, snapshot.state)


def _on_host(value: Tensor) -> Tensor:
    if value.device.type == "cpu":
        return value.clone()
    held = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
    return held.copy_(value, non_blocking=value.device.type == "cuda")


def place_of(folder: RunFolder, step: int, token: str) -> str:
    """Where a checkpoint is written before it is one: on a disk beside its place, in a store at its place."""
    return f"{FOLDER}/{WRITING}{token}-{step:06d}" if folder.is_local else checkpoint_name(step)


def write_share(folder: RunFolder, place: str, share: Snapshot, rank: int = 0, world: int = 1) -> Files:
    """Writes a rank's shards, and with rank 0's the state; uses up the share, group by group.

    Raises:
        NoRoom, CheckpointFailure: see `RunFolder.write_bytes`.
    """
    folder.make(place)
    part = "" if world == 1 else f"-{rank:05d}-of-{world:05d}"
    groups = dict(share.tensors)
    share.tensors = {}
    files: Files = {}

    def write(name: str, content: bytes, tensors: int = 0) -> None:
        digest = hashlib.sha256(content).hexdigest()
        folder.write_bytes(f"{place}/{name}", content, sync=True)
        files[name] = {"bytes": len(content), "sha256": digest, "tensors": tensors}

    for group in list(groups):
        count = len(groups[group])
        write(f"{group}{part}.safetensors", _serialised(groups.pop(group)), count)
    if rank == 0:
        write(STATE, json.dumps({"step": share.step, **share.state}, indent=1).encode())
    return files


def _serialised(tensors: Mapping[str, Tensor]) -> bytes:
    # safetensors refuses views that share memory and channels-last layouts
    return as_bytes({name: value.contiguous() for name, value in tensors.items()})


def commit(folder: RunFolder, place: str, step: int, world: int, files: Files) -> str:
    """Makes a checkpoint of the shards that all ranks have written; on one rank.

    Args:
        folder: the run folder.
        place: from `place_of`.
        step: of the checkpoint.
        world: ranks that wrote.
        files: of all ranks.

    Returns:
        Its name below the run folder.

    Raises:
        CheckpointError: shards of other ranks are not there, where this rank looks.
        NoRoom, CheckpointFailure: see `RunFolder.write_bytes`.
    """
    name, found = checkpoint_name(step), folder.sizes(place)
    missing = [file for file, entry in files.items() if found.get(file) != entry["bytes"]]
    if missing:
        raise CheckpointError(
            f"run must name one folder that all ranks share; got {folder.location}, where {missing[0]} of another rank "
            "is not to be seen. Give a shared folder or an object store."
        )
    about = {"format": FORMAT, "step": step, "world": world, "versions": _versions(), "files": files}
    folder.write_bytes(f"{place}/{MANIFEST}", json.dumps(about, indent=1).encode(), sync=True)
    for other in found.keys() - files.keys() - {MANIFEST}:  # notes of ranks; in a store, what a broken one left there
        folder.remove(f"{place}/{other}")
    if place != name:
        folder.rename(place, name)
    return name


def _versions() -> dict[str, str]:
    return {
        "raysemi": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors_version,
    }


def save(folder: RunFolder, snapshot: Snapshot) -> str:
    """Writes a checkpoint of one rank at once; `saver.Saver` does it while training goes on.

    Returns:
        Its name below the run folder.

    Raises:
        NoRoom, CheckpointFailure: no room or no permission; earlier checkpoints are untouched.
    """
    place = place_of(folder, snapshot.step, secrets.token_hex(4))
    try:
        files = write_share(folder, place, own_share(snapshot))
        return commit(folder, place, snapshot.step, 1, files)
    except CheckpointError:
        discard(folder, place)
        raise


def discard(folder: RunFolder, place: str) -> None:
    """Removes from a disk what was written of a checkpoint that failed; in a store, the next start sweeps it."""
    if folder.is_local:
        with suppress(CheckpointError):
            folder.remove(place)


# --- Reading


def steps(folder: RunFolder) -> list[int]:
    """Steps that have a checkpoint with a manifest, ascending; the files are not checked."""
    found = [digits for name in folder.names(FOLDER) if (digits := STEP.fullmatch(name))]
    return sorted(int(digits[1]) for digits in found if folder.exists(f"{FOLDER}/{digits[0]}/{MANIFEST}"))


def read_manifest(folder: RunFolder, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint: `format`, `files` and, from format 2 on, `step`, `world` and `versions`.

    Raises:
        CheckpointError: there is none, or it is broken.
        CheckpointFailure: it cannot be read, or a later version of raysemi wrote it.
    """
    name = f"{checkpoint_name(step)}/{MANIFEST}"
    content = folder.read_bytes(name)
    try:
        manifest = json.loads(content)
        number, files = manifest["format"], manifest["files"]
        if number <= FORMAT:
            sound = {str(file): (int(entry["bytes"]), str(entry["sha256"])) for file, entry in files.items()}
            if STATE not in sound or not all(file == STATE or SHARD.fullmatch(file) for file in sound):
                raise ValueError("its files are not those of a checkpoint")
            if manifest.get("step", step) != step:
                raise ValueError(f"it is that of step {manifest['step']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder.location}/{name} must be a manifest; got {len(content)} bytes that are none ({error!r}). Remove "
            "this checkpoint's folder; an earlier one will be used."
        ) from error
    if number > FORMAT:
        raise CheckpointFailure(
            f"{folder.location}/{name} must have format {FORMAT} or earlier; got {number}. Install the raysemi that "
            f"wrote it{_of_version(manifest)}, or a later one."
        )
    return dict(manifest)


def _of_version(manifest: Mapping[str, Any]) -> str:
    versions = manifest.get("versions")
    return f" ({versions['raysemi']})" if isinstance(versions, dict) and "raysemi" in versions else ""


def _read(
    folder: RunFolder, step: int, files: Files, groups: tuple[str, ...] | None
) -> Iterator[tuple[str, Any, CheckpointError | None]]:
    """Each file's name, and its tensors or state, or what is wrong with it."""
    for file, expected in files.items():
        shard = SHARD.fullmatch(file)
        if shard and groups is not None and shard[1] not in groups:
            continue
        path = f"{checkpoint_name(step)}/{file}"
        content: Any = None
        fault: CheckpointError | None = None
        try:
            found = folder.read_bytes(path)
            if len(found) != expected["bytes"]:
                fault = _broken(folder, path, f"be {expected['bytes']} bytes long, as its manifest states", len(found))
            elif hashlib.sha256(found).hexdigest() != expected["sha256"]:
                fault = _broken(folder, path, "have the digest that its manifest states", "other bytes")
            else:
                content = load_tensors(found) if shard else json.loads(found)
        except CheckpointFailure:
            raise
        except CheckpointError as error:
            fault = error
        except (ValueError, SafetensorError) as error:
            fault = _broken(folder, path, "be whole", str(error))
        yield file, content, fault


def _broken(folder: RunFolder, path: str, rule: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"{folder.location}/{path} must {rule}; got {found}. Remove this checkpoint's folder; an earlier one will be "
        "used."
    )


def load(folder: RunFolder, step: int, groups: tuple[str, ...] | None = None) -> Snapshot:
    """Reads a checkpoint and checks every file against the manifest.

    Args:
        folder: the run folder.
        step: which checkpoint.
        groups: only these groups of tensors; None = all.

    Raises:
        CheckpointError: a file is missing, shorter, or has another digest.
        CheckpointFailure: the folder cannot be read now.
    """
    state: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, content, fault in _read(folder, step, read_manifest(folder, step)["files"], groups):
        if fault is not None:
            raise fault
        if file == STATE:
            state = content
        else:
            tensors.setdefault(file.split("-")[0].removesuffix(".safetensors"), {}).update(content)
    return Snapshot(step=state.pop("step"), tensors=tensors, state=state)


def faults(folder: RunFolder, step: int) -> list[str]:
    """Everything that is wrong with a checkpoint, a text a file; reads every byte.

    Raises:
        CheckpointFailure: the folder cannot be read now.
    """
    try:
        files = read_manifest(folder, step)["files"]
    except CheckpointFailure:
        raise
    except CheckpointError as error:
        return [str(error)]
    return [str(fault) for _, _, fault in _read(folder, step, files, None) if fault is not None]


def load_newest(folder: RunFolder) -> Snapshot | None:
    """The newest whole checkpoint, None when there is none; a broken one is named in the log and passed over.

    Raises:
        CheckpointFailure: one cannot be read now, or a later version wrote it: an earlier one would undo its steps.
    """
    for step in reversed(steps(folder)):
        try:
            return load(folder, step)
        except CheckpointFailure:
            raise
        except CheckpointError as error:
            _log.warning("%s", error)
    return None
