"""RunConfig -> a finished run: on Ray Train's workers, as a rank of torchrun, or in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysemi import config_io
from raysemi.config import RayConfig, RunConfig, check_world
from raysemi.errors import CheckpointFailure, DataError, DataFailure, RaysemiError
from raysemi.launch.board import Board, OnLog, ToBoard, post_fault, relay
from raysemi.launch.cluster import Cluster, connected, ctrl_c_wins, refuse_relative_paths, worker_resources
from raysemi.launch.restore import open_pools, refuse_another_run

_log = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT_S = 1800
_POLL_S = 0.3
_END_S = 60
"""For Ray Train to notice that its workers are gone."""


def launch(config: RunConfig, on_log: OnLog | None = None) -> dict[str, Any]:
    """Trains until `train.steps` or `train.stop_at`, going on where the run folder stands.

    Args:
        config: the resolved config.
        on_log: (steps done, metrics), called here whenever the run logs.

    Returns:
        The fields of `result.json`.

    Raises:
        ConfigError, DataError, CheckpointError: as they were raised on the worker.
        RaysemiError: workers failed more often than `ray.max_failures` allows.
        KeyboardInterrupt: after Ctrl-C; the run folder holds the last checkpoint.
    """
    if isinstance(config.ray, RayConfig):
        if config.ray.address is None and "RAY_ADDRESS" not in os.environ:
            # Workers look too; but they take a while to start, and a mistake should be told at once.
            open_pools(config)
            refuse_another_run(config)
        with ctrl_c_wins() as pressed:
            return _on_ray(config, config.ray, on_log, pressed)
    from raysemi.launch.worker import run

    return run(config, on_log)


def _on_ray(config: RunConfig, settings: RayConfig, on_log: OnLog | None, pressed: threading.Event) -> dict[str, Any]:
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(_COLLECTIVE_TIMEOUT_S))  # Ray's own default is none
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon an end or an error is noticed
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the config are the user's
    if not settings.address and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
    with connected(settings) as cluster, tempfile.TemporaryDirectory(prefix="raysemi-ray-") as folder:
        if not cluster.here:
            _refuse_relative_paths(config)
        import ray

        actor: Any = ray.remote(num_cpus=0)(Board)
        board = actor.remote()
        cpus, gpu = worker_resources(settings, cluster)
        check_world(config, settings.num_workers, gpu=gpu)
        settings = settings.model_copy(update={"use_gpu": gpu, "cpus_per_worker": cpus})
        work = {
            "config": config_io.dump(config.model_copy(update={"ray": settings})),
            "board": board,
            "folder": str(Path.cwd()),
        }
        left = settings.max_failures
        while True:
            outcome = _Outcome(_trainer(config, settings, cluster, work, folder))
            outcome.start()
            try:
                while not outcome.ended.is_set():
                    relay(ray.get(board.take.remote()), on_log)
                    if pressed.is_set():
                        raise KeyboardInterrupt
                    outcome.ended.wait(_POLL_S)
                relay(ray.get(board.take.remote()), on_log)
                if outcome.error is None:
                    return outcome.value
                raise _one_line(outcome.error) from outcome.error
            except BaseException as error:
                with contextlib.suppress(Exception):  # a terminal's Ctrl-C may have ended the board already
                    for worker in ray.get(board.workers.remote()):  # on a notebook's cluster nothing else ends them
                        ray.kill(worker)
                # A thread that asks Ray anything once it is shut down ends the whole process, with exit code 1.
                outcome.ended.wait(_END_S)
                if left == 0 or not may_go_better(error):
                    raise
                left -= 1
                _log.warning("%s Starting again; %d more times at most.", error, left)
            ray.get(board.take.remote())  # what else the ended workers said of the same fault


def may_go_better(error: BaseException) -> bool:
    """Whether the same work, begun again at the last checkpoint, may end otherwise.

    So it is after a death (of a worker or of a loader process) and where a disk or an object store did not answer; a
    corrupt sample, a missing file and a wrong setting would be met again.
    """
    if type(error) in (RaysemiError, DataFailure, CheckpointFailure):
        return True
    mistake = FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError
    cause = error.__cause__
    return type(error) is DataError and isinstance(cause, OSError) and not isinstance(cause, mistake)


def _trainer(config: RunConfig, settings: RayConfig, cluster: Cluster, work: dict[str, Any], folder: str) -> Any:
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    for name in ("ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    gpu = settings.use_gpu is True
    scaling = train.ScalingConfig(
        num_workers=settings.num_workers,
        use_gpu=gpu,
        resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if gpu else {}),
    )
    storage = settings.storage or (folder if cluster.here else f"{config.run.rstrip('/')}/ray")
    run = train.RunConfig(
        # Ours are the checkpoints, so each launch is a new run to Ray Train.
        name=f"raysemi-{int(time.time())}-{secrets.token_hex(4)}",
        storage_path=storage,
        # Starting again is done here: Ray Train would also repeat what cannot go better, such as a corrupt sample.
        failure_config=train.FailureConfig(max_failures=0),
    )
    backend = TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S)
    worker: Any = _worker  # Train's annotation knows no return value; its documentation does
    return TorchTrainer(worker, train_loop_config=work, torch_config=backend, scaling_config=scaling, run_config=run)


class _Outcome(threading.Thread):
    """`trainer.fit()` beside the main thread, which shows progress and hears Ctrl-C."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.ended = threading.Event()
        """To wait for: Python 3.11 takes a thread for ended whose `join` a signal's exception interrupts."""
        self.value: dict[str, Any] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.value = self._trainer.fit().return_value or {}
        except Exception as error:  # judged in the main thread
            self.error = error
        finally:
            self.ended.set()


