"""RunConfig -> a finished run: on Ray Train's workers, as a rank of torchrun, or in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from raysemi import config_io
from raysemi.config import RayConfig, RunConfig, check_world, fitting_workers
from raysemi.engine import distributed
from raysemi.errors import CheckpointFailure, ConfigError, DataError, DataFailure, RaysemiError
from raysemi.launch.alone import alone_in
from raysemi.launch.board import Board, OnLog, ToBoard, post_fault, relay
from raysemi.launch.cluster import Cluster, connected, ctrl_c_wins, refuse_relative_paths, worker_resources
from raysemi.launch.logs import stand
from raysemi.launch.metrics import Exporter
from raysemi.launch.restore import finished, open_pools, refuse_another_run
from raysemi.launch.stop import Stopped, Terminated, sigterm

_log = logging.getLogger(__name__)

_POLL_S = 0.3
_STOPPED = "stopped"
"""In a worker's answer: it ended early, with a checkpoint."""
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
        ConfigError, DataError, CheckpointError: as they were raised on the worker; another launch writes the run.
        RaysemiError: workers failed more often than `ray.max_failures` allows.
        KeyboardInterrupt: after Ctrl-C; the run folder holds the last checkpoint.
    """
    stand(run=config.run, rank=None, step=None)
    if faults := config.log.faults():
        raise ConfigError(faults)
    if isinstance(config.ray, RayConfig):
        if config.ray.address is None and "RAY_ADDRESS" not in os.environ:
            # Workers look too; but they take a while to start, and a mistake should be told at once.
            open_pools(config)
            refuse_another_run(config)
        if (result := finished(config)) is not None:
            return result
        with _alone(config), ctrl_c_wins() as pressed:
            return _on_ray(config, config.ray, on_log, pressed)
    from raysemi.launch.worker import run

    with _alone(config):
        return run(config, on_log)


def _alone(config: RunConfig) -> AbstractContextManager[None]:
    """Keeps other launches out of a run that this machine trains, and this process stands for.

    Elsewhere, as in a sweep's trial, the lock would be that of a node, which may vanish and, on a shared disk, keep it
    for minutes.
    """
    known = os.environ
    elsewhere = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if isinstance(config.ray, RayConfig):
        elsewhere |= config.ray.address is not None or "RAY_ADDRESS" in known
    else:  # of torchrun's ranks the first, and not where they are spread over nodes
        world = known.get("WORLD_SIZE")
        elsewhere |= known.get("RANK", "0") != "0" or known.get("LOCAL_WORLD_SIZE", world) != world
    return contextlib.nullcontext() if elsewhere else alone_in(config.run)


def _on_ray(config: RunConfig, settings: RayConfig, on_log: OnLog | None, pressed: threading.Event) -> dict[str, Any]:
    _set_environment(config, settings)
    with connected(settings) as cluster, tempfile.TemporaryDirectory(prefix="raysemi-ray-") as folder:
        if not isinstance(settings.num_workers, int) and not cluster.own:
            cluster = replace(cluster, here=False)  # what is one machine now may be more later
        if not cluster.here:
            _refuse_relative_paths(config)
        cpus, gpu = worker_resources(settings, cluster)
        for world in {settings.min_workers, settings.max_workers}:
            check_world(config, world, gpu=gpu)
        settings = settings.model_copy(update={"use_gpu": gpu, "cpus_per_worker": cpus})
        config = config.model_copy(update={"ray": settings})
        work = {"config": config_io.dump(config), "folder": str(Path.cwd()), "watched": not cluster.own}
        reached, budget = _Reached(Exporter(config), on_log), Budget(settings.max_failures)
        with sigterm() as terminated:
            while True:
                board = _board()
                outcome = _Outcome(_trainer(config, settings, cluster, work | {"board": board}, folder))
                try:
                    value = _follow(outcome, board, reached, settings, pressed, terminated)
                    if not value.pop(_STOPPED, False):
                        return value
                    if terminated.since is not None:
                        raise KeyboardInterrupt
                except BaseException as error:
                    _end(outcome, board)
                    if not may_go_better(error):
                        raise
                    left = budget.spend(reached.step, free=taken_back(outcome.error))
                    if left < 0:
                        raise
                    reached.exporter.restarted()
                    _log.warning("%s Starting again; %d more times at most without getting further.", error, left)


def _board() -> Any:
    """A board beside the driver, as Ray Train's controller is: the nodes of workers may go."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board)
    return actor.remote()


def _follow(
    outcome: _Outcome,
    board: Any,
    reached: _Reached,
    settings: RayConfig,
    pressed: threading.Event,
    terminated: Terminated,
) -> dict[str, Any]:
    """Starts the workers and hands on what they say, until they have ended; what the first of them returned."""
    import ray

    outcome.start()
    asked = False
    try:
        while not outcome.ended.is_set():
            relay(ray.get(board.take.remote()), reached)
            reached.exporter.refresh()
            if pressed.is_set() or terminated.late:
                raise KeyboardInterrupt
            if terminated.since is not None and not asked:
                asked = True
                board.ask.remote("SIGTERM")
            outcome.ended.wait(_POLL_S)
        relay(ray.get(board.take.remote()), reached)
    except ray.exceptions.RayError as error:
        raise RaysemiError(
            f"Ray must keep the driver's own actor alive; got {type(error).__name__}. The run folder holds the last "
            "checkpoint."
        ) from error
    if outcome.error is not None:
        raise _one_line(outcome.error, settings) from outcome.error
    return outcome.value


