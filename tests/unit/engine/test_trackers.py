"""A run as MLflow and W&B keep it, by the libraries themselves; without them it is refused before it starts."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from makers import tiny_run

from raysemi import config_io
from raysemi.engine import trackers
from raysemi.engine.folder import RunFolder
from raysemi.engine.trackers import LogConfig, Trackers
from raysemi.errors import ConfigError
from raysemi.launch.train import launch

_BLOCK = 32768


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs the extra {name}")


def test_a_switch_or_settings(tmp_path: Path) -> None:
    one = tiny_run(tmp_path, tmp_path / "run", "fixmatch", "log.mlflow=true", "log.wandb.project=masks")
    assert one.log.mlflow is not None
    assert one.log.mlflow.experiment == "raysemi"
    assert one.log.wandb is not None
    assert one.log.wandb.project == "masks"
    assert config_io.change(one, ["log.mlflow=false", "log.wandb=null"]).log == LogConfig()
    with pytest.raises(ConfigError, match=r"log\.mlflow\.uri must not hold a password or key"):
        config_io.change(one, ["log.mlflow.uri=https://me:secret@tracking.example"])


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_without_the_library_no_run_starts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_installed", lambda wanted: wanted != name)
    config = tiny_run(tmp_path, tmp_path / "run", "fixmatch", "log.mlflow=true", "log.wandb=true")
    with pytest.raises(ConfigError, match=rf"log\.{name} must find .* `pip install 'raysemi\[{name}\]'`") as caught:
        launch(config)
    assert len(caught.value.faults) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("only_a_folder") is not None
    assert not trackers._installed("only_a_folder")
    assert trackers._installed("json")


class Broken:
    """A library whose server is gone."""

    id = "name-there"

    def __init__(self, *_: Any) -> None:
        pass

    def write(self, step: int, metrics: Any) -> None:
        raise ConnectionError(f"no answer\nat step {step}")

    def end(self, result: Any, finished: bool) -> None:
        raise ConnectionError("still none")


def test_what_fails_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(trackers, "Mlflow", Broken)
    monkeypatch.setattr(trackers, "Wandb", lambda *_: 1 / 0)
    caplog.set_level(logging.WARNING, logger="raysemi")
    both = LogConfig.model_validate({"mlflow": True, "wandb": True})
    made = Trackers(both, RunFolder(tmp_path), {})
    made.write(1, {"loss/total": 1.0})
    made.write(2, {"loss/total": 1.0})
    made.end({}, finished=True)
    wandb, mlflow = [record.getMessage() for record in caplog.records]
    assert wandb.startswith("log.wandb: ZeroDivisionError: division by zero. The run goes on")
    assert mlflow.startswith("log.mlflow: ConnectionError: no answer. The run goes on")
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "name-there"}


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")  # of its own libraries
def test_mlflow_keeps_a_run_that_goes_on(scenes: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = [
        "train.steps=4",
        "train.log_every=2",
        "eval.every=4",
        f"log.mlflow.uri={uri}",
        "log.mlflow.experiment=e",
    ]
    config = tiny_run(scenes, tmp_path / "mine", "fixmatch", *settings)
    launch(config_io.change(config, ["train.stop_at=2"]))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"  # it is not finished
    result = launch(config)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["method.name"] == "fixmatch"
    assert run.data.params["optim.lr"] == "0.01"
    assert [one.step for one in client.get_metric_history(run.info.run_id, "loss/total")] == [2, 4]
    assert run.data.metrics["eval/miou"] == run.data.metrics["result/miou"] == pytest.approx(result["miou"])


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, in which W&B keeps a run that is offline, after 7 bytes of its own."""
    at, parts = 0, b""
    while at + 7 <= len(content):
        left = _BLOCK - (at + 7) % _BLOCK  # blocks count from the file's first byte
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<xxxxHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_a_run_offline(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = ["train.steps=4", "train.log_every=2", "eval.every=4", "log.wandb.project=masks"]
    config = tiny_run(scenes, tmp_path / "mine", "fixmatch", *settings)
    launch(config_io.change(config, ["train.stop_at=2"]))
    result = launch(config)
    steps, ids, summary = [], set(), {}
    for file in sorted((tmp_path / "mine/wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_log(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "loss/total" in row:
                steps.append(row["step"])
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert ids == {(json.loads((tmp_path / "mine/trackers.json").read_text())["wandb"], "masks", "mine")}
    assert steps == [2, 4]
    assert summary["result"]["miou"] == pytest.approx(result["miou"])
