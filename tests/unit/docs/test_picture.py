"""The picture of docs/architecture.md is what its script draws now, and nothing in it overlaps."""

from __future__ import annotations

import itertools
import runpy
import xml.etree.ElementTree as ET

import pytest
from documents import ROOT
from test_layers import LAYERS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> str:
    return runpy.run_path(str(ROOT / "docs/picture.py"))["draw"]()


def test_the_committed_picture_is_the_drawn_one(drawn: str) -> None:
    committed = (ROOT / "docs/pictures/architecture.svg").read_text(encoding="utf-8")
    assert committed == drawn, "run `python docs/picture.py`"


def test_every_layer_and_package_is_there(drawn: str) -> None:
    words = [element.text for element in ET.fromstring(drawn).iter(f"{SVG}text")]
    for name, layer in LAYERS.items():
        assert f"{layer:g}" in words
        assert any(name.removeprefix("raysemi.") in part for text in words for part in text.split(" · ")), name


def test_boxes_neither_overlap_nor_cut_their_text(drawn: str) -> None:
    root = ET.fromstring(drawn)
    number = lambda element, name: float(element.get(name))  # noqa: E731
    boxes = [
        tuple(number(rect, name) for name in ("x", "y", "width", "height"))
        for rect in root.iter(f"{SVG}rect")
        if rect.get("fill") != "none" and number(rect, "height") > 20
    ]
    assert len(boxes) == 15 + len(set(LAYERS.values()))
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    width, height = (float(size) for size in root.get("viewBox").split()[2:])
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
    for text in root.iter(f"{SVG}text"):
        x, y, size = (number(text, name) for name in ("x", "y", "font-size"))
        room = [w for bx, by, w, h in boxes if bx <= x <= bx + w and by <= y <= by + h]
        if room:
            assert 0.56 * size * len(text.text) < room[0], text.text  # DejaVu Sans, a wide font: 0.51 on average
