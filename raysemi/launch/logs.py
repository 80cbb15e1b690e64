"""Lines on the terminal: text for people, or JSON for a collector (RAYSEMI_LOG=json), with run, rank and step."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from raysemi.errors import ConfigError

VARIABLE = "RAYSEMI_LOG"
_here: dict[str, Any] = {}
"""Where this process stands: `run`, `rank` and `step`, as far as they are known."""
_PLACE = ("run", "rank", "step")


def as_json() -> bool:
    """Whether lines are JSON.

    Raises:
        ConfigError: the variable has another value than text or json.
    """
    value = os.environ.get(VARIABLE, "text")
    if value not in ("text", "json"):
        raise ConfigError(f"{VARIABLE} must be text or json; got {value}. Change it, or unset it for text.")
    return value == "json"


def stand(**place: str | int | None) -> None:
    """Notes `run`, `rank` or `step` (steps done) of this process, for the lines that follow."""
    _here.update(place)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Sends raysemi's log lines to the terminal; as JSON those of other libraries too, and what ends the program."""
    logger = logging.getLogger("raysemi")
    logger.setLevel(level)
    if as_json():
        logger = logging.getLogger()  # raysemi's lines come here by themselves
        logging.captureWarnings(True)
        sys.excepthook = _say_exception
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())


def say(message: str, level: int = logging.INFO, **fields: Any) -> None:
    """Prints a line.

    Args:
        message: for people; the whole line unless it is JSON.
        level: of `logging`.
        fields: more of the JSON object: `run`, `rank` and `step` where they are not this process's, numbers, a trace.
    """
    if as_json():
        _print_json(datetime.now(UTC).timestamp(), level, message, fields)
    else:
        print(message, file=sys.stderr, flush=True)


def portable(record: logging.LogRecord) -> dict[str, Any]:
    """A record as a dict for another process, with where this one stands; `logging.makeLogRecord` reads it."""
    return {
        "name": record.name,
        "levelno": record.levelno,
        "levelname": record.levelname,
        "created": record.created,
        "msg": record.getMessage(),
    } | {name: getattr(record, name, _here.get(name)) for name in _PLACE}


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if as_json():
            fields = {name: getattr(record, name) for name in _PLACE if hasattr(record, name)}
            if record.exc_info:
                fields["trace"] = "".join(traceback.format_exception(*record.exc_info))
            _print_json(record.created, record.levelno, record.getMessage(), fields)
            return
        # Looked up each time: a bar on the terminal puts its own stream in place, or lines would tear it.
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        rank = getattr(record, "rank", None)
        print(f"{prefix}{f'rank {rank}: ' if rank else ''}{record.getMessage()}", file=sys.stderr, flush=True)


def _print_json(created: float, level: int, message: str, fields: dict[str, Any]) -> None:
    line = {
        "time": datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds"),
        "level": logging.getLevelName(level).lower(),
        **{name: _here.get(name) for name in _PLACE},
        "message": message,
    }
    print(json.dumps(line | fields, ensure_ascii=False, default=str), file=sys.stderr, flush=True)


def _say_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    say(f"{kind.__name__}: {error}", logging.ERROR, trace=text)
