"""The picture of `raysemi bench data`."""

from __future__ import annotations

import numpy as np
import pytest
from makers import call
from PIL import Image

from raysemi.bench.data import DataResult, as_lines
from raysemi.report.rates import draw_rates


def test_a_line_for_each_reader(tmp_path):
    results = [
        DataResult("pool", False, 33, 4, processes, 2, 100.0 * processes, 120.0, 0.8, 200.0, 0.5,
                   {"folder": {"images_per_s": 90.0, "ratio": 1.1}})
        for processes in (2, 1, 4)
    ]  # fmt: skip
    processes, lines = as_lines(results)
    assert processes == [1, 2, 4]
    assert list(lines.values()) == [[100.0, 200.0, 400.0], [120.0] * 3, [90.0] * 3]
    draw_rates(tmp_path / "a.svg", processes, lines, 33)
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    draw_rates(tmp_path / "a.png", processes, lines, 33)
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    colours = {tuple(pixel) for pixel in image.reshape(-1, 3)[::3]}
    assert {(31, 119, 180), (0, 0, 0), (255, 127, 14)} <= colours


@pytest.mark.parametrize("name", ["a.txt", "nowhere/a.png"])
def test_a_file_that_cannot_be_is_refused_at_once(tmp_path, name):
    result = call("bench", "data", tmp_path / "no-pool", "--plot", tmp_path / name)
    assert result.exit_code == 2
    assert "--plot must be a file .png, .svg, .pdf in a folder that exists" in " ".join(result.output.split())
