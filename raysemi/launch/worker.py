"""What every rank does, wherever it was started (Ray Train, torchrun or one plain process): config -> finished run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raysemi import config_io
from raysemi.config import RunConfig, check_world
from raysemi.data.joined import AnyPool
from raysemi.data.loader import Stream
from raysemi.data.mixture import passes
from raysemi.data.reader import Skipped
from raysemi.data.skips import Skips
from raysemi.data.store import StoreConfig
from raysemi.engine import checkpoint, distributed, retention
from raysemi.engine.evaluate import evaluate
from raysemi.engine.folder import RunFolder
from raysemi.engine.guards import Guards
from raysemi.engine.record import Record
from raysemi.engine.saver import Saver
from raysemi.engine.trackers import Trackers
from raysemi.engine.trainer import Hooks, Trainer, resolve_period
from raysemi.engine.watchdog import Watchdog
from raysemi.errors import CheckpointError, RaysemiError
from raysemi.launch.logs import stand
from raysemi.launch.pictures import look_around
from raysemi.launch.progress import Progress
from raysemi.launch.restore import build, open_pools, refuse_another_run, tell_finished
from raysemi.launch.room import one_line_without_room, tell_footprint
from raysemi.launch.stop import Stopped, StopVote, graceful_stop
from raysemi.methods.base import AcrossRanks
from raysemi.ops.confusion import iou, mean_iou, pixel_accuracy

_log = logging.getLogger(__name__)
SKIPPED_FILE = "skipped.json"
"""Of the run folder: corrupt samples that any rank has passed over."""
OnLog = Callable[[int, dict[str, float]], None]


def run(
    config: RunConfig,
    on_log: OnLog | None = None,
    *,
    asked: Callable[[], bool] | None = None,
    last_words: Callable[[RaysemiError], None] | None = None,
) -> dict[str, Any]:
    """Trains, or goes on training, until `train.steps` or `train.stop_at`; called by every rank.

    Args:
        config: the resolved config, the same on every rank.
        on_log: (steps done, metrics), called on every rank equally often.
        asked: whether the launcher wants the run to end early, with a checkpoint; called on every rank equally often.
        last_words: takes the error of a process that hangs, before it ends.

    Returns:
        The fields of `result.json`; empty when the run ended before its first evaluation.

    Raises:
        ConfigError, DataError, CheckpointError: one line each, before a step is taken where possible.
        TrainingError: too many steps were skipped; a checkpoint is written.
        RaysemiError: another rank is gone.
        Stopped: a KeyboardInterrupt; after Ctrl-C, SIGTERM or when `asked`, with a checkpoint written.
    """
    across = distributed.join(config.train.hang_after_s)
    stand(run=config.run, rank=across.rank, step=None)
    device = distributed.local_device(accelerator=config.ray == "none" or config.ray.use_gpu is not False)
    check_world(config, across.world, gpu=device.type == "cuda")
    way = "Use a smaller network, or train.strategy=deepspeed on several ranks"
    try:
        with (
            Watchdog(RunFolder(config.run), across.rank, config.train.hang_after_s, last_words) as watchdog,
            one_line_without_room(config, across, device, lambda: "the networks", way),
        ):
            result = _Run(config, across, device, on_log, asked, watchdog).go()
    except RuntimeError as error:
        if isinstance(error, RaysemiError) or not distributed.lost_rank(error):
            raise
        first = str(error).splitlines()[0]
        raise RaysemiError(
            f"workers must stay alive; got rank {across.rank}: it lost another one ({first}). The run folder holds the "
            "last checkpoint: the same command goes on."
        ) from error
    distributed.leave_at_exit()
    return result


class _Run:
    """One rank's part of a run: the trainer between its pools and its folder."""

    def __init__(
        self,
        config: RunConfig,
        across: AcrossRanks,
        device: torch.device,
        on_log: OnLog | None,
        asked: Callable[[], bool] | None,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.across = across
        self.on_log = on_log
        self.asked = asked
        self.watchdog = watchdog
        self.folder = RunFolder(config.run, StoreConfig(deadline=config.data.store.deadline))
        refuse_another_run(config)
        pools = open_pools(config)
        self.labeled, self.val, self.unlabeled, self.boxes = pools.labeled, pools.val, pools.unlabeled, pools.boxes
        self._snapshot = checkpoint.load_newest(self.folder)
        student, method = build(config, len(self.labeled.classes), untrained=self._snapshot is not None)
        self.method = method
        first = self.unlabeled or self.labeled
        batch = config.train.batch
        pass_steps = first.num_samples // (batch.unlabeled if self.unlabeled else batch.labeled)
        period = resolve_period(config.train, pass_steps)
        if config.train.steps // period < 10 and across.rank == 0:
            message = "train.steps=%d holds only %d periods of %d steps; ramps and momentum networks want 10 or more"
            _log.warning(message, config.train.steps, config.train.steps // period, period)
        if across.rank == 0:
            tell_footprint(config, student, method, across.world, device, joined=self.unlabeled is not None)
        self.trainer = Trainer(
            student, method, config.train, config.optim,
            across=across, device=device, period=period, seed=config.seed, gradients=config.gradients,
        )  # fmt: skip
        self.seconds = 0.0
        self.record: Record | None = None
        self.trackers: Trackers | None = None
        self.progress: Progress | None = None
        self.guards: Guards
        self._saver: Saver
        self.skips = Skips(config.data.corrupt_limit)
        self.result: dict[str, Any] = {}
        self._clock = time.perf_counter()
        self._best_step: int | None = None
        self._best_miou = float("-inf")

    def go(self) -> dict[str, Any]:
        saver = self._saver = self._resume()
        config, trainer = self.config, self.trainer
        stand(step=trainer.step)
        until = min(config.train.steps, config.train.stop_at or config.train.steps)
        if self.across.rank == 0:
            self.record = Record(self.folder, trainer.step)
            self.progress = Progress(self.folder, trainer.step)
        warn = _log.warning if self.across.rank == 0 else None
        self.guards = Guards(config.train.guards, trainer.step, config.train.steps, warn)
        if trainer.step < until:
            self._announce_passes()
            with self._tracked(), graceful_stop() as signalled, saver:
                hooks = Hooks(
                    self._log_training, self._evaluate, self._save, self._should_stop_after(signalled), self._sample
                )
                with one_line_without_room(config, self.across, trainer.device, lambda: f"step {trainer.step + 1}"):
                    finished = trainer.fit(self._stream(trainer.step, until), hooks, config.eval.every)
            if not finished and trainer.step < until:
                raise Stopped
        else:
            tell_finished(trainer.step, until)
        if self.record is not None:
            self.record.close()
        if self.progress is not None:
            self.progress.end(trainer.step)
        distributed.barrier(self.across)
        return self.result

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """Tells the trackers that the config asks for how this launch ended, however that is."""
        if self.across.rank != 0:
            yield
            return
        self.trackers = Trackers(self.config.log, self.folder, self.config.model_dump(mode="json"))
        try:
            yield
        finally:
            self.trackers.end(self.result, finished=self.trainer.step == self.config.train.steps)

    def _should_stop_after(self, signalled: Callable[[], bool]) -> Callable[[], bool]:
        """What the trainer asks after each step."""
        vote = StopVote(self.across, self.trainer.device, signalled, self.asked)

        def should_stop() -> bool:
            self.watchdog.beat(self.trainer.step)
            stand(step=self.trainer.step)
            if self.progress is not None and (lost := self.progress.first_step()) is not None:
                message = "went on %.1f s after the last step before; %d steps were lost and are done again"
                _log.info(message, lost.seconds, lost.steps)
                self._sample(self.trainer.step, {"run/lost_steps": lost.steps, "run/lost_s": lost.seconds})
            return vote()

        return should_stop

    def _stream(self, start: int, stop: int, *, truth: bool = False, seed: int | None = None) -> Stream:
        method, batch = self.method, self.config.train.batch
        return Stream(
            self.config.data,
            self.pools,
            seed=self.config.seed if seed is None else seed,
            batch_labeled=batch.labeled,
            batch_unlabeled=batch.unlabeled,
            rank=self.across.rank,
            world=self.across.world,
            strong_views=method.strong_views,
            second_view=method.second_view,
            start=start,
            stop=stop,
            with_truth=truth,
            given=method.given,
            cores=torch.get_num_threads(),
            pinned=self.trainer.device.type == "cuda",
            strong=method.strong,
            boxes=self.boxes,
            skips=self.skips,
        )

    def _resume(self) -> Saver:
        """Goes on from the newest whole checkpoint; what will save the next ones."""
        text = config_io.dump(self.config)
        snapshot, self._snapshot = self._snapshot, None
        best_miou = retention.best_miou(self.folder)
        self._agree_on(0 if snapshot is None else snapshot.step)
        distributed.barrier(self.across)  # every rank has read the folder before rank 0 writes to it
        if snapshot is not None:
            if snapshot.state["digests"] != self._digests():
                raise CheckpointError(
                    f"{self.config.run} must go on with the pools and boxes that it began with; got other "
                    "digests. Restore them, or give another run folder."
                )
            self.trainer.restore(snapshot)
            self.seconds = snapshot.state["seconds"]
            self.skips.restore(snapshot.state.get("skipped", []))
            if self.folder.exists("result.json"):
                self.result = json.loads(self.folder.read_bytes("result.json"))
            self._best_miou = best_miou
            own = snapshot.state.get("best_miou")
            if own is not None and own > best_miou:  # killed before best.json could name this checkpoint
                self._best_miou = own
                if self.across.rank == 0:
                    retention.mark_best(self.folder, snapshot.step, own)
            _log.info("going on from step %d", self.trainer.step)
        if self.across.rank == 0:
            self.folder.write_bytes("config.yaml", text.encode())
        return Saver(self.folder, self.across, self.trainer.device, self.config.train.keep)

    def _agree_on(self, step: int) -> None:
        """Refuses, on all ranks, that each goes on from another step."""
        both = torch.tensor([step, -step], device=self.trainer.device)
        last, first = (self.across.max(both) * torch.tensor([1, -1], device=both.device)).tolist()
        if first != last:
            raise CheckpointError(
                f"run must name one folder that all ranks share; got {self.config.run} with a newest whole checkpoint "
                f"at step {first} on one rank and {last} on another. Give a shared folder or an object store, or "
                "remove the checkpoints that the log names."
            )

    def _agree_on_skips(self) -> None:
        """Tells every rank what the others have skipped since the last time, and stops all of them when it is too much.

        Called at each log line and checkpoint, so that no step pays for it; texts travel only when there are some.
        """
        if self.config.data.on_corrupt != "skip":
            return
        untold = self.skips.untold()
        if float(self.across.max(torch.tensor(float(len(untold)), device=self.trainer.device))):
            told = distributed.gather([json.dumps(sample) for sample in untold], self.across)
            self.skips.add((Skipped(*json.loads(text)) for text in told), log=False)
            if self.across.rank == 0:
                self.folder.write_bytes(SKIPPED_FILE, json.dumps(self.skips.as_rows(), indent=1).encode())
        self.skips.check()

    @property
    def _batches(self) -> dict[str, int]:
        batch = self.config.train.batch
        return {"labeled": batch.labeled, "unlabeled": batch.unlabeled}

    def _passes(self, step: int) -> dict[str, list[tuple[str, float]]]:
        """How often the images of each pool have been seen: `labeled` and `unlabeled` -> (path, passes)."""
        return {name: passes(pool, self._batches[name], step) for name, pool in self.pools.items()}

    def _announce_passes(self) -> None:
        if self.across.rank == 0:
            steps = self.config.train.steps
            each = [f"{done:.3g} of {path}" for found in self._passes(steps).values() for path, done in found]
            _log.info("%d steps are passes: %s", steps, ", ".join(each))

    @property
    def pools(self) -> dict[str, AnyPool]:
        """The pools that train, by name."""
        pools = {"labeled": self.labeled, "unlabeled": self.unlabeled}
        return {name: pool for name, pool in pools.items() if pool is not None}

    def _digests(self) -> dict[str, str]:
        boxes = {} if self.boxes is None else {"boxes": self.boxes.digest}
        return {name: pool.digest for name, pool in self.pools.items()} | boxes

    def _log_training(self, step: int, metrics: dict[str, float]) -> None:
        """What the trainer has measured, how often the pools have been seen, and how much of them was skipped."""
        self._saver.check()
        self._agree_on_skips()
        self.guards.training(step, metrics)
        if self.progress is not None:
            self.progress.note(step)
        seen = {"checkpoint/age_s": self._saver.age_s()}
        if self.config.data.on_corrupt == "skip":
            seen["data/skipped"] = float(len(self.skips))
        for name, found in self._passes(step).items():
            seen[f"data/{name}_passes"] = step * self._batches[name] / self.pools[name].num_samples
            if len(found) > 1:
                seen |= {f"data/{name}_passes/{number}": done for number, (_, done) in enumerate(found)}
        self._log(step, metrics | seen)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.config.train.steps and metrics.get("method/remembered_unlabeled") == 0 and not self.across.rank:
            message = (
                "weighting.%s: no unlabeled pixel was remembered; the prototypes are those of labeled pixels alone"
            )
            _log.warning(message, "unlabeled" if self.boxes is None else "detector")
        if self.record is not None:
            self.record.write(step, metrics)
        if self.trackers is not None:
            self.trackers.write(step, metrics)
        if self.on_log is not None:
            self.on_log(step, metrics)

    def _sample(self, step: int, values: dict[str, float]) -> None:
        if self.record is not None:
            self.record.write(step, values)

    def _save(self, step: int) -> None:
        self._agree_on_skips()
        self.watchdog.beat()
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        best = self._best_miou if self._best_step == step else None
        snapshot = self.trainer.snapshot()  # of all ranks: each may hold a part of it
        snapshot.state |= {
            "seconds": self.seconds,
            "seed": self.config.seed,
            "digests": self._digests(),
            "skipped": self.skips.as_rows(),
            "classes": list(self.labeled.classes),
            "palette": [list(colour) for colour in self.labeled.palette],
            "best_miou": best,
        }
        if self.record is not None:
            self.record.flush()  # before the checkpoint: who goes on from it has the numbers up to it
        self._saver.save(snapshot, best)
        if self.record is not None:
            self.record.write(step, {"checkpoint/stopped_s": time.perf_counter() - now})
        self.watchdog.beat()

    def _evaluate(self, step: int) -> bool:
        """Measures the averaged network, at the end the student too; True when it is the best so far."""
        trainer, classes = self.trainer, self.labeled.classes
        metrics: dict[str, float] = {}

        def measure(network: Any, at_most: int | None = None) -> torch.Tensor:
            return evaluate(
                network, self.val, self.config.eval, self.across, trainer.device,
                precision=trainer.precision, progress=lambda done, total: self.watchdog.beat(), at_most=at_most,
            )  # fmt: skip

        way = "Lower eval.batch, or set eval.mode=sliding_window and eval.window"
        with one_line_without_room(self.config, self.across, trainer.device, lambda: "an evaluation", way):
            matrix = measure(trainer.evaluated)
        miou = 100.0 * float(mean_iou(matrix))
        per_class = {name: 100.0 * float(value) for name, value in zip(classes, iou(matrix), strict=True)}
        accuracy = 100.0 * float(pixel_accuracy(matrix))
        metrics |= {"eval/miou": miou, "eval/pixel_accuracy": accuracy}
        metrics |= {f"eval/iou/{name}": value for name, value in per_class.items()}
        behind = None
        if trainer.evaluated is not trainer.student:
            if step == self.config.train.steps:
                metrics["eval/student_miou"] = 100.0 * float(mean_iou(measure(trainer.student)))
                behind = metrics["eval/student_miou"] - miou
            elif images := self.config.train.guards.images:
                both = (measure(network, images) for network in (trainer.student, trainer.evaluated))
                student, averaged = (100.0 * float(mean_iou(found)) for found in both)
                behind = metrics["eval/average_behind"] = student - averaged
        self.guards.evaluation(step, matrix, classes, behind)
        looked_at = self._unlabeled_to_look_at()
        metrics |= look_around(trainer, looked_at, self.val, self.config.eval, self.across, self.folder)
        self.watchdog.beat()
        self.result = {
            "method": self.config.method.name,
            "miou": miou,
            "iou": per_class,
            "pixel_accuracy": accuracy,
            "steps": step,
            "labeled": self.labeled.num_samples,
            "unlabeled": self.unlabeled.num_samples if self.unlabeled is not None else 0,
            "seconds": self.seconds + time.perf_counter() - self._clock,
        }
        if self.across.rank == 0:
            confusion = {"classes": classes, "palette": self.labeled.palette, "matrix": matrix.tolist()}
            self.folder.write_bytes("evaluation/confusion.json", json.dumps(confusion).encode())
            self.folder.write_bytes("result.json", json.dumps(self.result, indent=1).encode())
        self._log(step, metrics)
        best = miou > self._best_miou
        if best:
            self._best_miou, self._best_step = miou, step
        return best

    def _unlabeled_to_look_at(self) -> Stream | None:
        settings = self.config.eval
        wanted = max(settings.pseudo_images, settings.pictures)
        if self.unlabeled is None or not wanted:
            return None
        steps = -(-wanted // self.config.train.batch.unlabeled)
        # The seed is the run's own plus one: views that the run itself does not train on at its first steps.
        return self._stream(0, steps, truth=settings.pseudo_images > 0, seed=self.config.seed + 1)
