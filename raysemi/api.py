"""What notebooks and other programs call; the command line stands on the same functions.

import raysemi
config = raysemi.load_config("scenes-fixmatch", ["run=runs/mine", "ray=none"])
print(raysemi.train(config)["miou"])
network = raysemi.load_model("runs/mine")
logits_BKHW = network(images_B3HW).logits_BKHW  # float RGB in [0, 1]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from raysemi import config_io
from raysemi.config import RunConfig
from raysemi.data.pool import Pool
from raysemi.engine import distributed
from raysemi.engine.evaluate import evaluate as measure
from raysemi.engine.folder import RunFolder
from raysemi.engine.predict import predict_folder, predict_pool
from raysemi.engine.trainer import resolve_precision
from raysemi.errors import CheckpointError, ConfigError, DataError
from raysemi.launch import detect as detection
from raysemi.launch import predict as prediction
from raysemi.launch.exported import read_export
from raysemi.launch.restore import Trained, load_network, open_pool
from raysemi.launch.train import launch
from raysemi.models.segmentor import Segmentor
from raysemi.ops.confusion import iou, mean_iou, pixel_accuracy

Which = Literal["last", "best"]
Progress = Callable[[int, int], None]


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe.

    Args:
        recipe: path of a YAML file, or the name of a recipe that comes with raysemi (`scenes-fixmatch`).
        overrides: `a.b=value` each, as on the command line.

    Raises:
        ConfigError: with every fault at once, each under its dotted path.
    """
    return config_io.load(recipe, overrides)


def train(config: RunConfig, on_log: Callable[[int, dict[str, float]], None] | None = None) -> dict[str, Any]:
    """Trains until `train.steps` or `train.stop_at`; a run folder that was begun is continued.

    Args:
        config: from `load_config`.
        on_log: called with (steps done, metrics by name) every `train.log_every` steps and at evaluations.

    Returns:
        `method, miou, iou (by class), pixel_accuracy` of the last evaluation, in percent, `steps, labeled, unlabeled,
        seconds`; empty when the run stopped before its first evaluation.

    Raises:
        ConfigError, DataError, CheckpointError: one line each.
    """
    return launch(config, on_log)


def load_model(run: str | Path, which: Which = "last") -> Segmentor:
    """The network of a run, in eval mode on the CPU.

    Args:
        run: run folder, local or URL.
        which: the `last` checkpoint, or the `best` on validation.

    Returns:
        The network, with the attributes `classes` (names) and `palette` (RGB of each class). It takes float RGB
        [B, 3, H, W] in [0, 1], any size, and gives a `Prediction` with `logits_BKHW`.

    Raises:
        CheckpointError: no run, or no whole checkpoint in it.
    """
    trained = load_network(run, which)
    network: Any = trained.network
    network.classes, network.palette = trained.classes, trained.palette
    return trained.network


def load_exported(path: str | Path) -> Segmentor:
    """The network of a file that `raysemi checkpoint export RUN --out FILE.safetensors` wrote; see `load_model`.

    Raises:
        CheckpointError: no such file, or it holds something else.
    """
    trained = read_export(path)
    network: Any = trained.network
    network.classes, network.palette = trained.classes, trained.palette
    return trained.network


