"""`raysemi bench scale`: a step of several ranks against a step of one, with the same work a rank; and what ranks tell.

Every rank is a process of its own on this machine. In turns, so that whatever else keeps it busy meets all alike:

- alone: the first process takes steps by itself, and the floor of such a step (`bench step`), while the others wait.
- apart: all processes take such steps at once, and tell each other nothing: what they share is the machine.
- together: they take the steps of one run, whose batch is as many times as large.

alone / together is the efficiency; alone / apart is what of it the machine itself costs.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from raysemi.bench.passes import Floor, record
from raysemi.bench.step import StepBench, StepSettings
from raysemi.config import check_world
from raysemi.engine import distributed
from raysemi.engine.strategy import running_statistics
from raysemi.errors import RaysemiError
from raysemi.methods.base import AcrossRanks

_START_S = 600.0
"""Seconds in which the processes must have started and taken their first steps."""


@dataclass(frozen=True)
class ScaleResult:
    """What was measured; times in seconds, medians over turns; ratios are medians of the turns' own."""

    method: str
    weighting: str
    gradients: str
    backbone: str
    crop: int
    batch: int
    """Labeled images of a rank's step, and as many unlabeled ones."""
    threads: int
    """Of each rank."""
    device: str
    torch: str
    ranks: int
    turns: int
    alone_s: float
    apart_s: float
    together_s: float
    floor_s: float
    """Of one rank's step: `raysemi bench step`."""
    efficiency: float
    """alone / together: 1 where several ranks cost nothing."""
    apart_efficiency: float
    """alone / apart: what is left of 1 where processes share a machine but nothing else."""
    ratio_to_floor: float
    """together / floor."""
    gradient_bytes: int
    """That a rank hands to collectives a step: each gradient that travels, in fp32."""
    statistics_bytes: int
    """BatchNorm's running statistics and the flag of a step that counts; 0 where SyncBatchNorm keeps ranks equal."""
    told_bytes: int
    """All else that a rank tells the others a step: normalisers, thresholds, class counts, memories."""

    def as_json(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)

    def summary(self) -> str:
        """The numbers in three lines."""
        return (
            f"one rank alone {self.alone_s:.3f} s, {self.ranks} processes apart {self.apart_s:.3f} s, {self.ranks} "
            f"ranks together {self.together_s:.3f} s a step\n"
            f"efficiency {self.efficiency:.3f}, of processes that tell each other nothing {self.apart_efficiency:.3f}; "
            f"together / floor of one rank {self.ratio_to_floor:.3f} ({self.turns} turns, {self.device}, "
            f"{self.threads} threads a rank)\n"
            f"a rank hands over {self.gradient_bytes / 1e6:.1f} MB of gradients a step, "
            f"{self.statistics_bytes / 1e3:.1f} kB of BatchNorm's statistics and {self.told_bytes / 1e3:.1f} kB else"
        )


