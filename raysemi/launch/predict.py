"""A run's label maps and confidences of a whole pool, as a pool: on Ray Data's workers or in this process.

Each shard of the pool is one task, which writes one shard. What is finished stays; `pool.json` comes last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs

from raysemi import errors
from raysemi.config import RayConfig, RunConfig
from raysemi.data.choose import raise_faults
from raysemi.data.pool import FORMAT_VERSION, POOL_FILE, Pool
from raysemi.data.shard import PARTS, ShardDone, ShardPlan, finish_pool
from raysemi.data.write_pool import write_whole
from raysemi.engine import distributed
from raysemi.engine.predict_shards import ShardPredictor
from raysemi.engine.trainer import resolve_precision
from raysemi.errors import ConfigError, DataError, RaysemiError
from raysemi.launch.cluster import connected, ctrl_c_wins, refuse_relative_paths, worker_resources
from raysemi.launch.restore import Trained, load_network

Progress = Callable[[int, int], None]
_PLAN = "plan.json"
_TRIED = ".tried"
_PATHS = ("run", "pool")
"""Of the notes, what may read otherwise when the same work goes on."""
_MOST_TASKS = 4096
"""Tasks that Ray Data is given at once; of a pool with more shards each takes several."""
_TRIES = 3
"""Workers that may die over one shard. Ray Data gives it to the next one for ever: nodes come and go."""


def predict_shards(
    run: str | Path,
    trained: Trained,
    config: RunConfig,
    pool: Pool,
    out: str | Path,
    *,
    min_confidence: float = 0.0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Pool:
    """Predicts every image of a pool into a pool of its own; the same call goes on with what is there.

    Args:
        run: run folder, local or URL.
        trained: what was loaded from it.
        config: its config, with the `eval.*` to use.
        pool: whose images are predicted.
        out: folder for the new pool, shared by all nodes.
        min_confidence: pixels that are less probable become 255.
        workers: of Ray, each with a GPU where there are enough; None: this process, without Ray.
        progress: told (images done, images in all).

    Returns:
        The new pool: its shards follow those of `pool`, with the same keys in the same order.

    Raises:
        ConfigError: an argument is out of range.
        DataError: `out` holds something else, or images are corrupt: all other shards are then written.
        RaysemiError: workers died again and again; finished shards stay.
        KeyboardInterrupt: after Ctrl-C; finished shards stay.
    """
    _check(config, out, min_confidence, workers)
    folder = Path(out).expanduser().absolute()
    notes = _notes(run, trained, config, pool, min_confidence)
    where = str(run) if "://" in str(run) else str(Path(run).expanduser().absolute())
    job = _Job(where, trained.step, config, pool, folder, notes["plan"], min_confidence)
    if _begin(folder, notes):
        return Pool.open(folder)
    tally = _Tally(job.numbers(), pool.num_samples, progress)
    try:
        if workers is None:
            predictor = job.predictor(trained)
            for number in tally.numbers:
                tally.add(number, job.write(predictor, number))
        else:
            with ctrl_c_wins():
                _on_ray(job, tally, workers, [("RUN", str(run)), ("--pool", pool.path), ("--out", str(out))])
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{out} has {tally}; the same command goes on with the others.") from error
    except RaysemiError as error:
        raise type(error)(f"{error}\n{out} has {tally}; run the same command again for the others.") from error
    tally.raise_faults(folder)
    finish_pool(folder, [job.plan(number) for number in tally.numbers], trained.classes, trained.palette, notes)
    return Pool.open(folder)


@dataclass(frozen=True)
class _Job:
    """What a worker must know."""

    run: str
    step: int
    config: RunConfig
    pool: Pool
    folder: Path
    plan_digest: str
    min_confidence: float
    accelerator: bool = True
    """Whether a GPU is used where there is one."""
    threads: int = 1
    """Of torch, in a worker."""

    def numbers(self) -> list[int]:
        """The shards to predict: others' may be empty."""
        return [number for number, shard in enumerate(self.pool.shard_files) if shard.samples]

    def plan(self, number: int) -> ShardPlan:
        """The shard that is written, without its entries."""
        return ShardPlan(self.folder / f"predicted-{number:06d}.tar", (), f"{self.plan_digest}/{number}")

    def predictor(self, trained: Trained) -> ShardPredictor:
        device = distributed.local_device(self.accelerator)
        return ShardPredictor(
            trained.network.to(device),
            self.pool,
            trained.classes,
            self.config.eval,
            min_confidence=self.min_confidence,
            device=device,
            precision=resolve_precision(self.config.train, device),
        )

    def write(self, predictor: ShardPredictor, number: int) -> ShardDone:
        plan = self.plan(number)
        return predictor.write(number, plan.path, plan.fingerprint)


