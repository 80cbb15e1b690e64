"""The database of a sweep: a SQLite file in its folder, or one of a PostgreSQL server."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna

from raysemi.errors import CheckpointError, CheckpointFailure
from raysemi.tune.sweep import SweepConfig

_CONNECT_S = 15
"""For a server to answer, unless the URL says how long (`?connect_timeout=60`)."""


def open_storage(sweep: SweepConfig, folder: Path) -> optuna.storages.RDBStorage:
    """The database; `close` ends its connections.

    Raises:
        CheckpointFailure: it does not answer.
        CheckpointError: its driver is missing.
    """
    url = f"sqlite:///{(folder / 'study.db').absolute()}" if sweep.storage == "sqlite" else _by_psycopg(sweep.storage)
    settings: dict[str, Any] = {"connect_args": {"timeout": 60}}
    if sweep.storage != "sqlite":
        patience = {} if "connect_timeout=" in url else {"connect_timeout": _CONNECT_S}
        settings = {"connect_args": patience, "pool_pre_ping": True}
    try:
        with answering(sweep), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.storages.RDBStorage(url, engine_kwargs=settings)
    except ImportError as error:
        raise CheckpointError(
            f"storage must be a database whose driver is installed; got {sweep.storage}: {error}. "
            'pip install "raysemi[postgres]"'
        ) from error


def close(storage: optuna.storages.RDBStorage) -> None:
    """Ends its connections."""
    storage.remove_session()
    storage.engine.dispose()


@contextlib.contextmanager
def answering(sweep: SweepConfig) -> Iterator[None]:
    """Tells in one line that the database has failed, whatever has wrapped its error on the way.

    Raises:
        CheckpointFailure: so it was.
    """
    try:
        yield
    except Exception as error:
        if (fault := _of_database(error)) is None:
            raise
        first = str(fault).strip().splitlines()[0]
        raise CheckpointFailure(
            f"storage must answer; got {sweep.storage}: {first}. Check URL, password and database; the same command "
            "goes on."
        ) from error


def _of_database(error: BaseException | None) -> BaseException | None:
    from sqlalchemy.exc import SQLAlchemyError

    while error is not None and not isinstance(error, SQLAlchemyError):
        error = error.__cause__ or error.__context__
    return error


def _by_psycopg(url: str) -> str:
    """SQLAlchemy would take psycopg2 for a URL that names no driver."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)
