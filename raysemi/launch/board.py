"""How workers reach the driver's terminal: an actor that keeps what they say until the driver reads it.

So no worker ever waits for a reader, and the same works on one machine and on many.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import Any

from raysemi.errors import RaysemiError
from raysemi.launch.logs import portable

_log = logging.getLogger(__name__)
OnLog = Callable[[int, dict[str, float]], None]
"""(steps done, metrics by name)."""


class Board:
    """The actor's class."""

    def __init__(self) -> None:
        self._items: list[tuple[Any, ...]] = []
        self._workers: list[Any] = []
        self._asked: str | None = None

    def ask(self, reason: str) -> None:
        """Asks the workers to save and end."""
        if self._asked is None:
            text = f"the workers save and end: {reason}"
            fields = {"name": __name__, "levelno": logging.INFO, "levelname": "INFO", "msg": text}
            self._items.append(("message", fields))
        self._asked = reason

    def asked(self) -> bool:
        """Whether they were asked to."""
        return self._asked is not None

    def join(self, worker: Any) -> None:
        """Notes a worker's own handle."""
        self._workers.append(worker)

    def workers(self) -> list[Any]:
        """Handles of all workers so far."""
        return self._workers

    def put(self, *item: Any) -> None:
        """Adds an item: `metrics, step, values`, `message, record` or `fault, error, cause`."""
        self._items.append(item)

    def take(self) -> list[tuple[Any, ...]]:
        """All items since the last call."""
        items, self._items = self._items, []
        return items


def relay(items: list[tuple[Any, ...]], on_log: OnLog | None) -> None:
    """Does in the driver what the items say.

    Raises:
        RaysemiError: the fault of a worker.
    """
    for kind, *content in items:
        if kind == "metrics" and on_log is not None:
            on_log(*content)
        elif kind == "message":
            record = logging.makeLogRecord(*content)
            if _log.isEnabledFor(record.levelno):
                logging.getLogger(record.name).handle(record)
        elif kind == "fault":
            error, cause = content
            raise error from cause


def post_fault(board: Any, error: RaysemiError) -> Any:
    """Sends an error with its cause, which Ray leaves behind and the exit code depends on; a reference to wait for."""
    return board.put.remote("fault", error, _portable(error.__cause__))


def _portable(cause: BaseException | None) -> BaseException | None:
    try:
        pickle.dumps(cause)
    except (pickle.PicklingError, TypeError, AttributeError):
        return RuntimeError(str(cause))
    return cause


class ToBoard(logging.Handler):
    """Sends log lines of a worker to the board: all of rank 0, warnings of the others."""

    def __init__(self, board: Any, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a line."""
        self._board.put.remote("message", portable(record))
