"""Draws docs/pictures/architecture.svg: how an image becomes a trained network, and the layers of the code.

    python docs/picture.py

Layers and their packages are those that tests/test_layers.py enforces; a box has the colour of its package's layer. The
same text comes out everywhere (tests/unit/docs/test_picture.py). Colours and text stand on filled boxes, so that the
picture is readable on light pages and on dark ones.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/pictures/architecture.svg"
WIDTH, HEIGHT = 800, 746
FILL = {0.0: "#e3e6ea", 1.0: "#cfe3f7", 2.0: "#d3efd3", 3.0: "#fbe5b8", 3.5: "#ecebf5", 4.0: "#e4d5f5", 5.0: "#f8d3dc"}
"""Of a box, by layer."""
STORED, TEXT, QUIET, LINE = "#ffffff", "#1b2129", "#4a545f", "#7c8794"
UNKNOWN = {0.0: "state, ranks, files", 1.0: "methods, ranks", 2.0: "torch.distributed, ray, deepspeed", 3.0: "ray"}
"""What a layer knows nothing of."""
OUTER = {5.0: "raysemi: cli, api, bench, demo"}
"""What the name of a package does not say."""


def layers() -> dict[str, float]:
    """Package -> layer, as tests/test_layers.py has them."""
    tree = ast.parse((ROOT / "tests/test_layers.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS":
            return {name: float(layer) for name, layer in ast.literal_eval(node.value).items()}
    raise LookupError("LAYERS")


def text(
    x: float, y: float, words: str, size: int = 13, anchor: str = "middle", fill: str = TEXT, bold: bool = False
) -> str:
    """A line of text."""
    weight = ' font-weight="600"' if bold else ""
    look = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}'
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(words)}</text>'


def box(x: float, y: float, w: float, title: str, *lines: str, part: str | None = None) -> Iterator[str]:
    """A box of height 62 with a title and two lines; `part` is the package whose layer gives its colour."""
    fill = STORED if part is None else FILL[layers()[part]]
    yield f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="62" rx="7" fill="{fill}" stroke="{LINE}"/>'
    yield text(x + w / 2, y + 19, title, bold=True)
    for number, line in enumerate(lines):
        yield text(x + w / 2, y + 36 + 16 * number, line, 11, fill=QUIET)


def arrow(*points: tuple[float, float]) -> str:
    """A line with a head at its end."""
    way = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{way}" fill="none" stroke="{LINE}" stroke-width="1.8" marker-end="url(#head)"/>'


def label(x: float, y: float, words: str, width: float) -> Iterator[str]:
    """Words beside an arrow or on a frame, on a ground of their own."""
    yield f'<rect x="{x - width / 2:g}" y="{y - 12:g}" width="{width:g}" height="17" rx="8" fill="#f4f5f7"/>'
    yield text(x, y + 1, words, 11, fill=QUIET)


def frame(inset: float, top: float, bottom: float, words: str, width: float) -> Iterator[str]:
    """What runs around the rest: a dashed frame with its name on the upper edge."""
    yield (
        f'<rect x="{inset:g}" y="{top:g}" width="{WIDTH - 2 * inset:g}" height="{bottom - top:g}" rx="10" fill="none" '
        f'stroke="{LINE}" stroke-width="1.3" stroke-dasharray="5 4"/>'
    )
    yield from label(WIDTH - inset - 18 - width / 2, top + 4, words, width)


def flow() -> Iterator[str]:
    """From files to a report."""
    left, wide, step = 44, 160, 184  # four boxes and three gaps of 24
    x = [left + step * column for column in range(4)]
    middle = [start + wide / 2 for start in x]
    yield from box(x[0], 10, wide, "files", "images, a few masks", "on a disk, in a store")
    yield from box(x[1], 10, wide, "pools", "tar shards", "index.parquet, pool.json")
    yield from box(x[3], 10, wide, "pseudo-labels", "predict --shards:", "a pool again")
    yield arrow((x[0] + wide, 41), (x[1] - 2, 41))
    yield from label(x[1] - 12, 88, "raysemi pack", 92)
    yield arrow((x[3], 41), (x[1] + wide + 2, 41))
    yield from frame(10, 110, 376, "a job: raysemi submit, ray job submit, RayJob", 286)
    yield from frame(20, 138, 366, "a trial of a sweep: Ray Tune, Optuna", 226)
    yield from frame(30, 166, 356, "N ranks: Ray Train, or torchrun, or one process", 292)
    first, second = 190, 280
    yield from box(x[0], first, wide, "order", "which sample, which slot:", "pool, seed, step", part="raysemi.data")
    yield from box(x[1], first, wide, "reader", "ranges, ahead of need", "checksums", part="raysemi.data")
    yield from box(x[2], first, wide, "views", "weak view; strong ones'", "drawn parameters", part="raysemi.data")
    yield from box(x[3], first, wide, "loader", "HostBatch: uint8,", "processes of a rank", part="raysemi.data")
    yield arrow((middle[1], 72), (middle[1], first - 2))
    for column in range(3):
        yield arrow((x[column] + wide, first + 31), (x[column + 1] - 2, first + 31))
    yield from box(
        x[3], second, wide, "batch on the device", "SemiBatch: RGB in [0, 1]", "colours", part="raysemi.engine"
    )
    yield from box(
        x[2], second, wide, "method", "a sum and its normaliser", "weighting, CutMix", part="raysemi.methods"
    )
    yield from box(
        x[1], second, wide, "gradient rule", "joined over ranks", "uniform, fixed, pareto", part="raysemi.engine"
    )
    yield from box(x[0], second, wide, "step", "single, ddp, ZeRO", "student, average", part="raysemi.engine")
    yield arrow((middle[3], first + 62), (middle[3], second - 2))
    for column in (3, 2, 1):
        yield arrow((x[column], second + 31), (x[column - 1] + wide + 2, second + 31))
    third = 402
    yield arrow((middle[0], second + 62), (middle[0], third - 2))
    yield from box(x[0], third, wide, "run folder", "checkpoints, config", "metrics.parquet")
    yield from box(
        x[1], third, wide, "report.html", "curves, tables, pictures", "of runs and sweeps", part="raysemi.report"
    )
    yield from box(
        x[2], third, wide, "seen from outside", "Prometheus, JSON logs", "MLflow, W&B", part="raysemi.launch"
    )
    yield from box(
        x[3], third, wide, "evaluate, predict", "on ranks, on Ray Data", "export: ONNX", part="raysemi.launch"
    )
    yield arrow((x[0] + wide, third + 31), (x[1] - 2, third + 31))
    yield arrow((x[2] + wide / 2, 376), (x[2] + wide / 2, third - 2))
    yield arrow((middle[0], third + 62), (middle[0], third + 80), (middle[3], third + 80), (middle[3], third + 64))
    yield arrow((WIDTH - 44, third + 31), (WIDTH - 4, third + 31), (WIDTH - 4, 41), (WIDTH - 42, 41))


def bands() -> Iterator[str]:
    """The layers, the uppermost first."""
    by_layer: dict[float, list[str]] = {}
    for name, layer in layers().items():
        by_layer.setdefault(layer, []).append(name.removeprefix("raysemi."))
    y = 500
    for layer in sorted(by_layer, reverse=True):
        names = [OUTER[layer] if name == "raysemi" else name for name in by_layer[layer]]
        yield f'<rect x="76" y="{y}" width="680" height="29" rx="6" fill="{FILL[layer]}" stroke="{LINE}"/>'
        yield text(98, y + 19, f"{layer:g}", bold=True)
        yield text(122, y + 19, " · ".join(names), anchor="start")
        if layer in UNKNOWN:
            yield text(744, y + 19, f"knows nothing of {UNKNOWN[layer]}", 11, "end", QUIET)
        y += 34
    yield arrow((56, 504), (56, y - 8))
    yield f'<g transform="rotate(-90 56 {(500 + y) / 2:g})">'
    yield from label(56, (500 + y) / 2 + 1, "imports point down", 128)
    yield "</g>"


def draw() -> str:
    """The whole picture."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'role="img" font-family="Helvetica, Arial, sans-serif">',
            "<title>raysemi: the way of an image, and the layers of the code</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
            *flow(),
            *bands(),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
