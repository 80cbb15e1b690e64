"""Which errors are worth a second start: what the same bytes would not bring about again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from makers import tiny_run

from raysemi import config_io
from raysemi.data.reader import CorruptSample
from raysemi.errors import CheckpointError, ConfigError, DataError, DataFailure, RaysemiError, TrainingError
from raysemi.launch.restore import finished
from raysemi.launch.train import Budget, launch, may_go_better


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
        TrainingError("steps with a loss that is not finite must be at most train.skip_limit"),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_what_would_be_met_again_ends_the_run(error: BaseException) -> None:
    assert not may_go_better(error)


def test_failures_count_in_a_row_without_getting_further() -> None:
    budget = Budget(2)
    assert [budget.spend(step, free=False) for step in (5, 5, 9, 9, 8, 9)] == [1, 0, 1, 0, -1, -2]
    assert [Budget(0).spend(step, free=False) for step in (0, 7)] == [-1, -1]
    spot = Budget(1)
    assert [spot.spend(4, free=free) for free in (True, True, False, True, False)] == [1, 1, 0, 0, -1]


def test_a_finished_run_says_so_without_asking_ray(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_run(scenes, tmp_path / "run", "fixmatch", "train.steps=3", "eval.every=2")
    launch(config_io.change(config, ["train.stop_at=2"]))
    result = launch(config)
    assert result["steps"] == 3
    caplog.set_level(logging.INFO, logger="raysemi")
    nobody = ["ray={num_workers: 1, address: '127.0.0.1:1'}"]
    assert launch(config_io.change(config, nobody)) == result
    assert "step 3 of 3: nothing left to do." in caplog.messages
    with pytest.raises(ConfigError, match=r"whose config differs in optim\.lr"):
        launch(config_io.change(config, [*nobody, "optim.lr=0.02"]))
    (tmp_path / "run/progress.json").write_text('{"step": 3, "ended": false}')  # its driver was killed
    assert finished(config) is None
