"""Checkpoints written beside the training, one at a time, by a thread of each rank.

A save copies this rank's share to the host and returns. Its thread writes the shards, and then a note of them into the
same place; rank 0's thread waits for the notes of all ranks, writes the manifest and sees to which checkpoints stay.
Threads join no collective. The ranks hear of one another's faults where they stand at the same step anyway: at a log
line, at the next save, at the end.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from types import TracebackType

import torch

from raysemi import errors
from raysemi.engine import distributed
from raysemi.engine.checkpoint import (
    FOLDER,
    WRITING,
    Files,
    Snapshot,
    commit,
    discard,
    own_share,
    place_of,
    write_share,
)
from raysemi.engine.folder import RunFolder
from raysemi.engine.retention import keep_newest, mark_best, sweep
from raysemi.errors import CheckpointError, CheckpointFailure, TrainingError
from raysemi.methods.base import AcrossRanks

_POLL_S = {True: 0.1, False: 1.0}
"""Between two looks for the other ranks' notes, on a disk and in a store."""
_SEEN_S = 120.0
"""How long what one rank has written may take to be seen: network disks remember for a while what was not there."""
_LEFT_S = 30.0
"""How long an interrupted run waits for the writing under way."""
_log = logging.getLogger(__name__)


class Saver:
    """Saves the checkpoints of a run; every method is called by all ranks, equally often.

    As a context: its end waits for the checkpoint under way; an error only gives it some seconds.

    Args:
        folder: the run folder, one for all ranks; what killed writers left there is swept.
        across: the ranks.
        device: this rank's device.
        keep: newest checkpoints that stay, beside the best.

    Raises:
        CheckpointError: the ranks see different folders.
        NoRoom, CheckpointFailure: the folder cannot be written.
    """

    def __init__(self, folder: RunFolder, across: AcrossRanks, device: torch.device, keep: int) -> None:
        self._folder, self._across, self._device, self._keep = folder, across, device, keep
        self._job: _Job | None = None
        self._whole_at = time.monotonic()
        token = secrets.token_hex(4)
        fault = ""
        if across.rank == 0:
            try:
                sweep(folder)
                folder.make(f"{FOLDER}/{WRITING}{token}")
            except CheckpointError as error:
                fault = str(error)
        told = distributed.gather([fault, token] if across.rank == 0 else [], across)
        if told[0]:
            raise CheckpointFailure(told[0])
        self._token = told[1]
        mark = f"{FOLDER}/{WRITING}{self._token}"
        until = time.monotonic() + _SEEN_S
        while (blind := folder.is_local and not folder.exists(mark)) and time.monotonic() < until:
            time.sleep(_POLL_S[True])
        if distributed.gather([folder.location] if blind else [], across):
            raise CheckpointError(
                f"run must name one folder that all ranks share; got {folder.location}, where some ranks do not see "
                "what rank 0 writes. Give a shared folder or an object store."
            )
        if across.rank == 0 and folder.is_local:
            folder.remove(mark)

    def save(self, snapshot: Snapshot, best: float | None = None) -> None:
        """Begins to write a checkpoint, once the one before it is finished.

        Args:
            snapshot: the whole state, on the device; it is copied before this returns.
            best: mIoU in percent, where this is the best checkpoint so far.

        Raises:
            CheckpointError: the one before it failed, on whatever rank.
        """
        self.wait()
        place = place_of(self._folder, snapshot.step, self._token)
        share = own_share(snapshot, self._across.rank, self._across.world)
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self._job = _Job(self._folder, self._across, place, share, copied, self._keep, best)
        self._job.start()

    def check(self) -> None:
        """Raises, on all ranks, what has failed on any; waits for nothing that goes well."""
        if self._job is not None:
            failed = torch.tensor(float(self._job.error is not None), device=self._device)
            if float(self._across.max(failed)):
                self.wait()

    def age_s(self) -> float:
        """Seconds since the newest checkpoint of this process was whole, or since it began; of use on rank 0."""
        whole_at = None if self._job is None else self._job.whole_at
        return time.monotonic() - (whole_at or self._whole_at)

    def wait(self) -> None:
        """Waits until the checkpoint under way is finished.

        Raises:
            CheckpointError: with the text of the rank that failed; earlier checkpoints are untouched.
        """
        job, self._job = self._job, None
        if job is None:
            return
        job.written.wait()
        self._raise_together(job)
        job.seen_by = time.monotonic() + _SEEN_S  # every rank has written
        job.join()
        self._raise_together(job)
        self._whole_at = job.whole_at or self._whole_at

    def _raise_together(self, job: _Job) -> None:
        """Raises on all ranks when the job of any has failed by now."""
        error = job.error
        told = distributed.gather([f"{type(error).__name__}: {error}"] if error is not None else [], self._across)
        if told:
            job.stop.set()
            job.join()
            distributed.barrier(self._across)  # nobody writes there any more
            if self._across.rank == 0 and job.whole_at is None:
                discard(self._folder, job.place)
            kind, _, text = told[0].partition(": ")
            raise error or getattr(errors, kind, CheckpointError)(text)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, TrainingError):  # raised by all ranks together
            self.wait()
        elif self._job is not None:
            self._job.join(_LEFT_S)  # where all ranks end alike, the others are writing too
            self._job.stop.set()


