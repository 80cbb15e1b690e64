"""A sweep from its start to its end, and on from wherever it stands."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raysemi import config_io
from raysemi.config import RayConfig, RunConfig
from raysemi.config_shares import uses_unlabeled
from raysemi.errors import ConfigError, RaysemiError
from raysemi.launch.cluster import Cluster, connected, cores, ctrl_c_wins, refuse_relative_paths
from raysemi.tune import checks
from raysemi.tune.show import Watch
from raysemi.tune.spaces import Draw, Space
from raysemi.tune.storage import answering
from raysemi.tune.study import FILE, Study, begun, best_of, best_of_each, differences, only_driver
from raysemi.tune.sweep import SweepConfig, dump

_log = logging.getLogger(__name__)
_NEVER = 10**6
"""More trials than a sweep has: the searcher says when it is over."""


def prepare(sweep: SweepConfig, folder: Path, address: str | None = None) -> Space:
    """Tries a sweep out without starting anything.

    Raises:
        ConfigError: everything that is wrong with it, or with the folder.
        DataError: a pool that cannot be read.
    """
    if faults := [*_wrong_folder(folder), *_too_wide(sweep, address)]:
        raise ConfigError(faults)
    earlier = begun(folder)
    if earlier is not None and (changed := differences(earlier, sweep)):
        raise ConfigError(
            f"--out must be a folder of this sweep or a new one; got {folder}, whose sweep differs in "
            f"{', '.join(changed)}. Give another folder, or undo the change to go on."
        )
    return checks.build(sweep)


def _wrong_folder(folder: Path) -> Iterator[str]:
    if re.match(r"\w+:/", str(folder)):
        yield (
            f"--out must be a local or shared folder; got {folder}, a URL. Give a folder, and runs=URL for the trials' "
            "run folders."
        )
    elif next(part for part in (folder, *folder.absolute().parents) if part.exists()).is_file():
        yield f"--out must be a folder; got {folder}, a file or below one. Give another."


def _too_wide(sweep: SweepConfig, address: str | None) -> Iterator[str]:
    """A trial that a machine of its own has no cores for; a cluster says itself what it has."""
    if (address or os.environ.get("RAY_ADDRESS", "local")) == "local" and sweep.resources.cpus > cores():
        yield (
            f"resources.cpus must be at most this machine's cores, {cores()}; got {sweep.resources.cpus}. Lower it, or "
            "join a cluster (--ray)."
        )


def run(sweep: SweepConfig, space: Space, folder: Path, address: str | None = None) -> None:
    """Runs what is not done yet: the trials, then the repeats.

    Args:
        sweep: from `sweep.load`.
        space: from `prepare`.
        folder: of the sweep; several machines share it.
        address: Ray cluster to join; None: that of RAY_ADDRESS, else a new one on this machine.

    Raises:
        CheckpointFailure: its database does not answer, or no more.
        KeyboardInterrupt: after Ctrl-C; the same command goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with only_driver(folder), answering(sweep):
        (folder / FILE).write_text(dump(sweep), encoding="utf-8")
        with (
            contextlib.closing(Study(sweep, space, folder)) as study,
            contextlib.closing(Study(sweep, space, folder, "repeats")) as repeats,
            _on_ray(sweep, folder, space, address) as cluster,
            ctrl_c_wins() as pressed,
        ):
            limit = _plan(study)
            _go(study, limit, cluster, pressed.is_set)
            if sweep.repeat.seeds and sweep.search.name != "grid":
                _go(repeats, _plan_repeats(repeats, study), cluster, pressed.is_set)


def _plan(study: Study) -> int:
    """Enqueues what is known beforehand; returns how many trials there are to be."""
    sweep, space = study.sweep, study.space
    if sweep.search.name == "grid":
        for seed in space.seeds:
            for label, draw in space.grid:
                study.enqueue(draw, seed, label=label)
        return len(space.grid) * len(space.seeds)
    if sweep.search.defaults_first and 2 * len(space.bases) <= sweep.search.trials:
        for cell in space.bases:
            study.enqueue(Draw(cell, {}), space.seeds[0], label=f"{cell}: the recipe")
    return sweep.search.trials


def _plan_repeats(repeats: Study, study: Study) -> int:
    """Enqueues the best trials and their recipes, on seeds of their own."""
    repeat = study.sweep.repeat
    first = max(study.space.seeds) + 1
    chosen = (best_of_each if repeat.of == "method" else best_of)(study.history(), repeat.best)
    for seed in range(first, first + repeat.seeds):
        for trial in chosen:
            repeats.enqueue(trial.draw, seed, of=trial.number)
            if repeat.defaults and trial.draw.settings:
                repeats.enqueue(Draw(trial.draw.cell, {}), seed, of=-1)
    return repeats.num("waiting", "running", "finished", "pruned", "failed")


