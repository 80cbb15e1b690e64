"""From a config to networks and pools, and from a run folder, or a file exported from it, back to its network."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raysemi import config_io
from raysemi.config import RunConfig
from raysemi.config_shares import uses_unlabeled
from raysemi.data.ahead import cache_faults
from raysemi.data.boxes import PoolBoxes, open_boxes
from raysemi.data.joined import AnyPool, as_one
from raysemi.data.pool import Pool
from raysemi.data.store import StoreConfig
from raysemi.engine import checkpoint, retention
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, ConfigError, DataError, DataFailure
from raysemi.launch.progress import ended_at
from raysemi.methods import METHODS
from raysemi.methods.base import Method
from raysemi.methods.weighting import NoWeightingConfig, RankWeightingConfig, build_weighting
from raysemi.models.segmentor import Segmentor, build_segmentor

_log = logging.getLogger(__name__)


def open_pool(path: str | None, setting: str, *, masks: bool = False, store: StoreConfig | None = None) -> Pool:
    """Opens a pool and names the setting when it cannot serve.

    Args:
        path: folder or URL.
        setting: what named it.
        masks: whether every sample must have one.
        store: `data.store.*`.

    Raises:
        DataError: no pool there, an empty one, or one without the masks that the setting needs; a DataFailure when the
            store does not answer.
    """
    assert path is not None  # the config refuses a run without this pool
    try:
        pool = Pool.open(path, store=store)
    except DataError as error:
        raise type(error)(f"{setting}: {error}") from error
    if pool.num_samples == 0:
        raise DataError(f"{setting} must hold at least one sample; got an empty pool, {path}. Pack it again.")
    if masks and not pool.labeled:
        missing = pool.num_samples - pool.num_masks
        groups = pool.rows.groups(("key", "mask_offset"))
        first = next(keys[0] for group in groups if (keys := group.filter(group["mask_offset"].is_null())["key"]))
        raise DataError(
            f"{setting} must have a mask for every image; got {path} with {missing} that have none, the first {first}. "
            "Pack it from a labeled source."
        )
    return pool


@dataclass(frozen=True)
class Pools:
    """The open pools of a run, whose classes are the same."""

    labeled: Pool
    val: Pool
    unlabeled: AnyPool | None
    """One pool, or several read as one; None when the method uses no unlabeled images."""
    boxes: PoolBoxes | None = None
    """Of `weighting.detector`, in the unlabeled pool; None without one."""


def open_pools(config: RunConfig) -> Pools:
    """Opens the pools that a run reads.

    Raises:
        DataError: with what is wrong with each pool.
        ConfigError: pools that do not fit each other or the settings.
    """
    wanted = [("labeled", config.data.labeled), ("val", config.data.val)]
    if uses_unlabeled(config.method, config.data):
        wanted += [("unlabeled", path) for path in config.data.unlabeled_pools]
    opened: list[tuple[str, Pool]] = []
    broken: list[str] = []
    for name, path in wanted:
        try:
            pool = open_pool(path, f"data.{name}", masks=name != "unlabeled", store=config.data.store)
            opened.append((name, pool))
        except DataFailure:
            raise  # the store does not answer: the others would wait for it too
        except DataError as error:
            broken.append(str(error))
    if broken:
        raise DataError("\n".join(broken))
    labeled, val, *others = (pool for _, pool in opened)
    classes = labeled.classes
    faults = [
        f"data.{name} must have the classes of data.labeled ({', '.join(classes)}); got {', '.join(pool.classes)}. "
        "Pack the pools from one source."
        for name, pool in opened
        if pool.classes != classes
    ]
    unlabeled = as_one(others, config.data.unlabeled_weights) if others and not faults else None
    if config.eval.pseudo_images and unlabeled is not None and not unlabeled.labeled:
        faults.append(
            f"eval.pseudo_images must be 0 unless every unlabeled image has a mask; got {config.eval.pseudo_images} "
            f"with {unlabeled.num_masks} masks for {unlabeled.num_samples} images. Set it to 0, or pack the unlabeled "
            "pool again with --keep-unlabeled-masks."
        )
    if len(classes) < 2:
        faults.append(
            f"data.labeled must have at least two classes, or there is nothing to learn; got {', '.join(classes)}. "
            "Name the rest of the image as a class of its own, such as background, and pack again."
        )
    else:
        faults += _refused_by_method(config, len(classes))
    batch = config.train.batch
    drawn: dict[str, tuple[AnyPool, int]] = {"labeled": (labeled, batch.labeled), "val": (val, 1)}
    if unlabeled is not None:
        drawn["unlabeled"] = (unlabeled, batch.unlabeled)
    faults += cache_faults(drawn, config.data.store)
    if faults:
        raise ConfigError(faults)
    return Pools(labeled, val, unlabeled, _boxes(config.weighting, unlabeled))


def _refused_by_method(config: RunConfig, num_classes: int) -> tuple[str, ...]:
    """What a method refuses for a number of classes."""
    try:
        METHODS[config.method.name][1](config.method, num_classes)
    except ConfigError as error:
        return error.faults
    return ()


def _boxes(weighting: NoWeightingConfig | RankWeightingConfig, unlabeled: AnyPool | None) -> PoolBoxes | None:
    if weighting.name == "none" or weighting.detector is None or unlabeled is None:
        return None
    try:
        return open_boxes(unlabeled, weighting.detector, weighting.score)
    except DataError as error:
        raise DataError(f"weighting.detector: {error}") from error


MAY_CHANGE = (
    "run",
    "log.",
    "ray.",
    "train.stop_at",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.micro_batch",
    "train.strategy",
    "train.zero.",
    "train.skip_limit",
    "train.hang_after_s",
    "train.guards.",
    "eval.",
    "data.on_corrupt",
    "data.corrupt_limit",
    "data.loader_processes",
    "data.prefetch",
    "data.store.",
    "gradients.measure_every",
)
"""Settings that may differ when a run goes on: its folder may have moved, and an error may have told the user to change
one. Anything else makes it another run."""


def refuse_another_run(config: RunConfig) -> None:
    """Refuses a run folder whose checkpoints another config made.

    Raises:
        ConfigError: names every setting that differs.
    """
    folder = RunFolder(config.run)
    if not folder.exists("config.yaml") or not checkpoint.steps(folder):
        return
    earlier = config_io.parse(folder.read_bytes("config.yaml").decode())
    changed = [path for path in config_io.difference(earlier, config) if not path.startswith(MAY_CHANGE)]
    if changed:
        raise ConfigError(
            f"run must name a folder of this run or a new one; got {config.run}, whose config differs in "
            f"{', '.join(changed)}. Give another run folder, or undo the change to go on."
        )


def finished(config: RunConfig) -> dict[str, Any] | None:
    """What a run has come to whose last launch took it as far as this one would: no worker needs to start.

    Returns:
        The fields of `result.json`, empty without an evaluation; None where something is left to do, or where this
        machine does not see the run folder.

    Raises:
        ConfigError: another config made the run.
    """
    folder = RunFolder(config.run, StoreConfig(deadline=config.data.store.deadline))
    until = min(config.train.steps, config.train.stop_at or config.train.steps)
    step = ended_at(folder)
    if step is None or step < until or checkpoint.steps(folder)[-1:] != [step]:
        return None
    refuse_another_run(config)
    tell_finished(step, until)
    return json.loads(folder.read_bytes("result.json")) if folder.exists("result.json") else {}


def tell_finished(step: int, until: int) -> None:
    """Logs why nothing happens."""
    _log.info("step %d of %d: nothing left to do.", step, until)


def build(config: RunConfig, num_classes: int, *, untrained: bool = False) -> tuple[Segmentor, Method]:
    """The student with the heads that its method asks for, and the method with its weighting and memories, on the CPU.

    Args:
        config: the run.
        num_classes: classes of its pools.
        untrained: begin with random weights, whatever `model.weights` says: a checkpoint will replace them all, and
            neither a hub nor a file is asked for.
    """
    student, method = _student(config, num_classes, untrained)
    method.weighting = build_weighting(config.weighting, num_classes, student.penultimate_channels)
    method.reserve(config.data.crop)
    return student, method


def _student(config: RunConfig, num_classes: int, untrained: bool) -> tuple[Segmentor, Method]:
    """Without what only training needs."""
    method = METHODS[config.method.name][1](config.method, num_classes)
    model = config.model.model_copy(update={"weights": "random"}) if untrained else config.model
    return build_segmentor(model, num_classes, method.heads, config.seed), method


def untrained_network(config: RunConfig, num_classes: int) -> Segmentor:
    """The network of a run with random weights, on the CPU, for those of a file."""
    return _student(config, num_classes, untrained=True)[0]


@dataclass(frozen=True)
class Trained:
    """What a run has learned so far."""

    network: Segmentor
    """The network that the run evaluates (its averaged copy where it has one), in eval mode on the CPU."""
    config: RunConfig
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    step: int
    """Steps done."""
    digest: str
    """SHA-256 of its checkpoint's manifest, which holds those of the files."""


