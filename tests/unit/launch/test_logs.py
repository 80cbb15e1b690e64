"""Lines as text and as JSON, from this process and from a worker's."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from makers import call, tiny_run

from raysemi import config_io
from raysemi.launch import logs
from raysemi.launch.board import ToBoard, relay
from raysemi.launch.terminal import Bar, TrainingProgress


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging of this process stays as it was."""
    monkeypatch.setattr(logs, "_here", {})
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    loggers = logging.getLogger(), logging.getLogger("raysemi")
    handlers = [list(logger.handlers) for logger in loggers]
    for logger in loggers:  # an earlier test's command has left its own
        logger.handlers[:] = [handler for handler in logger.handlers if not isinstance(handler, logs._Stderr)]
    yield
    logging.captureWarnings(False)
    for logger, before in zip(loggers, handlers, strict=True):
        logger.handlers[:] = before


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    for line in found:
        assert list(line)[:6] == ["time", "level", "run", "rank", "step", "message"]
        assert abs(datetime.fromisoformat(line["time"]).timestamp() - time.time()) < 60
    return found


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.log_to_stderr()
    logs.log_to_stderr()
    logs.stand(run="runs/a", rank=0, step=3)
    logging.getLogger("raysemi.anything").warning("few %s", "periods")
    logging.getLogger("raysemi.anything").info("going on")
    assert capsys.readouterr().err == "warning: few periods\ngoing on\n"


def test_json_tells_where_the_process_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSEMI_LOG", "json")
    logs.log_to_stderr()
    logs.log_to_stderr()
    logging.getLogger("raysemi.anything").info("begins")
    logs.stand(run="s3://runs/ä", rank=0, step=None)
    logs.stand(step=40)
    logging.getLogger("raysemi.anything").warning("two\nlines of %d", 7)
    logging.getLogger("another.library").warning("heard too")
    logging.getLogger("another.library").info("not heard")
    try:
        raise ValueError("wrong")
    except ValueError as error:
        logging.getLogger("raysemi").exception("it failed")
        sys.excepthook(ValueError, error, error.__traceback__)
    begins, warns, other, failed, uncaught = lines(capsys)
    place = {name: begins[name] for name in ("run", "rank", "step")}
    assert place == {"run": None, "rank": None, "step": None}
    assert warns == warns | {"level": "warning", "run": "s3://runs/ä", "rank": 0, "step": 40}
    assert warns["message"] == "two\nlines of 7"
    assert (other["level"], other["message"]) == ("warning", "heard too")
    assert failed["trace"].endswith("ValueError: wrong\n")
    assert uncaught["message"] == "ValueError: wrong"
    assert uncaught["trace"].startswith("Traceback")


@pytest.mark.parametrize(("kind", "rank", "text"), [("text", 3, "warning: rank 3: slow disk\n"), ("json", 3, None)])
def test_a_workers_line_travels_over_the_board(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str, rank: int, text: str | None
) -> None:
    sent: list[tuple[Any, ...]] = []
    board = SimpleNamespace(put=SimpleNamespace(remote=lambda *item: sent.append(item)))
    worker = logging.Logger("raysemi.launch.worker")
    worker.addHandler(ToBoard(board, rank))
    monkeypatch.setattr(logs, "_here", {"run": "runs/a", "rank": rank, "step": 12})
    worker.warning("slow %s", "disk")
    worker.info("only rank 0 says so")
    monkeypatch.setattr(logs, "_here", {"run": "runs/a", "rank": None, "step": 10})  # the driver's
    monkeypatch.setenv("RAYSEMI_LOG", kind)
    logs.log_to_stderr()
    relay(pickle.loads(pickle.dumps(sent)), None)
    if text is not None:
        assert capsys.readouterr().err == text
    else:
        (line,) = lines(capsys)
        assert line == line | {"level": "warning", "run": "runs/a", "rank": 3, "step": 12, "message": "slow disk"}


def test_progress_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEMI_LOG", "json")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # no bar even so
    logs.stand(run="runs/a", rank=None, step=None)
    with TrainingProgress(100) as progress, Bar("images") as bar:
        progress(10, {"loss/total": 0.75})
        progress(20, {"eval/miou": 33.3, "eval/pixel_accuracy": 70.0})
        bar(4, 4)
    step, evaluation, images = lines(capsys)
    assert step == step | {"run": "runs/a", "rank": 0, "step": 10, "metrics": {"loss/total": 0.75}}
    assert evaluation["metrics"]["eval/miou"] == 33.3
    assert evaluation["message"].startswith("step 20/100")
    assert images["message"].startswith("images 4/4")


def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSEMI_LOG", "xml")
    done = call("methods")
    assert done.exit_code == 2
    assert "error: RAYSEMI_LOG must be text or json; got xml." in done.output


def test_all_that_a_training_says_is_json(scenes: Path, tmp_path: Path) -> None:
    """The command itself: progress, warnings, the result, and the error of a second one."""
    config = tiny_run(scenes, tmp_path / "run", "fixmatch", "train.steps=4", "train.log_every=2", "eval.every=4")
    (tmp_path / "recipe.yaml").write_text(config_io.dump(config), encoding="utf-8")

    def train(*overrides: str) -> tuple[int, list[dict[str, Any]]]:
        command = [sys.executable, "-m", "raysemi", "train", str(tmp_path / "recipe.yaml"), *overrides]
        environment = {**logs.os.environ, "RAYSEMI_LOG": "json"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
        assert done.stdout == ""
        return done.returncode, [json.loads(line) for line in done.stderr.splitlines()]

    code, said = train()
    assert code == 0, said
    assert [line["step"] for line in said if "metrics" in line] == [2, 4, 4]
    assert {line["run"] for line in said if "metrics" in line} == {config.run}
    assert said[-1]["result"]["steps"] == 4
    code, said = train("optim.lr=0.5")
    assert code == 2
    assert said[-1] == said[-1] | {"level": "error", "run": config.run}
    assert "optim.lr" in said[-1]["message"]