def _end(outcome: _Outcome, board: Any) -> None:
    """Ends the workers, and waits until Ray Train knows."""
    import ray

    with contextlib.suppress(Exception):  # a terminal's Ctrl-C may have ended the board already
        for worker in ray.get(board.workers.remote()):  # on a notebook's cluster nothing else ends them
            ray.kill(worker)
    # A thread that asks Ray anything once it is shut down ends the whole process, with exit code 1.
    outcome.ended.wait(_END_S)


def _set_environment(config: RunConfig, settings: RayConfig) -> None:
    """What Ray Train and its processes read there. Its own default for collectives is to wait for ever."""
    patience = config.train.hang_after_s
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(distributed.collective_timeout_s(patience))
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(600.0, patience))
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(settings.start_timeout_s)
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # a hung or dead rank never leaves its group
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon an end or an error is noticed
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the config are the user's
    if not settings.address and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away


class Budget:
    """How often workers are started again: so many times in a row without the run getting further than before.

    Args:
        limit: `ray.max_failures`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit
        self._furthest = 0

    def spend(self, step: int, *, free: bool) -> int:
        """Counts a failure.

        Args:
            step: the furthest step so far.
            free: it counts for nothing.

        Returns:
            How many more may follow without getting further; -1: this one was too many.
        """
        if step > self._furthest:
            self._left, self._furthest = self._limit, step
        self._left -= not free
        return self._left


class _Reached:
    """Hands metrics on, to Prometheus too, and remembers the furthest step."""

    def __init__(self, exporter: Exporter, on_log: OnLog | None) -> None:
        self.exporter = exporter
        self._on_log = on_log
        self.step = 0

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.step = max(self.step, step)
        stand(step=step)
        self.exporter.note(step, metrics)
        if self._on_log is not None:
            self._on_log(step, metrics)


def taken_back(error: Exception | None) -> bool:
    """Whether workers died because the cloud took their nodes, by what Ray says of it."""
    from ray import train

    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    return isinstance(error, train.PreemptionError) or any(
        getattr(failure, "preempted", False) for failure in failures.values()
    )


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
    configs: Any = train  # their annotations are those of the first version of Ray Train
    scaling = configs.ScalingConfig(
        num_workers=settings.num_workers,
        use_gpu=gpu,
        resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if gpu else {}),
        elastic_resize_monitor_interval_s=settings.resize_every_s,
    )
    storage = settings.storage or (folder if cluster.here else f"{config.run.rstrip('/')}/ray")
    run = configs.RunConfig(
        # Ours are the checkpoints, so each launch is a new run to Ray Train.
        name=f"raysemi-{int(time.time())}-{secrets.token_hex(4)}",
        storage_path=storage,
        # Starting again is done here: Ray Train would also repeat what cannot go better, such as a corrupt sample.
        failure_config=configs.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
    )
    timeout_s = round(distributed.collective_timeout_s(config.train.hang_after_s))
    backend = TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=timeout_s)
    worker: Any = _worker  # Train's annotation knows no return value; its documentation does
    all_settings: dict[str, Any] = {
        "train_loop_per_worker": worker, "train_loop_config": work, "torch_config": backend,
        "scaling_config": scaling, "run_config": run,
    }  # fmt: skip
    if isinstance(settings.num_workers, int):
        return TorchTrainer(**all_settings)
    from raysemi.launch.elastic import ElasticTrainer

    sizes = fitting_workers(config, settings, gpu=gpu)
    return ElasticTrainer(sizes=sizes, board=work["board"], start_timeout_s=settings.start_timeout_s, **all_settings)


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


def _one_line(error: Exception, ray: RayConfig) -> RaysemiError:
    """The error that a user should read, out of Ray Train's."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, RaysemiError):
        return cause
    if type(cause).__name__ == "WorkerGroupStartupTimeoutError":
        from raysemi.launch.elastic import no_room

        return RaysemiError(no_room(ray.min_workers, ray.start_timeout_s))
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

    def asked() -> bool:
        # Ray Train gives all ranks the same answer to the first; the second reaches them from rank 0.
        taken = work["watched"] and train.get_preemption_info() is not None
        return taken or (rank == 0 and ray.get(board.asked.remote()))

    def last_words(error: RaysemiError) -> None:
        ray.get(post_fault(board, error))

    handler, logger = ToBoard(board, rank), logging.getLogger("raysemi")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        return run(config, on_log, asked=asked, last_words=last_words)
    except Stopped:
        return {_STOPPED: True}
    except RaysemiError as error:
        ray.get(post_fault(board, error))
        raise
    finally:
        logger.removeHandler(handler)
