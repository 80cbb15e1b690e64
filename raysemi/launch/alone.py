"""One launch at a time in a run folder of this machine: two of them would write each other's checkpoints."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raysemi.engine.folder import RunFolder
from raysemi.errors import ConfigError

_log = logging.getLogger(__name__)
PATIENCE_S = 20.0
"""For the processes of a launch that was just killed, or told to stop, to end."""
_POLL_S = 0.2


@contextmanager
def alone_in(run: str) -> Iterator[None]:
    """Holds a run folder until the end of the block, or of this process however it ends.

    The lock is the kernel's (flock), on the folder itself: nothing is left behind that a later launch would have to
    judge. Nobody is kept out of an object store, nor of a file system without such locks.

    Args:
        run: the run folder, which is made where it is missing, and goes again if it stays empty.

    Raises:
        ConfigError: another launch has held it for `PATIENCE_S`.
    """
    folder = RunFolder(run)
    if not folder.is_local:
        yield
        return
    path = Path(folder.path())
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # whoever writes there will say it
        yield
        return
    try:
        _take(handle, run)
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):
                path.rmdir()


def _take(handle: int, run: str) -> None:
    since, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() - since > PATIENCE_S:
                raise ConfigError(
                    f"run must be written by one launch at a time; got {run}, which another process of this machine "
                    "writes. Wait for its end, stop it, or give another run folder."
                ) from error
        except OSError:  # a file system that knows no locks of folders, such as NFS
            return
        else:
            return
        if not told:
            _log.warning("%s is written by another process; waiting %g s for its end.", run, PATIENCE_S)
            told = True
        time.sleep(_POLL_S)