class _Tally:
    """How far the work is."""

    def __init__(self, numbers: Sequence[int], num_samples: int, progress: Progress | None) -> None:
        self.numbers = numbers
        self._num_samples, self._progress = num_samples, progress
        self._samples = self._shards = 0
        self._faults: dict[int, tuple[str, ...]] = {}

    def add(self, number: int, done: ShardDone) -> None:
        """Notes that a shard was done, or could not be."""
        if done.faults:
            self._faults[number] = done.faults
        else:
            self._shards += 1
        self._samples += done.samples
        if self._progress is not None:
            self._progress(self._samples, self._num_samples)

    def raise_faults(self, folder: Path) -> None:
        """Raises DataError for images that could not be read."""
        texts = [text for number in sorted(self._faults) for text in self._faults[number]]
        try:
            raise_faults(texts)
        except DataError as error:
            raise DataError(
                f"{error}\nall images must be readable; got {len(texts)} that are not. {folder} has {self}, and is no "
                "pool without the others. Mend the images and predict into another folder."
            ) from error

    def __str__(self) -> str:
        return f"{self._shards} of {len(self.numbers)} shards"


def _check(config: RunConfig, out: str | Path, min_confidence: float, workers: int | None) -> None:
    faults = []
    if config.eval.mode == "center_crop":
        faults.append("eval.mode must be original or sliding_window to predict; got center_crop. Set it.")
    if "://" in str(out):
        faults.append(f"--out must be a folder, local or shared; got {out}. Copy the pool to the object store later.")
    if not 0.0 <= min_confidence <= 1.0:
        faults.append(f"--min-confidence must be from 0 to 1; got {min_confidence:g}. It is a probability.")
    if workers is not None and workers < 1:
        faults.append(f"--workers must be at least 1; got {workers}. Leave it out to do without Ray.")
    if distributed.world_from_environment() > 1:
        faults.append("--shards must run as one process; got torchrun's ranks. Use --workers instead.")
    if faults:
        raise ConfigError(faults)


def _notes(run: str | Path, trained: Trained, config: RunConfig, pool: Pool, min_confidence: float) -> dict[str, Any]:
    """How the pool is made, for `pool.json`; `plan` names what decides its bytes."""
    notes: dict[str, Any] = {
        "source": "predict",
        "run": str(run),
        "step": trained.step,
        "checkpoint": trained.digest,
        # eval.batch moves roundings alone, and a smaller one may be needed to go on
        "eval": config.eval.model_dump(include={"mode", "window", "stride", "shifted"}),
        "precision": config.train.precision,
        "min_confidence": min_confidence,
        "pool": pool.path,
        "pool_digest": pool.digest,
    }
    decide = {name: value for name, value in notes.items() if name not in _PATHS} | {"format": FORMAT_VERSION}
    return notes | {"plan": hashlib.blake2b(json.dumps(decide).encode(), digest_size=16).hexdigest()}


def _begin(folder: Path, notes: Mapping[str, Any]) -> bool:
    """Makes the folder ready; True when this very pool is there already.

    Raises:
        DataError: it holds something else, or cannot be written.
    """
    beside = folder / PARTS / _PLAN
    if (folder / POOL_FILE).exists():
        _refuse_another(folder, Pool.open(folder).made, notes)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        return True
    try:
        if beside.exists():
            _refuse_another(folder, json.loads(beside.read_bytes()), notes)
            for tried in beside.parent.glob(f"*{_TRIED}"):
                tried.unlink()
            return False
        foreign = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
        if foreign:
            raise DataError(
                f"{folder} must be empty or hold an unfinished prediction; got {foreign[0]}. Choose another --out."
            )
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_whole(fs.LocalFileSystem(), str(beside), json.dumps(notes).encode())
    except OSError as error:
        raise DataError(f"{folder} must be writable; got {error}. Choose another --out.") from error
    return False


