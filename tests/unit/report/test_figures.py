from __future__ import annotations

import re
import threading

import matplotlib as mpl
import numpy as np

from raysemi.report import figures
from raysemi.report.runs import Curve
from raysemi.report.svg import NUM_SERIES


def drawn(name="loss/total", count=2):
    steps = np.arange(10, 210, 10)
    lines = [figures.Line(Curve(steps, steps / (k + 1), np.ones(20)), k) for k in range(count)]
    return figures.curves(lines, name)


def test_colours_come_from_the_page():
    svg = drawn()
    assert "var(--series-0)" in svg
    assert "var(--series-1)" in svg
    assert "var(--series-2)" not in svg
    assert "var(--rule)" in svg
    assert not re.search(r"#0a0[bc]", svg)
    assert not re.search(r"(fill|stroke): #(?!ffffff)", svg)


def test_text_stays_text_and_nothing_points_outside():
    svg = drawn()
    assert re.search(r"<text[^>]*>200</text>", svg)
    assert "http" not in svg
    assert svg.startswith("<svg")


def test_figures_share_no_ids_and_are_deterministic():
    first, second = (set(re.findall(r'id="([^"]+)"', drawn(name))) for name in ("lr", "loss/total"))
    assert first
    assert not first & second
    assert drawn() == drawn()


def test_a_histogram_shows_shares_and_where_zero_is():
    """Eight of ten values lie in one bin; rounding beyond 1 is counted, and a dashed outline is another branch's."""
    values = np.array([0.5] * 8 + [-0.5, 1.0 + 1e-9])
    svg = figures.histogram([figures.Bars(values, 0), figures.Bars(-values, 1, faint=True)], "cosine", (-1.0, 1.0))
    assert "var(--series-0)" in svg
    assert "var(--series-1)" in svg
    assert "var(--quiet)" in svg
    assert svg.count("stroke-dasharray") == 1
    for text in ("75 %", "-0.5", "0.5"):
        assert re.search(rf"<text[^>]*>{text}</text>", svg), text


def test_a_histogram_of_lengths_spans_decades():
    svg = figures.histogram([figures.Bars(np.array([0.002, 0.03, 4.0, 70.0]), 3)], "norms")
    assert "var(--series-3)" in svg
    for text in ("0.01", "0.1", "1", "10"):
        assert re.search(rf"<text[^>]*>{text}</text>", svg), text


def test_curves_over_decades_leave_out_what_is_0():
    steps = np.arange(1, 30)
    lines = [figures.Line(Curve(steps, np.where(steps < 5, 0.0, 10.0 ** (steps / 10)), None), 0)]
    assert "nan" not in figures.curves(lines, "norms", log=True).lower()


def test_more_groups_than_colours_begin_anew():
    assert drawn(count=NUM_SERIES + 1).count("var(--series-0)") > drawn(count=1).count("var(--series-0)")


def test_settings_of_matplotlib_are_left_alone_and_pyplot_is_not_used():
    before = dict(mpl.rcParams)
    thread = threading.Thread(target=drawn)  # pyplot would complain outside the main thread
    thread.start()
    thread.join()
    assert dict(mpl.rcParams) == before
