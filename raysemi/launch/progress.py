"""How far a run came before it was cut off: what going on from its checkpoint has cost, in steps and seconds."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass

from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError

PROGRESS = "progress.json"
_EVERY_S = 30.0
"""Least seconds between two writes into an object store."""


@dataclass(frozen=True)
class Lost:
    """What a failure has cost."""

    steps: int
    """Done before, and to be done again. The last few may be missing: they are noted at log lines."""
    seconds: float
    """From the last step before to the first one after."""


class Progress:
    """The newest step of a run, kept in its folder at log lines; used on rank 0 alone.

    Args:
        folder: the run folder.
        step: at which the run goes on.
    """

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        self._start = step
        self._written = -_EVERY_S
        self._before: tuple[int, float] | None = None
        with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
            before = json.loads(folder.read_bytes(PROGRESS))
            if not before["ended"]:
                self._before = int(before["step"]), float(before["at"])

    def first_step(self) -> Lost | None:
        """What was lost, once the first step is done; None after a clean end or at the beginning."""
        before, self._before = self._before, None
        return None if before is None else Lost(max(0, before[0] - self._start), time.time() - before[1])

    def note(self, step: int) -> None:
        """Keeps a step; what fails here fails no run."""
        now = time.monotonic()
        if self._folder.is_local or now - self._written >= _EVERY_S:
            self._written = now
            self._write(step, ended=False)

    def end(self, step: int) -> None:
        """Keeps that the run has ended as it should."""
        self._write(step, ended=True)

    def _write(self, step: int, *, ended: bool) -> None:
        content = {"step": step, "at": time.time(), "ended": ended}
        with contextlib.suppress(CheckpointError):
            self._folder.write_bytes(PROGRESS, json.dumps(content).encode())


def ended_at(folder: RunFolder) -> int | None:
    """The step at which a run's last launch ended as it should; None where it did not, or nobody knows."""
    with contextlib.suppress(CheckpointError, ValueError, KeyError, TypeError):
        content = json.loads(folder.read_bytes(PROGRESS))
        return int(content["step"]) if content["ended"] else None
    return None