def _refuse_another(folder: Path, made: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    if made.get("plan") == notes["plan"]:
        return
    differs = [name for name in notes if name not in (*_PATHS, "plan") and made.get(name) != notes[name]]
    what = f"one that differs in {', '.join(differs)}" if made.get("source") == notes["source"] else "another pool"
    raise DataError(
        f"{folder} must be free for this prediction; got {what}. Choose another --out or remove the folder."
    )


def _on_ray(job: _Job, tally: _Tally, workers: int, paths: Sequence[tuple[str, str]]) -> None:
    settings = RayConfig(num_workers=min(workers, len(tally.numbers)))
    with connected(settings) as cluster:
        if not cluster.here:
            refuse_relative_paths(paths)
        cpus, gpu = worker_resources(settings, cluster)
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is told below, in one line
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        with ray.data.DataContext.current(context):
            tasks = ray.data.from_items(
                [{"number": number} for number in tally.numbers],
                override_num_blocks=min(len(tally.numbers), _MOST_TASKS),
            )
            worker: Any = _Worker  # a class: Ray Data makes actors of it
            results = tasks.map(
                worker,
                fn_constructor_args=(replace(job, accelerator=gpu, threads=cpus),),
                # a shard takes long: the next one goes to whoever is free
                compute=ray.data.ActorPoolStrategy(size=settings.max_workers, max_tasks_in_flight_per_actor=1),
                num_cpus=cpus,
                num_gpus=int(gpu),
            )
            rows: Any = iter(results.iter_rows())
            try:
                with closing(rows):  # its thread must not ask Ray anything once it is shut down
                    for row in rows:
                        tally.add(*_read_result(row["result"]))
            except ray.exceptions.RayActorError as error:
                first = str(error).strip().splitlines()[0]
                raise RaysemiError(f"workers must stay alive; got {first}") from error


class _Worker:
    """One of Ray Data's actors: a network that writes a shard a call."""

    def __init__(self, job: _Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._predictor: ShardPredictor | None = None

    def __call__(self, task: dict[str, Any]) -> dict[str, str]:
        number = int(task["number"])
        try:
            tries = _count_try(self._job.plan(number))
            if self._predictor is None:
                self._predictor = self._job.predictor(load_network(self._job.run, self._job.step))
            done = self._job.write(self._predictor, number)
            tries.unlink(missing_ok=True)
        except RaysemiError as error:  # as a value: Ray would wrap it
            return {"result": json.dumps({"error": type(error).__name__, "text": str(error)})}
        return {"result": json.dumps({"number": number, "samples": done.samples, "faults": done.faults})}


def _count_try(plan: ShardPlan) -> Path:
    """Notes that a worker begins a shard, in a file that it removes at the end.

    Raises:
        RaysemiError: as many others as may die have done so, or the folder cannot be written.
    """
    path = Path(str(plan.part)).with_suffix(_TRIED)
    try:
        with path.open("ab") as file:
            if file.tell() >= _TRIES:
                raise RaysemiError(
                    f"workers must stay alive; got {_TRIES} that died over {plan.path.name}, often for lack of memory. "
                    "Use fewer --workers on a machine, or a smaller eval.batch."
                )
            file.write(b"+")
    except OSError as error:
        raise DataError(f"{plan.path.parent} must be writable on every node; got {error}. Share it.") from error
    return path


def _read_result(text: str) -> tuple[int, ShardDone]:
    """What a worker said of a shard; raises the error that it met."""
    result = json.loads(text)
    if "error" in result:
        raise getattr(errors, result["error"], RaysemiError)(result["text"])
    return result["number"], ShardDone(result["samples"], tuple(result["faults"]))
