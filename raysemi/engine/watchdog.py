"""A process that no longer gets on says where each of its threads stands, and ends.

Ranks wait for each other in collectives, so one that hangs stops them all; then each has its own watchdog, and the run
folder a stack of every rank. A thread of Python watches, which runs while another is stuck in C code without the
interpreter's lock (as collectives, reads and kernels are); where the lock is held for ever, a timer of C ends the
process, with the stacks on stderr.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

from raysemi.engine.folder import RunFolder
from raysemi.errors import RaysemiError

_log = logging.getLogger(__name__)
STACKS = "stacks"
"""Of the run folder: `rank-0.txt` and so on."""
_WORDS_S = 10.0
"""In which a store, a log or a launcher must take the last words."""
_OTHERS_S = 60.0
"""At most, for the other ranks to write theirs before what started them all hears that one is gone: the last sign of
life of one may be that of another a step later."""
FAILURE = 1


class Watchdog:
    """Watches from `start` to the end of the `with` block.

    Args:
        folder: the run folder.
        rank: of this process.
        after_s: seconds without a `beat` after which the process ends, with exit code 1.
        last_words: takes the error that says so, for whoever started the process; it may never return.
    """

    def __init__(
        self, folder: RunFolder, rank: int, after_s: float, last_words: Callable[[RaysemiError], None] | None = None
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._after_s = after_s
        self._last_words = last_words
        self._beaten = time.monotonic()
        self._step = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="raysemi-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beaten = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, step: int | None = None) -> None:
        """Says that the run gets on.

        Args:
            step: steps done, after a step.
        """
        self._beaten = time.monotonic()
        self._step = self._step if step is None else step

    def _watch(self) -> None:
        tick = min(self._after_s / 4, 2.0)
        try:
            while not self._ended.wait(tick):
                # Set anew by each tick, it only comes to an end when no thread of Python can run.
                faulthandler.dump_traceback_later(self._after_s + _OTHERS_S + 3 * _WORDS_S, exit=True, file=2)
                if time.monotonic() - self._beaten > self._after_s:
                    self._end()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        seconds = time.monotonic() - self._beaten
        name = f"{STACKS}/rank-{self._rank}.txt"
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        error = RaysemiError(
            f"a step must be done within train.hang_after_s, {self._after_s:g} s; got none for {seconds:.0f} s after "
            f"step {self._step} on rank {self._rank} ({platform.node()}). {self._folder.location}/{name} says where it "
            "stood, as do the files of the other ranks beside it: the rank that is not in a collective is the one that "
            "hangs. The same command goes on from the last checkpoint."
        )
        _in_time(lambda: self._folder.write_bytes(name, f"{error}\n\n".encode() + stacks))
        _in_time(lambda: _log.error("%s\n%s", error, stacks.decode(errors="replace")))
        if self._ended.wait(min(_OTHERS_S, self._after_s)):
            return  # what was slow, not stuck, has come to its end
        if self._last_words is not None:
            last_words = self._last_words
            _in_time(lambda: last_words(error))
        os._exit(FAILURE)


def _in_time(work: Callable[[], object]) -> None:
    """Does something that may itself hang, in a thread that is not waited for longer than it deserves."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(_WORDS_S)
