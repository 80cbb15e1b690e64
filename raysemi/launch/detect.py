"""A detector from its config: trained into a run folder, run over a pool, checked against masks. One process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raysemi import config_io
from raysemi.data.boxes import PoolBoxes, boxes_file, mask_boxes, open_boxes, read_boxes, write_boxes
from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.engine import checkpoint, distributed, retention
from raysemi.engine.detect import (
    BoxesConfig,
    DetectConfig,
    DetectorTrainer,
    box_rows,
    precision_of,
    search_pool,
    thing_classes,
)
from raysemi.engine.evaluate import image_tensor, inference, predict_probabilities
from raysemi.engine.folder import RunFolder
from raysemi.engine.measure_boxes import BoxCounts
from raysemi.engine.record import Record
from raysemi.errors import CheckpointError, ConfigError
from raysemi.launch.alone import alone_in
from raysemi.launch.restore import MAY_CHANGE, Trained, load_network, open_pool
from raysemi.launch.stop import graceful_stop
from raysemi.launch.worker import OnLog
from raysemi.models.detector import Detections, Detector, build_detector

Progress = Callable[[int, int], None]
OF_SEARCH = tuple(f"boxes.{name}" for name in ("scale", "mirrored", "score", "accepted", "most", "batch"))
"""Settings that say how a finished detector searches: the same command with others of these changes no weight."""


def train_detector(config: DetectConfig, on_log: OnLog | None = None) -> dict[str, Any]:
    """Trains, or goes on training, until `train.steps` or `train.stop_at`.

    Args:
        config: the resolved config.
        on_log: (steps done, metrics).

    Returns:
        `steps`, and of a finished run with `data.val` the fields of `check_boxes` on it.

    Raises:
        ConfigError, DataError, CheckpointError: one line each, before a step is taken where possible; a ConfigError too
            where another launch writes the run.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint written.
    """
    folder = RunFolder(config.run)
    _refuse_another_run(config, folder)
    with alone_in(config.run):
        return _train(config, folder, on_log)


def _train(config: DetectConfig, folder: RunFolder, on_log: OnLog | None) -> dict[str, Any]:
    labeled = open_pool(config.data.labeled, "data.labeled", masks=True, store=config.data.store)
    val = open_pool(config.data.val, "data.val", masks=True, store=config.data.store) if config.data.val else None
    if val is not None and val.classes != labeled.classes:
        raise ConfigError(
            f"data.val must have the classes of data.labeled ({', '.join(labeled.classes)}); got "
            f"{', '.join(val.classes)}. Pack the pools from one source, or set data.val=null."
        )
    trainer = DetectorTrainer(config, thing_classes(config.boxes, labeled), distributed.local_device())
    state = {"digest": labeled.digest, "classes": list(labeled.classes)}
    snapshot = checkpoint.load_newest(folder)
    if snapshot is not None:
        if {name: snapshot.state[name] for name in state} != state:
            raise CheckpointError(
                f"{config.run} must go on with the pool that it began with; got another digest. Restore the pool, or "
                "give another run folder."
            )
        trainer.restore(snapshot)
    retention.sweep(folder)
    folder.write_bytes("config.yaml", config_io.dump(config).encode())
    until = min(config.train.steps, config.train.stop_at or config.train.steps)
    record = Record(folder, trainer.step)

    def log(step: int, metrics: dict[str, float]) -> None:
        record.write(step, metrics)
        if on_log is not None:
            on_log(step, metrics)

    def save(step: int) -> None:
        snapshot = trainer.snapshot()
        snapshot.state |= state
        checkpoint.save(folder, snapshot)
        retention.keep_newest(folder, config.train.keep, step)
        record.flush()

    finished = True
    if trainer.step < until:
        with graceful_stop() as should_stop:
            finished = trainer.fit(_stream(config, labeled, trainer, until), log, save, should_stop)
    record.close()
    if not finished:
        raise KeyboardInterrupt
    result: dict[str, Any] = {"steps": trainer.step}
    if val is not None and trainer.step == config.train.steps:
        boxes, device = config.boxes, trainer.device
        found = search_pool(trainer.average.model, trainer.things, val, boxes, device, precision=trainer.precision)
        result |= count(val, found, trainer.things, boxes.source_area, boxes.accepted)
    return result


def _stream(config: DetectConfig, labeled: Pool, trainer: DetectorTrainer, until: int) -> Stream:
    return Stream(
        config.data,
        {"labeled": labeled},
        seed=config.seed,
        batch_labeled=config.train.batch,
        batch_unlabeled=1,
        rank=0,
        world=1,
        strong_views=0,
        second_view=False,
        start=trainer.step,
        stop=until,
        cores=torch.get_num_threads(),
    )


def _refuse_another_run(config: DetectConfig, folder: RunFolder) -> None:
    if not folder.exists("config.yaml") or not checkpoint.steps(folder):
        return
    earlier = config_io.parse_detector(folder.read_bytes("config.yaml").decode())
    may_change = (*MAY_CHANGE, *OF_SEARCH)
    changed = [path for path in config_io.difference(earlier, config) if not path.startswith(may_change)]
    if changed:
        raise ConfigError(
            f"run must name a folder of this run or a new one; got {config.run}, whose config differs in "
            f"{', '.join(changed)}. Give another run folder, or undo the change to go on."
        )


@dataclass(frozen=True)
class TrainedDetector:
    """What a detector's run has learned so far."""

    detector: Detector
    """The averaged copy, in eval mode on the CPU."""
    config: DetectConfig
    classes: tuple[str, ...]
    """Of the pool that it learned from."""
    things: tuple[int, ...]
    """Class index of each label."""
    step: int


