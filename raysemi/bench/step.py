"""`raysemi bench step`: a whole train step against its floor, the network passes that the method needs.

Both run in turns in one process on the same networks, so that whatever else keeps the machine busy meets both. The
batch is made of drawn scenes; weights are random. Every step is the same one from the middle of a run, where ramps and
delayed terms are on.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raysemi import config_io
from raysemi.bench.passes import Floor, Pass, record
from raysemi.config import RunConfig
from raysemi.data.loader import Stream
from raysemi.data.pack import pack
from raysemi.data.sources.scenes import Scenes
from raysemi.data.types import HostBatch
from raysemi.engine import distributed, memory
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build
from raysemi.methods.base import AcrossRanks, Method, SingleRank
from raysemi.models.encoders import DINOV2

GOALS = {
    **dict.fromkeys(("supervised", "fixmatch", "mean_teacher", "unimatch", "unimatch_v2"), 1.10),
    **dict.fromkeys(("corrmatch", "derprop", "augseg", "ael"), 1.15),
    "u2pl": 1.25,
}
"""Largest ratio of step to floor that the project aims at; nothing depends on it."""
CLASSES = 21
"""Classes of the network, as many as Pascal VOC has."""
_STEPS, _PERIOD, _STEP = 1000, 50, 505
"""A step in the middle of a run, and of a period: no momentum network moves in it."""
_BATCHES = 3
"""Different batches that take turns."""
_WARM_UP = 2
"""Steps before the clock runs: libraries choose kernels, compilers compile, memory is taken."""


@dataclass(frozen=True)
class StepSettings:
    """What is measured."""

    method: str
    encoder: str
    """`model.encoder`; its weights are random."""
    crop: int
    """Side of the images, pixels."""
    batch: int
    """Labeled images of a step, and as many unlabeled ones."""
    weighting: str = "none"
    """`weighting.name`."""
    gradients: str = "uniform"
    """`gradients.name`."""
    precision: str = "auto"
    """`train.precision`."""
    compile: bool = False
    """`train.compile`."""
    threads: int | None = None
    """Threads of torch on the CPU; None: as many as torch takes."""
    overrides: tuple[str, ...] = ()
    """Settings `a.b=value` of the run."""

    def config(self) -> RunConfig:
        """The run whose step is measured.

        Raises:
            ConfigError: unknown method, encoder, setting or value.
        """
        own = [
            "run=bench", "ray=none", "data.pools=bench", "data.loader_processes=0",
            f"method={self.method}", f"weighting={self.weighting}", f"gradients={self.gradients}",
            f"data.crop={self.crop}", f"model.encoder={self.encoder}", "model.weights=random",
            *(["model.name=dpt"] if self.encoder.partition(".")[0] in DINOV2 else []),
            f"train.steps={_STEPS}", f"train.period={_PERIOD}",
            f"train.batch.labeled={self.batch}", f"train.batch.unlabeled={self.batch}",
            f"train.precision={self.precision}", f"train.compile={str(self.compile).lower()}",
        ]  # fmt: skip
        return config_io.load(None, [*own, *self.overrides])


@dataclass(frozen=True)
class StepResult:
    """What was measured; times in seconds."""

    method: str
    weighting: str
    gradients: str
    backbone: str
    crop: int
    batch: int
    threads: int
    device: str
    torch: str
    precision: str
    compile: bool
    pairs: int
    step_s: float
    """Median."""
    floor_s: float
    """Median."""
    ratio: float
    """Median over pairs of step / floor."""
    ratio_quartiles: tuple[float, float]
    cpu_ratio: float
    """The same of this process's CPU time, all threads together: what counts of a CPU that others keep busy too."""
    goal: float | None
    """Of `GOALS`."""
    peak_bytes: int
    """Most memory of a process that only takes steps: what CUDA's allocator held, or, on other devices, by how much the
    resident memory grew above that of the imported libraries. Weights, gradients, moments and the batch are in it."""
    peak_floor_bytes: int
    """The same of a process that only takes floor steps, with as many backward passes as the gradient rule makes."""
    passes: list[dict[str, Any]]
    """Of the floor, in their order."""

    def as_json(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)

    def passes_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: what the floor runs."""
        columns = ["network", "part", "images", "of them perturbed", "shape of each", "mode", "backward passes"]
        rows = []
        for one in self.passes:
            sizes = ", ".join(" x ".join(str(side) for side in shape[1:]) for shape in one["shapes"])
            images, perturbed = str(one["images"]), str(one["perturbed"] or "")
            rows.append([one["network"], one["part"], images, perturbed, sizes, one["mode"], str(one["backwards"])])
        return columns, rows

    def summary(self) -> str:
        """The numbers in two lines."""
        low, high = self.ratio_quartiles
        goal = "" if self.goal is None else f", goal {self.goal:.2f}"
        return (
            f"step {self.step_s:.4f} s, floor {self.floor_s:.4f} s, ratio {self.ratio:.3f} (half of the {self.pairs} "
            f"pairs: {low:.3f} to {high:.3f}{goal}), of CPU time {self.cpu_ratio:.3f}\n"
            f"peak memory of step {self.peak_bytes / 2**20:.0f} MiB, of floor {self.peak_floor_bytes / 2**20:.0f} MiB; "
            f"{self.device}, {self.threads} threads, {self.precision}{', compiled' if self.compile else ''}, "
            f"torch {self.torch}"
        )


def measure_step(
    settings: StepSettings, pairs: int = 15, progress: Callable[[int, int], None] | None = None
) -> StepResult:
    """Measures a method's step and its floor.

    Args:
        settings: method, network, batch.
        pairs: times that each is measured; 15 or more for a number that is to be believed.
        progress: (pairs done, pairs) after each.

    Raises:
        ConfigError: settings that make no run.
    """
    bench = StepBench(settings.config(), settings.threads)
    passes = record(bench.trainer, lambda: bench.step(0))
    floor = Floor(bench.trainer, passes)
    for number in range(_WARM_UP):
        bench.step(number)
        floor()
    times: list[tuple[Seconds, Seconds]] = []
    for number in range(pairs):
        step = functools.partial(bench.step, number)
        if number % 2:  # who comes second finds caches as the first has left them
            of_floor, of_step = bench.seconds(floor), bench.seconds(step)
        else:
            of_step, of_floor = bench.seconds(step), bench.seconds(floor)
        times.append((of_step, of_floor))
        if progress is not None:
            progress(number + 1, pairs)
    ratios = [of_step.wall / of_floor.wall for of_step, of_floor in times]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if pairs > 1 else ratios * 3
    return StepResult(
        method=settings.method,
        weighting=settings.weighting,
        gradients=settings.gradients,
        backbone=settings.encoder,
        crop=settings.crop,
        batch=settings.batch,
        threads=torch.get_num_threads(),
        device=bench.device_name,
        torch=torch.__version__,
        precision=str(bench.trainer.precision).removeprefix("torch."),
        compile=settings.compile,
        pairs=pairs,
        step_s=statistics.median(of_step.wall for of_step, _ in times),
        floor_s=statistics.median(of_floor.wall for _, of_floor in times),
        ratio=quartiles[1],
        ratio_quartiles=(quartiles[0], quartiles[2]),
        cpu_ratio=statistics.median(of_step.cpu / of_floor.cpu for of_step, of_floor in times),
        goal=GOALS.get(settings.method),
        peak_bytes=_in_a_fresh_process(settings, None),
        peak_floor_bytes=_in_a_fresh_process(settings, passes),
        passes=[one.as_json() for one in passes],
    )


class Seconds(NamedTuple):
    """Of some work."""

    wall: float
    cpu: float
    """Of this process, all threads together."""


class StepBench:
    """A trainer on this machine's device in the middle of a run, and its batches.

    Args:
        config: a run of `_STEPS` steps; its pools are not opened.
        threads: of torch; None: as they are.
        across: the ranks that share its batch.
    """

    def __init__(self, config: RunConfig, threads: int | None = None, across: AcrossRanks | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = distributed.local_device()
        across = SingleRank() if across is None else across
        student, method = build(config, CLASSES)
        self.trainer = Trainer(
            student, method, config.train, config.optim,
            across=across, device=self.device, period=_PERIOD, seed=config.seed, gradients=config.gradients,
        )  # fmt: skip
        self.trainer.step = _STEP
        self.hosts = _drawn_batches(config, method, across, pinned=self.device.type == "cuda")

    @property
    def device_name(self) -> str:
        """As people know it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def step(self, number: int) -> None:
        """One train step, always the same of the run."""
        self.trainer.step = _STEP
        self.trainer.train_step(self.hosts[number % len(self.hosts)])
        self.trainer.step = _STEP

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def seconds(self, work: Callable[[], None]) -> Seconds:
        """How long some work takes, the device's part of it included."""
        self.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        self.wait()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _drawn_batches(config: RunConfig, method: Method, across: AcrossRanks, *, pinned: bool) -> list[HostBatch]:
    """This rank's share of batches of drawn scenes as large as the crop, through the real stream."""
    batch = config.train.batch
    num = 2 * max(batch.labeled, batch.unlabeled)
    with tempfile.TemporaryDirectory() as folder:
        scenes = Scenes(train=num + batch.labeled, val=1, size=max(config.data.crop, 32))
        pools = pack(scenes, Path(folder), split=batch.labeled, pools=("labeled", "unlabeled"), processes=1)
        stream = Stream(
            config.data, pools, config.seed, batch.labeled, batch.unlabeled, across.rank, across.world,
            method.strong_views, method.second_view, _STEP, _STEP + _BATCHES, pinned=pinned, strong=method.strong,
            given=method.given,
        )  # fmt: skip
        return list(stream)


