"""Ending a run early, with a checkpoint: on Ctrl-C, on SIGTERM, or when the launcher asks for it."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from raysemi.methods.base import AcrossRanks

_log = logging.getLogger(__name__)
ASKED_EVERY_S = 5.0
"""Seconds between two questions to all ranks: a sixth of the shortest notice that clouds give."""
_SAVE_S = 60.0
"""For the workers to save and end after SIGTERM; who sent it kills after a time of its own."""


class Stopped(KeyboardInterrupt):
    """The run ended early, as it was asked to; its checkpoint is that of the last step."""


class StopVote:
    """Whether any rank was asked to stop: all ranks get the same answer, after the same step.

    The question costs a collective and a wait for the device, so it is put about every `ASKED_EVERY_S` seconds; after
    how many steps that is, the ranks agree on each time.

    Args:
        across: the ranks.
        device: this rank's device.
        signalled: whether this process was told to; costs nothing.
        asked: whether the launcher wants it; called on all ranks together, must not fail.
    """

    def __init__(
        self,
        across: AcrossRanks,
        device: torch.device,
        signalled: Callable[[], bool],
        asked: Callable[[], bool] | None = None,
    ) -> None:
        self._across = across
        self._device = device
        self._signalled = signalled
        self._asked = asked
        self._steps, self._since = 0, time.monotonic()
        self._next = 1

    def __call__(self) -> bool:
        """Called by all ranks after every step."""
        self._steps += 1
        if self._across.world == 1 and self._signalled():
            return True
        if self._steps < self._next:
            return False
        now = time.monotonic()
        seconds = (now - self._since) / self._steps
        wanted = (self._asked is not None and self._asked()) | self._signalled()
        if self._across.world > 1:
            votes = torch.tensor([float(wanted), seconds], device=self._device)
            most, seconds = self._across.max(votes).tolist()
            wanted = most > 0
        # Doubled at most: steps that are only queued look short, and the first one is like no other.
        self._next = max(1, min(2 * self._steps, int(ASKED_EVERY_S / max(seconds, 1e-6))))
        self._steps, self._since = 0, now
        return wanted


@contextmanager
def graceful_stop() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C and SIGTERM into "finish this step and save"; a second Ctrl-C interrupts at once.

    Only where the main thread trains, which alone hears signals: Ray's workers train in another one. Gives whether one
    of the signals has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])
        if not asked.is_set():
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            _log.warning("stopping after this step, with a checkpoint%s", again)
        asked.set()

    for number in signals:
        signal.signal(number, stop)
    try:
        yield asked.is_set
    finally:
        for number in signals:
            signal.signal(number, before[number])


class Terminated:
    """Whether this process was asked to end by SIGTERM, as Kubernetes does; the workers then save and end."""

    since: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal."""
        self.since = self.since or time.monotonic()

    @property
    def late(self) -> bool:
        """The workers have had their time to save."""
        return self.since is not None and time.monotonic() - self.since > _SAVE_S


@contextmanager
def sigterm() -> Iterator[Terminated]:
    """Hears SIGTERM in a process that does not train itself."""
    terminated = Terminated()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