def load_detector(run: str) -> TrainedDetector:
    """Reads the run folder of a detector.

    Raises:
        CheckpointError: no run of a detector, or no whole checkpoint in it.
    """
    folder = RunFolder(run)
    if not folder.exists("config.yaml"):
        raise CheckpointError(
            f"{run} must be the run folder of a detector; got one without config.yaml. Give the `run` of "
            "`raysemi detect train`."
        )
    try:
        config = config_io.parse_detector(folder.read_bytes("config.yaml").decode())
    except ConfigError as error:
        raise CheckpointError(
            f"{run} must be the run folder of a detector; got another config ({error.faults[0]}) Give the `run` of "
            "`raysemi detect train`."
        ) from error
    snapshot = checkpoint.load_newest(folder)
    if snapshot is None:
        raise CheckpointError(f"{run} must hold a whole checkpoint; got none. Train it: the same command goes on.")
    classes = tuple(snapshot.state["classes"])
    names = config.boxes.classes or tuple(name for name in classes if name != "background")
    things = tuple(classes.index(name) for name in names)
    untrained = config.model.model_copy(update={"weights": "random"})  # every weight is in the checkpoint
    detector = build_detector(untrained, len(things), config.boxes.score, config.boxes.most, config.seed)
    try:
        detector.load_state_dict(snapshot.tensors["teacher"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{run}/{checkpoint.checkpoint_name(snapshot.step)} must hold weights of its own config; got others. "
            "Remove that folder and train again."
        ) from error
    return TrainedDetector(detector.eval(), config, classes, things, snapshot.step)


def search(trained: TrainedDetector, pool: Pool, progress: Progress | None = None) -> Iterator[tuple[int, Detections]]:
    """What a detector finds in the images of a pool of its classes; see `search_pool`.

    Raises:
        ConfigError: a pool of other classes.
        DataError: a sample that cannot be read.
    """
    if pool.classes != trained.classes:
        raise ConfigError(
            f"--pool must have the classes of the detector ({', '.join(trained.classes)}); got "
            f"{', '.join(pool.classes) or 'none'} in {pool.path}. Give a pool that was packed with these."
        )
    device = distributed.local_device()
    detector = trained.detector.to(device).to(memory_format=torch.channels_last).eval()
    precision = precision_of(trained.config.train, device)
    boxes = trained.config.boxes
    return search_pool(detector, trained.things, pool, boxes, device, precision=precision, progress=progress)


def run_detector(
    run: str, pool: str, name: str | None = None, score: float | None = None, progress: Progress | None = None
) -> tuple[str, int]:
    """Writes the boxes that a detector finds in a pool beside it, as `boxes-NAME.parquet`.

    The file appears whole when the last image is done: an interruption leaves what was there before, and the same
    command begins anew. Until then the boxes wait in memory, about 50 bytes each.

    Args:
        run: run folder of the detector.
        pool: labeled or not, of the detector's classes; its masks are not opened.
        name: NAME; default: the last part of `run`.
        score: least score that is stored; default: `boxes.score` of the run.
        progress: told (images done, images in all).

    Returns:
        The file's path and the number of boxes.

    Raises:
        CheckpointError, ConfigError, DataError: one line each, before an image is read where possible.
    """
    name = name if name is not None else run.rstrip("/").rpartition("/")[2]
    boxes_file(name)  # a name that cannot be is told now
    opened = open_pool(pool, "--pool")
    trained = load_detector(run)
    config = trained.config.boxes
    if score is not None and score < config.score:
        raise ConfigError(
            f"--score must be at least boxes.score of the detector, {config.score}; got {score}. Raise it."
        )
    least = config.score if score is None else score
    found = []
    for row, one in search(trained, opened, progress):
        chosen = one.scores_N >= least
        found.append(box_rows(opened.key(row), Detections(*(part[chosen] for part in one))))
    names = [trained.classes[index] for index in trained.things]
    made = {"detector": run, "step": trained.step, "things": names, "min_area": config.source_area, "score": least}
    return write_boxes(opened, name, found, made), sum(batch.num_rows for batch in found)


def check_boxes(
    source: str,
    pool: str,
    *,
    segmentation: str | None = None,
    score: float | None = None,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How right boxes are, against the connected components of a pool's masks.

    Args:
        source: run folder of a detector, which then searches the pool; or NAME of `boxes-NAME.parquet` beside it.
        pool: every sample has a mask; an unlabeled pool may, with `--keep-unlabeled-masks`.
        segmentation: run folder of a segmentation, whose pixels are measured inside and outside the boxes too.
        score: from which on a box is accepted; default: `boxes.accepted` of the detector, 0.85 for a file.
        confidence: probability from which on a pixel of the segmentation counts.
        progress: told (images done, images in all).

    Returns:
        Of all things and by class: true and accepted boxes, precision and recall (percent, at an overlap of 0.8), and
        with `segmentation` the accuracy of pixels by predicted class, over all, inside and outside agreeing boxes.

    Raises:
        CheckpointError, ConfigError, DataError: one line each.
    """
    opened = open_pool(pool, "--pool", masks=True)
    network = load_network(segmentation) if segmentation is not None else None
    if network is not None and network.classes != opened.classes:
        raise ConfigError(
            f"--run must be of the classes of --pool ({', '.join(opened.classes)}); got {', '.join(network.classes)}. "
            "Give another run or pool."
        )
    if RunFolder(source).exists("config.yaml"):
        trained = load_detector(source)
        boxes = trained.config.boxes
        accepted = boxes.accepted if score is None else score
        found = search(trained, opened, progress)
        return count(opened, found, trained.things, boxes.source_area, accepted, network, confidence)
    _, made = read_boxes(opened, source)
    names = made.get("things") or [name for name in opened.classes if name != "background"]
    things = [opened.classes.index(name) for name in names]
    accepted = BoxesConfig().accepted if score is None else score
    stored = open_boxes(opened, source, accepted)
    min_area = float(made.get("min_area", BoxesConfig().min_area))
    return count(opened, _stored(opened, stored, progress), things, min_area, accepted, network, confidence)


def _stored(pool: Pool, boxes: PoolBoxes, progress: Progress | None) -> Iterator[tuple[int, Detections]]:
    for row in range(pool.num_samples):
        start, stop = boxes.starts[row : row + 2].tolist()
        labels_N = boxes.labels_M[start:stop].long()
        yield row, Detections(boxes.boxes_M4[start:stop], labels_N, torch.ones(stop - start))
        if progress is not None:
            progress(row + 1, pool.num_samples)


def count(
    pool: Pool,
    found: Iterable[tuple[int, Detections]],
    things: Sequence[int],
    min_area: float,
    accepted: float,
    network: Trained | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Counts boxes, image by image, against the masks of a pool; see `check_boxes`."""
    reader, counts, device = Reader(pool), BoxCounts(len(pool.classes)), distributed.local_device()
    if network is not None:
        network.network.to(device)
    for row, one in found:
        chosen = one.scores_N >= accepted
        boxes_N4, label_N = one.boxes_N4[chosen], one.labels_N[chosen]
        mask_HW = reader.mask(row)
        true_M4, position_M = mask_boxes(mask_HW, things, min_area)
        counts.add(boxes_N4, label_N, torch.from_numpy(true_M4), torch.tensor(list(things))[position_M])
        if network is not None:
            images_B3HW = image_tensor([reader.image(row)], device)
            with inference(network.network, device):
                probabilities_BKHW = predict_probabilities(network.network, images_B3HW, network.config.eval)
            confidence_HW, predicted_HW = probabilities_BKHW[0].cpu().max(dim=0)
            boxes_N5 = torch.cat((boxes_N4, label_N[:, None].float()), dim=1)
            counts.add_pixels(predicted_HW, confidence_HW >= confidence, torch.tensor(mask_HW), boxes_N5)
    return {"accepted": accepted, **counts.result(pool.classes, things)}
