from __future__ import annotations

import numpy as np
import pytest

from raysemi.report.runs import Group, Run, read_run


def run_with(seed, steps, values):
    curves = {"loss/total": (np.array(steps), np.array(values, float))}
    return Run(f"runs/{seed}", {"seed": seed, "method": {"name": "derprop"}}, None, curves, None, ())


def test_a_curve_is_the_mean_of_the_runs_that_have_the_step():
    group = Group("derprop", (run_with(0, [1, 2, 3], [1, 4, 9]), run_with(1, [1, 2], [3, 8])))
    curve = group.curve("loss/total")
    assert curve.steps.tolist() == [1, 2, 3]
    assert curve.mean.tolist() == [2, 6, 9]
    assert curve.deviation == pytest.approx([np.sqrt(2), np.sqrt(8), 0])
    assert group.curve("loss/other") is None


def test_a_single_run_has_no_band():
    assert Group("derprop", (run_with(0, [1, 2], [1, 4]),)).curve("loss/total").deviation is None


def test_a_long_curve_is_averaged_in_stretches():
    steps = np.arange(1, 1001)
    curve = Group("derprop", (run_with(0, steps, steps * 2.0),)).curve("loss/total", most_points=10)
    assert curve.steps.tolist() == list(range(100, 1001, 100))
    assert curve.mean == pytest.approx(np.arange(101, 2000, 200))


def test_metrics_are_read_with_the_later_of_two_rows_and_without_gaps(make_run):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = make_run("a", pictures=False)
    columns = {"step": [2, 1, 2, 3], "name": ["lr"] * 4, "value": [0.5, 0.9, 0.6, float("nan")]}
    pq.write_table(pa.table(columns), folder / "metrics.parquet")
    steps, values = read_run(folder).curves["lr"]
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [0.9, 0.6]


def test_confusions_of_a_group_are_added(make_run):
    runs = [read_run(make_run(str(seed), seed=seed, pictures=False)) for seed in (0, 1)]
    total = Group("derprop", tuple(runs)).confusion.matrix_KK
    assert np.array_equal(total, runs[0].confusion.matrix_KK + runs[1].confusion.matrix_KK)
