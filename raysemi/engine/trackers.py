"""MLflow and Weights & Biases, where the config asks for them: settings once, numbers at log lines, the result.

Rank 0 writes through the libraries' own queues, so no step waits for a server. What fails there is told once, and the
run goes on without. Credentials are those of the environment (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN), never settings.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from pydantic import Field, field_validator

from raysemi.base import Config
from raysemi.engine.folder import RunFolder

FILE = "trackers.json"
"""Of the run folder: the names that the trackers gave the run, so that it goes on under them."""
_MOST = 100
"""Params of one request to MLflow."""
_log = logging.getLogger(__name__)


class MlflowConfig(Config):
    """`log.mlflow.*`."""

    experiment: str = Field("raysemi", min_length=1)
    """Experiment that the run belongs to; made where it does not exist."""
    uri: str | None = None
    """Tracking server or database (`https://...`, `sqlite:////shared/mlflow.db`); null: MLFLOW_TRACKING_URI, else
    MLflow's own default, mlflow.db in the folder of the command."""


class WandbConfig(Config):
    """`log.wandb.*`; WANDB_MODE=offline keeps everything in RUN/wandb, for `wandb sync`."""

    project: str = Field("raysemi", min_length=1)
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; null: the account's own."""


class LogConfig(Config):
    """`log.*`: where a run's numbers go besides its folder."""

    mlflow: MlflowConfig | None = None
    """true, or settings: MLflow; null: no. Needs the extra `mlflow`."""
    wandb: WandbConfig | None = None
    """true, or settings: Weights & Biases; null: no. Needs the extra `wandb`."""

    @field_validator("*", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    def faults(self) -> list[str]:
        """What keeps them from being used here: libraries that are not installed."""
        return [
            f"log.{name} must find the package {name}; got none. Install it: `pip install 'raysemi[{name}]'`, or set "
            f"log.{name}=null."
            for name in ("mlflow", "wandb")
            if getattr(self, name) is not None and not _installed(name)
        ]


def _installed(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None  # a folder of that name, such as wandb's own, has none


class Tracker(Protocol):
    """What a library does with a run."""

    id: str
    """The run's name there."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of a log line or an evaluation; does not wait."""

    def end(self, result: Mapping[str, Any], finished: bool) -> None:
        """Takes result.json, and waits until all has been sent; `finished`: the run will not go on."""


class Trackers:
    """Those that a config asks for; used on rank 0 alone.

    Args:
        config: `log.*`.
        folder: the run folder.
        settings: the whole config, as a tree of plain values.
    """

    def __init__(self, config: LogConfig, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._told: set[str] = set()
        ids: dict[str, str] = {}
        if folder.exists(FILE):
            ids = json.loads(folder.read_bytes(FILE))
        makers: dict[str, tuple[Config | None, Callable[..., Tracker]]] = {
            "mlflow": (config.mlflow, Mlflow),
            "wandb": (config.wandb, Wandb),
        }
        for name, (wanted, make) in makers.items():
            if wanted is None:
                continue
            try:
                self._trackers[name] = made = make(wanted, folder, settings, ids.get(name))
            except Exception as error:  # whatever a library raises, training goes on
                self._tell(name, error)
                continue
            ids[name] = made.id
        if self._trackers:
            folder.write_bytes(FILE, json.dumps(ids).encode())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands on the numbers of a log line or an evaluation."""
        for name, tracker in self._trackers.items():
            try:
                tracker.write(step, metrics)
            except Exception as error:
                self._tell(name, error)

    def end(self, result: Mapping[str, Any], finished: bool) -> None:
        """Hands on result.json; `finished`: the run will not go on."""
        for name, tracker in self._trackers.items():
            try:
                tracker.end(result, finished)
            except Exception as error:
                self._tell(name, error)

    def _tell(self, name: str, error: Exception) -> None:
        if name not in self._told:
            self._told.add(name)
            first = (str(error).strip() or "no reason").splitlines()[0]
            _log.warning(
                "log.%s: %s: %s. The run goes on; its numbers are in its folder.", name, type(error).__name__, first
            )


class Mlflow:
    """A run of an MLflow experiment; settings are its params, result.json's numbers the metrics `result/...`."""

    def __init__(self, config: MlflowConfig, folder: RunFolder, settings: Mapping[str, Any], id: str | None) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=config.uri)
        self._sent: Any = None
        if id is None:
            found = self._client.get_experiment_by_name(config.experiment)
            experiment = found.experiment_id if found is not None else self._client.create_experiment(config.experiment)
            self.id: str = self._client.create_run(experiment, run_name=_name(folder)).info.run_id
            self._write_params(settings)
        else:
            self.id = id
            self._client.update_run(id, status="RUNNING")

    def _write_params(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(path, str(value)[:6000]) for path, value in _leaves(settings)]
        for first in range(0, len(params), _MOST):
            self._client.log_batch(self.id, params=params[first : first + _MOST])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Puts the numbers into the library's queue."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        rows = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in metrics.items()]
        self._sent = self._client.log_batch(self.id, metrics=rows, synchronous=False)

    def end(self, result: Mapping[str, Any], finished: bool) -> None:
        """Writes the result and waits for what was sent before."""
        numbers = {f"result/{name}": value for name, value in result.items() if isinstance(value, int | float)}
        if numbers:
            self.write(int(result["steps"]), numbers)
        if self._sent is not None:
            self._sent.wait()
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Wandb:
    """A run of a W&B project; its axis is `step`, since a run that goes on may repeat some."""

    def __init__(self, config: WandbConfig, folder: RunFolder, settings: Mapping[str, Any], id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project, entity=config.entity, name=_name(folder), id=id, config=dict(settings),
            dir=folder.path() if folder.is_local else None, resume="allow" if id else None,
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
            allow_val_change=True,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")
        self.id: str = self._run.id

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the numbers to the library's own process."""
        self._run.log({"step": step, **metrics})

    def end(self, result: Mapping[str, Any], finished: bool) -> None:
        """Writes the result into the run's summary."""
        self._run.summary.update({"result": dict(result)})
        self._run.finish(exit_code=0 if finished else 1)


def _name(folder: RunFolder) -> str:
    return folder.location.rstrip("/").rpartition("/")[2]


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