def _go(study: Study, limit: int, cluster: Cluster, pressed: Callable[[], bool]) -> None:
    """Runs a study's trials until there are `limit`."""
    from ray import tune

    from raysemi.tune.search import Clock, Hours, Search, scheduler
    from raysemi.tune.trial import train

    if study.num("finished", "pruned", "failed") >= limit:
        return
    sweep, resources = study.sweep, study.sweep.resources
    clock = Clock(study.folder)
    if sweep.search.hours is not None and clock.spent_s > sweep.search.hours * 3600.0:
        _log.warning("search.hours=%g are over; raise it to go on.", sweep.search.hours)
        return
    search = Search(study, lambda trial: _work(study, trial), limit)
    config = study.space.config(Draw(next(iter(study.space.bases)), {}), "run=run")
    pruning = scheduler(sweep.prune, study, config.train.steps, config.eval.every) if study.name == "trials" else None
    each = {"CPU": float(resources.cpus), **({"GPU": resources.gpus} if resources.gpus else {})}
    if resources.workers > 1:
        each = {"memory": _WATCHER_BYTES}  # the workers ask for their own cores
    with tempfile.TemporaryDirectory(prefix="raysemi-tune-") as own, Watch(study, limit) as watch:
        tuner = tune.Tuner(
            tune.with_resources(train, each),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=pruning,
                num_samples=_NEVER,
                max_concurrent_trials=_concurrent(sweep),
                reuse_actors=resources.workers == 1,
            ),
            run_config=tune.RunConfig(
                # Tune's own files say nothing that the study does not.
                name=study.name,
                storage_path=own if cluster.here else str(study.folder / "ray"),
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
                callbacks=[watch],
                stop=Hours(search, clock, sweep.search.hours),
                verbose=0,
            ),
        )
        tuner.fit()
    clock.note(now=True)
    if pressed():
        raise KeyboardInterrupt


_WATCHER_BYTES = float(300 << 20)
"""Of a trial's process that waits for its workers. A share of a core would leave one too few for the last of them."""


def _work(study: Study, trial: Any) -> dict[str, Any]:
    """What `trial.train` is given."""
    resources = study.sweep.resources
    draw = study.draw(trial)
    several = resources.workers > 1
    gpu = resources.gpus > 0
    ray = f"{{num_workers: {resources.workers}, cpus_per_worker: {resources.cpus}, use_gpu: {json.dumps(gpu)}}}"
    own = [
        f"run={json.dumps(study.run_folder(trial.number))}",
        f"seed={trial.user_attrs['seed']}",
        f"ray={ray if several else 'none'}",
    ]
    work: dict[str, Any] = {
        "number": trial.number,
        "begun": time.time(),
        "hours": trial.user_attrs.get("hours", 0.0),
        "threads": resources.cpus,
        "devices": resources.workers * (resources.gpus or resources.cpus),
    }
    try:
        return {**work, "config": config_io.dump(study.space.config(draw, *own))}
    except ConfigError as error:
        return {**work, "refused": " ".join(error.faults)}


def _concurrent(sweep: SweepConfig) -> int:
    """Trials at a time: what the cluster has room for. Tune itself would start a driver for each trial."""
    import ray

    resources, has = sweep.resources, ray.cluster_resources()
    room = int(has.get("CPU", 0) / (resources.cpus * resources.workers))
    if resources.gpus:
        room = min(room, int(has.get("GPU", 0) / (resources.gpus * resources.workers)))
    if room < 1:
        raise RaysemiError(
            f"resources must fit the cluster; got a trial of {resources.workers} workers with {resources.cpus} CPU "
            f"cores and {resources.gpus:g} GPUs each, and a cluster with {has.get('CPU', 0):g} and "
            f"{has.get('GPU', 0):g}. Lower them."
        )
    return min(room, resources.concurrent or room)


@contextlib.contextmanager
def _on_ray(sweep: SweepConfig, folder: Path, space: Space, address: str | None) -> Iterator[Cluster]:
    resources = sweep.resources
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the config are the user's
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # its own would end running trials, which are to go on later
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that fails at once has no mIoU
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the watch shows what there is to see
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # each run writes its own
    # A reused process is given time to end a run that was stopped in the middle.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config = RayConfig(num_workers=resources.workers, cpus_per_worker=resources.cpus, address=address)
    # Ray frees the workers of a trial that was stopped by a question to its dashboard.
    with connected(config, dashboard=resources.workers > 1) as cluster:
        if not cluster.here:
            configs = [space.config(Draw(cell, {}), "run=run") for cell in space.bases]
            refuse_relative_paths(
                [("runs", sweep.runs or str(folder)), *(pair for config in configs for pair in _pools(config))]
            )
        yield cluster


def _pools(config: RunConfig) -> Iterator[tuple[str, str | None]]:
    yield from (("data.labeled", config.data.labeled), ("data.val", config.data.val))
    if uses_unlabeled(config.method, config.data):
        yield from (("data.unlabeled", path) for path in config.data.unlabeled_pools)