class Counting:
    """What ranks tell each other, counted in bytes that this rank hands over."""

    def __init__(self, across: AcrossRanks) -> None:
        self._across = across
        self.rank, self.world = across.rank, across.world
        self.bytes = 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks."""
        return self._across.sum(self._counted(value))

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks."""
        return self._across.max(self._counted(value))

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks."""
        return self._across.gather(self._counted(value))

    def _counted(self, value: Tensor) -> Tensor:
        self.bytes += value.numel() * value.element_size()
        return value


def measure_scale(
    settings: StepSettings, ranks: int = 2, turns: int = 15, progress: Callable[[int, int], None] | None = None
) -> ScaleResult:
    """Measures one rank against several, each with the same batch of its own.

    Args:
        settings: what is measured; `batch` is a rank's.
        ranks: processes, two or more.
        turns: times that each way is measured.
        progress: (turns done, turns).

    Raises:
        ConfigError: settings that make no run of that many ranks.
        RaysemiError: a process has failed; its text is on standard error.
    """
    check_world(_of_all(settings, ranks).config(), ranks)
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(ranks), spawn.Queue()
    port = _free_port()
    processes = [
        spawn.Process(target=_rank, args=(rank, ranks, port, settings, turns, barrier, results), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        found: ScaleResult | int = 0
        while not isinstance(found, ScaleResult):
            found = _next(results, processes)
            if progress is not None and not isinstance(found, ScaleResult):
                progress(found, turns)
    finally:
        for process in processes:
            process.join(10.0 if isinstance(found, ScaleResult) else 0.0)
            process.kill()
    return found


def _next(results: Any, processes: Sequence[BaseProcess]) -> ScaleResult | int:
    """Turns done, or the result at the end, from the first rank."""
    while True:
        try:
            found: ScaleResult | int = results.get(timeout=1.0)
            return found
        except queue.Empty:
            dead = [(number, process.exitcode) for number, process in enumerate(processes) if process.exitcode]
            if dead:
                raise RaysemiError(
                    f"all ranks must live until the end; got rank {dead[0][0]} that ended with {dead[0][1]}. Its own "
                    "words stand above; for a lack of memory, lower --batch or --crop."
                ) from None


def _of_all(settings: StepSettings, ranks: int) -> StepSettings:
    return StepSettings(**{**asdict(settings), "batch": settings.batch * ranks})


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def _rank(rank: int, ranks: int, port: int, settings: StepSettings, turns: int, barrier: Any, results: Any) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # first: each rank's own GPU
    alone = StepBench(settings.config(), settings.threads)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    counting = Counting(distributed.join())
    together = StepBench(_of_all(settings, ranks).config(), settings.threads, across=counting)
    floor = Floor(alone.trainer, record(alone.trainer, lambda: alone.step(0))) if rank == 0 else None
    alone.step(0)
    together.step(0)
    counting.bytes = 0
    together.step(1)
    told = counting.bytes
    times: dict[str, list[float]] = {"alone": [], "apart": [], "together": [], "floor": []}

    def take(name: str, work: Callable[[], None] | None, bench: StepBench) -> None:
        barrier.wait(_START_S)
        if work is not None:
            bench.wait()
            start = time.perf_counter()
            work()
            bench.wait()
            times[name].append(time.perf_counter() - start)

    for turn in range(turns):
        ways = {
            "alone": (functools.partial(alone.step, turn) if rank == 0 else None, alone),
            "floor": (floor, alone),
            "apart": (functools.partial(alone.step, turn), alone),
            "together": (functools.partial(together.step, turn), together),
        }
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always first
            take(name, *ways[name])
        if rank == 0:
            results.put(turn + 1)
    slowest = {name: _slowest(values, counting) for name, values in times.items() if name in ("apart", "together")}
    if rank == 0:
        results.put(_result(settings, ranks, turns, together, times | slowest, told))
    distributed.leave()


def _slowest(seconds: list[float], across: AcrossRanks) -> list[float]:
    """Of each turn, the time of the rank that took longest."""
    found: list[float] = across.max(torch.tensor(seconds, dtype=torch.float64)).tolist()
    return found


def _result(
    settings: StepSettings, ranks: int, turns: int, bench: StepBench, times: dict[str, list[float]], told: int
) -> ScaleResult:
    def ratio(name: str, other: str) -> float:
        return statistics.median(one / two for one, two in zip(times[name], times[other], strict=True))

    trainer = bench.trainer
    trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    sides = 2 if settings.gradients == "pareto" else 1
    networks = [trainer.student]
    if trainer.average is not None and trainer.method.average.buffers == "own":
        networks.append(trainer.average.model)
    of_statistics = 4 * (1 + sum(b.numel() for one in networks for b in running_statistics(one, equal=False)))
    return ScaleResult(
        method=settings.method, weighting=settings.weighting, gradients=settings.gradients, backbone=settings.encoder,
        crop=settings.crop, batch=settings.batch, threads=torch.get_num_threads(), device=bench.device_name,
        torch=torch.__version__, ranks=ranks, turns=turns,
        **{f"{name}_s": statistics.median(values) for name, values in times.items()},
        efficiency=ratio("alone", "together"), apart_efficiency=ratio("alone", "apart"),
        ratio_to_floor=ratio("together", "floor"),
        gradient_bytes=4 * trained * sides, statistics_bytes=of_statistics, told_bytes=told - of_statistics,
    )  # fmt: skip