def _one_line(error: Exception) -> RaysemiError:
    """The error that a user should read, out of Ray Train's."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(failure, RaysemiError):
            return failure
    for rank, failure in failures.items():
        if not type(failure).__module__.startswith("ray."):  # a death, as Ray tells it, has no trace worth reading
            _log.error("rank %d: %s", rank, "".join(traceback.format_exception(failure)).strip())
    what = "; ".join(f"rank {rank}: {type(failure).__name__}: {failure}" for rank, failure in failures.items())
    first = (what or f"{type(error).__name__}: {error}").splitlines()[0]
    return RaysemiError(f"workers must stay alive; got {first}. The run folder holds the last checkpoint.")


def _refuse_relative_paths(config: RunConfig) -> None:
    paths: list[tuple[str, str | None]] = [
        ("run", config.run),
        ("data.labeled", config.data.labeled),
        ("data.val", config.data.val),
    ]
    paths += [("data.unlabeled", path) for path in config.data.unlabeled_pools]
    refuse_relative_paths(paths)


def _worker(work: dict[str, Any]) -> dict[str, Any]:
    """What each of Ray's workers does."""
    import ray
    import torch
    from ray import train

    from raysemi.launch.worker import run

    board, rank = work["board"], train.get_context().get_world_rank()
    ray.get(board.join.remote(ray.get_runtime_context().current_actor))
    if Path(work["folder"]).is_dir():
        os.chdir(work["folder"])
    config = config_io.parse(work["config"])
    assert isinstance(config.ray, RayConfig)  # `none` never comes here
    torch.set_num_threads(int(config.ray.cpus_per_worker))

    def on_log(step: int, metrics: dict[str, float]) -> None:
        if rank == 0:
            board.put.remote("metrics", step, metrics)
        # Train hands reports on every half second and holds the worker meanwhile: evaluations only, on every rank.
        if "eval/miou" in metrics:
            train.report({"step": step, **metrics})

    handler, logger = ToBoard(board, rank), logging.getLogger("raysemi")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        return run(config, on_log)
    except RaysemiError as error:
        ray.get(post_fault(board, error))
        raise
    finally:
        logger.removeHandler(handler)