def evaluate(
    run: str | Path,
    pool: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    which: Which = "last",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a run on a labeled pool; under torchrun the images are spread over the ranks.

    Args:
        run: run folder, local or URL.
        pool: labeled pool; default: the run's `data.val`.
        overrides: `eval.*=value` in place of the run's own.
        which: the `last` checkpoint, or the `best` on validation.
        progress: told (images done, images in all) of this rank.

    Returns:
        The fields of `result.json`, for this pool.

    Raises:
        ConfigError, DataError, CheckpointError: one line each.
    """
    trained = load_network(run, which)
    config = _with_eval(trained.config, overrides)
    labeled = open_pool(str(pool or config.data.val), "pool", masks=True)
    if labeled.classes != trained.classes:
        raise CheckpointError(
            f"{run} must have the {len(labeled.classes)} classes of {labeled.path}; got {len(trained.classes)}: "
            f"{', '.join(trained.classes)}. Give a pool with these classes in this order."
        )
    across = distributed.join()
    device = distributed.local_device()
    precision = resolve_precision(config.train, device)
    network = trained.network.to(device)
    matrix_KK = measure(network, labeled, config.eval, across, device, precision=precision, progress=progress)
    distributed.leave_at_exit()
    folder = RunFolder(run)
    of_run = json.loads(folder.read_bytes("result.json")) if folder.exists("result.json") else {}
    per_class = zip(trained.classes, iou(matrix_KK), strict=True)
    return {
        "method": config.method.name,
        "miou": 100.0 * float(mean_iou(matrix_KK)),
        "iou": {name: 100.0 * float(value) for name, value in per_class},
        "pixel_accuracy": 100.0 * float(pixel_accuracy(matrix_KK)),
        "steps": trained.step,
        **{name: of_run.get(name) for name in ("labeled", "unlabeled", "seconds")},
    }


def predict(
    run: str | Path,
    *,
    images: str | Path | None = None,
    pool: str | Path | None = None,
    out: str | Path,
    overrides: Sequence[str] = (),
    which: Which = "last",
    progress: Progress | None = None,
) -> int:
    """Writes an index mask and a colour overlay of every image, at its own size, in the colours of the run.

    Under torchrun the images are spread over the ranks, and each of them writes its part below `out`.

    Args:
        run: run folder, local or URL, or a file exported from one.
        images: folder with image files, searched with its subfolders; or
        pool: a pool, labeled or not; its classes, where it names any, are the run's.
        out: folder for `labels/` and `overlays/`.
        overrides: `eval.*=value` in place of the run's own.
        which: the `last` checkpoint, or the `best` on validation.
        progress: told (images done, images in all) of this rank.

    Returns:
        Number of images, of all ranks.

    Raises:
        ConfigError, DataError, CheckpointError: one line each.
    """
    if (images is None) == (pool is None):
        raise ConfigError("predict must get --images or --pool, one of the two; got neither or both. Give one.")
    if "://" in str(out):
        raise ConfigError(f"--out must be a folder, local or shared; got {out}. Copy the files to the store later.")
    trained = load_network(run, which)
    config = _with_eval(trained.config, overrides).eval
    opened = _pool_of(run, trained, pool) if pool is not None else None
    across = distributed.join()
    device = distributed.local_device()
    precision = resolve_precision(trained.config.train, device)
    network, palette = trained.network.to(device), trained.palette
    how: dict[str, Any] = {"device": device, "precision": precision, "across": across, "progress": progress}
    if opened is not None:
        done = predict_pool(network, opened, out, palette, config, **how)
    else:
        assert images is not None  # one of the two was given
        done = predict_folder(network, images, out, palette, config, **how)
    distributed.leave_at_exit()
    return done


def predict_shards(
    run: str | Path,
    *,
    pool: str | Path,
    out: str | Path,
    min_confidence: float = 0.0,
    workers: int | None = None,
    overrides: Sequence[str] = (),
    which: Which = "last",
    progress: Progress | None = None,
) -> Pool:
    """Writes the label map and the confidence of every image of a pool as a pool: pseudo-labels to train on.

    Each shard becomes one with the same keys: the images' own bytes, `KEY.mask.png` (class index, 255 = less probable
    than `min_confidence`) and `KEY.confidence.png` (8 bits, 255 times the probability of the class). What is finished
    stays after an interruption, and the same call goes on to the same bytes.

    Args:
        run: run folder, local or URL.
        pool: a pool, labeled or not; its classes, where it names any, are the run's.
        out: folder for the new pool; on several machines one that they share.
        min_confidence: probability from which on a pixel keeps its label.
        workers: of Ray, each with a GPU where there are enough; None: this process, without Ray.
        overrides: `eval.*=value` in place of the run's own.
        which: the `last` checkpoint, or the `best` on validation.
        progress: told (images done, images in all).

    Returns:
        The new pool.

    Raises:
        ConfigError, DataError, CheckpointError, RaysemiError: one line each, then how many shards are finished.
    """
    trained = load_network(run, which)
    config = _with_eval(trained.config, overrides)
    opened = _pool_of(run, trained, pool)
    how: dict[str, Any] = {"min_confidence": min_confidence, "workers": workers, "progress": progress}
    return prediction.predict_shards(run, trained, config, opened, out, **how)


def train_detector(
    recipe: str | Path, overrides: Sequence[str] = (), on_log: Callable[[int, dict[str, float]], None] | None = None
) -> dict[str, Any]:
    """Trains a detector of things on a labeled pool; a run folder that was begun is continued.

    Args:
        recipe: path of a YAML file, or the name of a detector's recipe that comes with raysemi (`scenes`).
        overrides: `a.b=value` each.
        on_log: called with (steps done, metrics by name) every `train.log_every` steps.

    Returns:
        `steps`, and, once finished with `data.val`, the fields of `check_boxes` on it.

    Raises:
        ConfigError, DataError, CheckpointError: one line each.
    """
    return detection.train_detector(config_io.load_detector(recipe, overrides), on_log)


def find_boxes(
    detector: str | Path,
    pool: str | Path,
    *,
    name: str | None = None,
    score: float | None = None,
    progress: Progress | None = None,
) -> tuple[str, int]:
    """Writes the boxes that a detector finds in a pool beside it, for `weighting.detector=NAME`.

    The file appears when the last image is done; interrupted, nothing changes.

    Args:
        detector: run folder of a detector.
        pool: of the detector's classes, labeled or not.
        name: NAME of `boxes-NAME.parquet`; default: the last part of `detector`.
        score: least score that is stored; default: `boxes.score` of the detector.
        progress: told (images done, images in all).

    Returns:
        The file's path and the number of boxes.

    Raises:
        ConfigError, DataError, CheckpointError: one line each.
    """
    return detection.run_detector(str(detector), str(pool), name, score, progress)


def check_boxes(
    source: str | Path,
    pool: str | Path,
    *,
    run: str | Path | None = None,
    score: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures accepted boxes against the things in the masks of a pool.

    Args:
        source: run folder of a detector, or NAME of `boxes-NAME.parquet` beside the pool.
        pool: every image has a mask.
        run: a segmentation's run folder: its sure pixels are measured inside and outside agreeing boxes.
        score: from which on a box is accepted; default: `boxes.accepted` of the detector.
        progress: told (images done, images in all).

    Returns:
        `accepted, images, boxes_per_image, true_boxes, accepted_boxes, precision, recall`, with `run` also
        `pixel_accuracy, pixel_accuracy_inside, pixel_accuracy_outside`, in percent; and `classes`, the same of each.

    Raises:
        ConfigError, DataError, CheckpointError: one line each.
    """
    segmentation = str(run) if run is not None else None
    return detection.check_boxes(str(source), str(pool), segmentation=segmentation, score=score, progress=progress)


def _pool_of(run: str | Path, trained: Trained, pool: str | Path) -> Pool:
    """A pool whose images the run can predict."""
    opened = open_pool(str(pool), "pool", store=trained.config.data.store)
    if opened.classes and opened.classes != trained.classes:
        raise DataError(
            f"pool must name no classes or those of {run} ({', '.join(trained.classes)}); got {opened.path} with "
            f"{', '.join(opened.classes)}. Give another pool, or --images with a folder."
        )
    return opened


def _with_eval(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    other = [text for text in overrides if not text.startswith("eval.")]
    if other:
        raise ConfigError(
            [f"{text} must be an eval.* setting; got another. Only these can change now." for text in other]
        )
    return config_io.change(config, overrides)
