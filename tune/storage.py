"""The database of a sweep: a SQLite file in its folder, or one of a PostgreSQL server."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc

from raysemi.errors import CheckpointError, CheckpointFailure
from raysemi.tune.sweep import SweepConfig

_FILE = "study.db"
_CONNECT_S = 15
"""For a server to answer, unless the URL says how long (`?connect_timeout=60`)."""

_MAKES_TABLES = int.from_bytes(b"raysemi", "big")
"""Name of a lock of the server; any number that nobody else takes."""


def open_storage(sweep: SweepConfig, folder: Path) -> optuna.storages.RDBStorage:
    """The database, with the tables that it lacked; `close` ends its connections.

    Raises:
        CheckpointFailure: it does not answer.
        CheckpointError: its driver is missing.
    """
    url, settings = _where(sweep, folder)
    with _at_work(sweep), _one_at_a_time(url, settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(url, engine_kwargs=settings)


def is_made(sweep: SweepConfig, folder: Path) -> bool:
    """Whether a driver has made the tables, of which this is the last. Two processes would be in each other's way.

    Raises as `open_storage`.
    """
    if sweep.storage == "sqlite" and not (folder / _FILE).is_file():
        return False  # looking would make it
    url, settings = _where(sweep, folder)
    with _at_work(sweep):
        engine = sqlalchemy.create_engine(url, **settings)
        try:
            with engine.connect() as connection:
                if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                    return False
                return connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version")) is not None
        finally:
            engine.dispose()


def _where(sweep: SweepConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    """URL and settings for SQLAlchemy."""
    if sweep.storage == "sqlite":
        return f"sqlite:///{(folder / _FILE).absolute()}", {"connect_args": {"timeout": 60}}
    # SQLAlchemy would take psycopg2 for a URL that names no driver
    url = sweep.storage.replace("postgresql://", "postgresql+psycopg://", 1)
    patience = {} if "connect_timeout=" in url else {"connect_timeout": _CONNECT_S}
    return url, {"connect_args": patience, "pool_pre_ping": True}


@contextlib.contextmanager
def _one_at_a_time(url: str, settings: dict[str, Any]) -> Iterator[None]:
    """For sweeps that begin together on a new server: each would look for the tables and make them, the later in vain.

    A sweep's folder, and so its SQLite file, has one driver.
    """
    if url.startswith("sqlite:"):
        yield
        return
    engine = sqlalchemy.create_engine(url, **settings)
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(_MAKES_TABLES)))
            yield  # the lock goes with its connection
    finally:
        engine.dispose()


@contextlib.contextmanager
def _at_work(sweep: SweepConfig) -> Iterator[None]:
    try:
        with answering(sweep):
            yield
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
    while error is not None and not isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        error = error.__cause__ or error.__context__
    return error