def load_network(run: str | Path, which: Literal["last", "best"] | int = "last") -> Trained:
    """Reads a run folder, or the file that was exported from one.

    Args:
        run: run folder, local or URL; or a local `.safetensors` of `raysemi checkpoint export`.
        which: of a run folder: `last` checkpoint, `best` on validation, or that of a step.

    Raises:
        CheckpointError: no run, or no whole checkpoint in it.
    """
    if Path(run).suffix == ".safetensors":
        from raysemi.launch.exported import read_export  # it stands on this file

        return read_export(run)
    folder = RunFolder(run)
    if not folder.exists("config.yaml"):
        raise CheckpointError(f"{run} must be a run folder; got one without config.yaml. Give the `run` of a training.")
    config = config_io.parse(folder.read_bytes("config.yaml").decode())
    if which != "last":
        step = retention.best_step(folder) if which == "best" else which
        snapshot = checkpoint.load(folder, step, ("student", "teacher")) if step is not None else None
    else:
        snapshot = checkpoint.load_newest(folder)
    if snapshot is None:
        raise CheckpointError(
            f"{run} must hold a whole checkpoint; got none. Train it first: the same command goes on."
        )
    classes = tuple(snapshot.state["classes"])
    network = untrained_network(config, len(classes))
    weights = snapshot.tensors["teacher" if snapshot.state["average_started"] else "student"]
    checkpoint_path = f"{run}/{checkpoint.checkpoint_name(snapshot.step)}"
    advice = f"Remove the folder {checkpoint_path}; the same command goes on from an earlier checkpoint."
    outputs = len(weights.get("decoder.classifier.bias", ()))
    if outputs != len(classes):
        raise CheckpointError(
            f"{checkpoint_path} must hold weights for the {len(classes)} classes that its state.json names; got "
            f"{outputs}. {advice}"
        )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # torch's text has a line a tensor
        raise CheckpointError(f"{checkpoint_path} must hold weights of its own config; got others. {advice}") from error
    palette = tuple((red, green, blue) for red, green, blue in snapshot.state["palette"])
    manifest = folder.read_bytes(f"{checkpoint.checkpoint_name(snapshot.step)}/{checkpoint.MANIFEST}")
    digest = hashlib.sha256(manifest).hexdigest()
    return Trained(network.eval(), config, classes, palette, snapshot.step, digest)