class _Job(threading.Thread):
    """One checkpoint on its way to the folder, on one rank."""

    def __init__(
        self,
        folder: RunFolder,
        across: AcrossRanks,
        place: str,
        share: Snapshot,
        copied: torch.cuda.Event | None,
        keep: int,
        best: float | None,
    ) -> None:
        super().__init__(name=f"checkpoint-{share.step}", daemon=True)
        self._folder, self._rank, self._world = folder, across.rank, across.world
        self._share, self._copied, self._keep, self._best = share, copied, keep, best
        self.place = place
        self.error: Exception | None = None
        self.whole_at: float | None = None
        """Monotonic seconds at which rank 0 had committed it."""
        self.written = threading.Event()
        """This rank's shards are written, or it has failed."""
        self.stop = threading.Event()
        """Give up waiting for other ranks."""
        self.seen_by = float("inf")
        """Until when, in monotonic seconds, the notes of all ranks must be seen."""

    def run(self) -> None:
        """Writes this rank's share; rank 0 then makes a checkpoint of all."""
        try:
            if self._copied is not None:
                self._copied.synchronize()
            files = write_share(self._folder, self.place, self._share, self._rank, self._world)
            if self._rank:
                self._folder.write_bytes(f"{self.place}/{_note(self._rank)}", json.dumps(files).encode())
                return
            self.written.set()
            if self._notes(files):
                commit(self._folder, self.place, self._share.step, self._world, files)
                self.whole_at = time.monotonic()
                if self._best is not None:
                    mark_best(self._folder, self._share.step, self._best)
                keep_newest(self._folder, self._keep, self._share.step)
        except Exception as error:  # raised by the trainer, on all ranks
            self.error = error
        finally:
            self.written.set()

    def _notes(self, files: Files) -> bool:
        """Adds what the other ranks have written; False when there is no more to wait for."""
        wanted = {_note(rank) for rank in range(1, self._world)}
        while wanted:
            last = self.stop.is_set()
            for name in wanted.intersection(self._folder.names(self.place)):
                files |= json.loads(self._folder.read_bytes(f"{self.place}/{name}"))
                wanted.remove(name)
            if wanted and last:
                return False
            if wanted and time.monotonic() > self.seen_by:
                raise CheckpointError(
                    f"run must name one folder that all ranks share; got {self._folder.location}, where rank 0 does "
                    f"not see what another wrote {_SEEN_S:g} s ago. Give a shared folder or an object store."
                )
            if wanted:
                self.stop.wait(_POLL_S[self._folder.is_local])
        return True


def _note(rank: int) -> str:
    return f"part-{rank:05d}.json"
