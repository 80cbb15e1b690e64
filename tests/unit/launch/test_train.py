"""Which errors are worth a second start: what the same bytes would not bring about again."""

from __future__ import annotations

import pytest

from raysemi.data.reader import CorruptSample
from raysemi.errors import CheckpointError, ConfigError, DataError, DataFailure, RaysemiError
from raysemi.launch.train import may_go_better


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        RaysemiError("workers must stay alive; got rank 1: ActorDiedError"),
        caused(DataError("index must be readable"), OSError("AWS Error NETWORK_CONNECTION: curlCode: 28")),
        caused(DataError("shard must be readable"), ConnectionResetError(104, "Connection reset by peer")),
        caused(DataFailure("shard must be readable"), TimeoutError()),
        caused(DataFailure("loader processes must stay alive"), RuntimeError("DataLoader worker (pid 7) is killed")),
    ],
    ids=str,
)
def test_hiccups_are_worth_another_start(error: Exception) -> None:
    assert may_go_better(error)


@pytest.mark.parametrize(
    "error",
    [
        caused(CorruptSample("image must be a readable JPEG"), OSError("broken data stream when reading image file")),
        DataError("pool must hold the bytes that it promises"),
        caused(DataError("many in a row may be corrupt"), CorruptSample("image must be readable")),
        caused(DataError("pool must be a folder"), FileNotFoundError(2, "No such file")),
        caused(DataError("pool must be readable"), PermissionError(13, "Permission denied")),
        caused(DataError("a mask does not fit"), RuntimeError("shapes")),
        ConfigError("train.steps must be positive"),
        caused(CheckpointError("the disk must have room"), OSError(28, "No space left on device")),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_what_would_be_met_again_ends_the_run(error: BaseException) -> None:
    assert not may_go_better(error)
