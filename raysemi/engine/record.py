"""Metrics: kept on the device, read every `train.log_every` steps; Parquet rows and TensorBoard events out."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raysemi.engine.folder import RunFolder
from raysemi.methods.base import AcrossRanks

METRICS = "metrics.parquet"
Batch = TypeVar("Batch")
_SCHEMA = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])


class Meter:
    """Sums scalars on the device between two log lines; one transfer and one collective to read them."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0
        self._images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time that each of them was waited for on the clock."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, values: dict[str, Tensor], images: int) -> None:
        """Adds one step's scalars; no host wait.

        Args:
            values: 0-dim tensors whose mean over ranks is the global value; the same names at every step.
            images: images of this rank in the step, for the rate.
        """
        vector = torch.stack([value.detach().to(torch.float32).reshape(()) for value in values.values()])
        self._names = tuple(values)
        self._sum = vector if self._sum is None else self._sum + vector
        self._count += 1
        self._images += images

    def restart_clock(self) -> None:
        """Leaves what came before (an evaluation, a checkpoint) out of the rate."""
        self._since = time.perf_counter()
        self._images, self._waited = 0, 0.0

    def read(self, across: AcrossRanks) -> dict[str, float]:
        """Means over the steps since the last reading and over ranks, and `images_per_s` of all ranks. Resets.

        `data/stall` is the share of the time in which a step waited for its batch.
        """
        if self._sum is None:
            return {}
        stall = self._waited / max(time.perf_counter() - self._since, 1e-9)
        summed = torch.cat((self._sum, self._sum.new_full((1,), self._count * stall)))
        means = (across.sum(summed) / (self._count * across.world)).tolist()
        elapsed = time.perf_counter() - self._since  # the device has done by now
        metrics = dict(zip((*self._names, "data/stall"), means, strict=True))
        if self._images:
            metrics["images_per_s"] = self._images * across.world / max(elapsed, 1e-9)
        self._sum, self._count = None, 0
        self.restart_clock()
        return metrics


class Samples:
    """Scalars of single steps, kept on the device until they are read: for what a mean over steps would hide."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, tuple[str, ...]]] = []
        self._rows: list[Tensor] = []

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Keeps a step's scalars; no host wait.

        Args:
            step: steps done.
            values: 0-dim tensors, the same on every rank; as many at every step.
        """
        self._steps.append((step, tuple(values)))
        self._rows.append(torch.stack([value.detach().reshape(()) for value in values.values()]))

    def read(self) -> Iterator[tuple[int, dict[str, float]]]:
        """(steps done, values) by step, in one transfer; a value that is not finite is left out. Resets."""
        rows = torch.stack(self._rows).tolist() if self._rows else []
        steps, self._steps, self._rows = self._steps, [], []
        for (step, names), row in zip(steps, rows, strict=True):
            yield step, {name: value for name, value in zip(names, row, strict=True) if math.isfinite(value)}


class Record:
    """The metrics file and the TensorBoard events of a run; used on rank 0 alone.

    Args:
        folder: the run folder; rows of steps after `step` (from a run that was cut off) are dropped.
        step: the step at which the run goes on.
    """

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        self._rows: list[dict[str, Any]] = []
        if folder.exists(METRICS):
            rows = pq.read_table(io.BytesIO(folder.read_bytes(METRICS))).to_pylist()
            self._rows = [row for row in rows if row["step"] <= step]
        self._events: Any = None
        if folder.is_local:
            from torch.utils.tensorboard import SummaryWriter

            # `purge_step` hides the events that a cut-off run wrote after its last checkpoint.
            self._events = SummaryWriter(folder.path("tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the numbers of one step; they reach the disk with the next `flush`."""
        self._rows.extend({"step": step, "name": name, "value": value} for name, value in metrics.items())
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes metrics.parquet anew, whole."""
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA), sink)
        self._folder.write_bytes(METRICS, sink.getvalue())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._events is not None:
            self._events.close()