def _in_a_fresh_process(settings: StepSettings, passes: list[Pass] | None) -> int:
    spawn = multiprocessing.get_context("spawn")  # a forked one would begin with this one's memory
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(peak_bytes, settings, passes).result()


def peak_bytes(settings: StepSettings, passes: list[Pass] | None) -> int:
    """Most memory that steps take; to be called in a process of its own.

    Args:
        settings: what is measured.
        passes: of the floor; None: whole steps.
    """
    before = memory.resident_bytes()
    bench = StepBench(settings.config(), settings.threads)
    floor = None if passes is None else Floor(bench.trainer, passes)
    for number in range(_WARM_UP + 1):
        if floor is None:
            bench.step(number)
        else:
            floor()
    bench.wait()
    return memory.peak_bytes(bench.device) - (0 if bench.device.type == "cuda" else before)


def passes_of_a_step(config: RunConfig) -> list[Pass]:
    """The passes that a run makes in a step from its middle, on small images and networks with random weights.

    Args:
        config: the run; neither its pools nor its folder are read.
    """
    small = [
        "data.crop=70", "data.loader_processes=0", "model.weights=random", "train.compile=false",
        f"train.steps={_STEPS}", f"train.period={_PERIOD}", "train.stop_at=null",
    ]  # fmt: skip
    bench = StepBench(config_io.change(config, small))
    return record(bench.trainer, lambda: bench.step(0))
