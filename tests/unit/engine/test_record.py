"""Metrics of a run: means over steps and ranks, and what a run that was cut off leaves behind."""

from __future__ import annotations

import io
import time

import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raysemi.engine.folder import RunFolder
from raysemi.engine.record import METRICS, Meter, Record, Samples
from raysemi.methods.base import SingleRank


class TwoRanks(SingleRank):
    """The other rank measured 10 more at every step."""

    world = 2

    def __init__(self, steps):
        self.steps = steps

    def sum(self, value):
        return 2 * value + 10 * self.steps


def add(meter, *losses, images=3):
    for loss in losses:
        meter.add({"loss": torch.tensor(loss), "norm": torch.tensor(2 * loss)}, images=images)


def test_means_over_steps_and_ranks():
    meter = Meter()
    assert meter.read(SingleRank()) == {}
    add(meter, 1.0, 2.0, 6.0)
    alone = meter.read(SingleRank())
    assert (alone["loss"], alone["norm"]) == (3.0, 6.0)
    assert meter.read(SingleRank()) == {}  # reading empties it
    add(meter, 1.0, 2.0, 6.0)
    both = meter.read(TwoRanks(3))
    assert (both["loss"], both["norm"]) == (8.0, 11.0)


def test_the_rate_counts_images_of_all_ranks_and_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("raysemi.engine.record.time.perf_counter", lambda: now[0])
    meter = Meter()
    add(meter, 1.0, 1.0)
    now[0] = 104.0
    assert meter.read(SingleRank())["images_per_s"] == 1.5
    add(meter, 1.0, 1.0)
    now[0] = 106.0
    assert meter.read(TwoRanks(2))["images_per_s"] == 6.0
    add(meter, 5.0)
    now[0] = 999.0
    meter.restart_clock()  # after an evaluation
    add(meter, 7.0)
    now[0] = 1000.0
    read = meter.read(SingleRank())
    assert (read["images_per_s"], read["loss"]) == (3.0, 6.0)


def test_the_share_of_the_time_that_steps_wait_for_their_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("raysemi.engine.record.time.perf_counter", lambda: now[0])

    def slow():
        for batch in range(4):
            now[0] += 3.0
            yield batch

    meter, seen = Meter(), []
    meter.restart_clock()
    for batch in meter.waiting(slow()):
        now[0] += 1.0  # the step
        add(meter, 1.0)
        seen.append(batch)
        if batch == 1:
            assert meter.read(SingleRank())["data/stall"] == 0.75
        if batch == 2:
            now[0] += 50.0
            meter.restart_clock()
    assert seen == [0, 1, 2, 3]
    assert meter.read(SingleRank())["data/stall"] == 0.75


def test_a_meter_does_not_keep_the_graph():
    meter = Meter()
    meter.add({"loss": torch.ones((), requires_grad=True) * 2}, images=1)
    assert not meter._sum.requires_grad


def test_samples_keep_each_step_and_leave_out_what_is_no_number():
    samples = Samples()
    assert list(samples.read()) == []
    for step, cosine in ((3, 0.5), (6, float("nan"))):
        samples.add(step, {"norm": torch.tensor(2.0 * step, requires_grad=True), "cosine": torch.tensor(cosine)})
    assert list(samples.read()) == [(3, {"norm": 6.0, "cosine": 0.5}), (6, {"norm": 12.0})]
    assert list(samples.read()) == []  # reading empties it


def rows(folder):
    return [tuple(row.values()) for row in pq.read_table(io.BytesIO(folder.read_bytes(METRICS))).to_pylist()]


def scalars(folder):
    events = EventAccumulator(folder.path("tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
    folder = RunFolder(tmp_path / "run")
    record = Record(folder, 0)
    for step in (2, 4, 6):
        record.write(step, {"loss": step / 2, "lr": 0.5})
    record.flush()
    record.write(8, {"loss": 4.0})
    record.close()
    assert rows(folder)[:2] == [(2, "loss", 1.0), (2, "lr", 0.5)]
    assert [row[0] for row in rows(folder)] == [2, 2, 4, 4, 6, 6, 8]

    time.sleep(1.0)  # TensorBoard reads files in the order of their names, which say the second
    again = Record(folder, 4)  # cut off after step 8; the last checkpoint was at 4
    again.write(6, {"loss": 30.0})
    again.close()
    assert [row for row in rows(folder) if row[1] == "loss"] == [(2, "loss", 1.0), (4, "loss", 2.0), (6, "loss", 30.0)]
    assert scalars(folder)["loss"] == [(2, 1.0), (4, 2.0), (6, 30.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_written_as_it_is(tmp_path, value):
    record = Record(RunFolder(tmp_path), 0)
    record.write(1, {"loss": value})
    record.close()
    assert rows(RunFolder(tmp_path))[0][2] == pytest.approx(value, nan_ok=True)
