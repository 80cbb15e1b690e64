"""Verbs of `raysemi detect`: `train`, `run`, `check`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from raysemi.cli.options import Json, Overrides
from raysemi.launch.terminal import Bar, print_table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Boxes of things: what weighting.detector asks before it remembers an unlabeled pixel.",
)


@app.command("train")
def detect_train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a detector's recipe.")],
    overrides: Overrides = None,
) -> None:
    """Train a detector on the labeled pool; the same command again continues.

    raysemi detect train scenes run=runs/boxes data.pools=pools/scenes
    """
    from raysemi import config_io
    from raysemi.launch.terminal import check_tables, detector_with_progress

    config = config_io.load_detector(recipe, overrides or [])
    result = detector_with_progress(config)
    if "images" in result:
        for table in check_tables(result):
            print_table(*table)


@app.command("run")
def detect_run(
    detector: Annotated[str, typer.Argument(help="Run folder of `raysemi detect train`.")],
    *,
    pool: Annotated[str, typer.Option(help="Pool to search, local or URL.")],
    name: Annotated[str | None, typer.Option(help="NAME of the file; default: that of the run folder.")] = None,
    score: Annotated[float | None, typer.Option(help="Least score that is stored; default: boxes.score.")] = None,
) -> None:
    """Write the boxes that a detector finds, beside the pool: boxes-NAME.parquet, for weighting.detector=NAME.

    The file appears when the last image is done. Interrupted, nothing changes and the same command begins anew.
    """
    from raysemi import api

    with Bar("images") as bar:
        path, boxes = api.find_boxes(detector, pool, name=name, score=score, progress=bar)
    typer.echo(f"{boxes} boxes: {path}")


@app.command("check")
def detect_check(
    source: Annotated[str, typer.Argument(help="Run folder of a detector, or NAME of boxes beside the pool.")],
    *,
    pool: Annotated[str, typer.Option(help="Pool whose images all have masks.")],
    run: Annotated[str | None, typer.Option(help="Segmentation whose pixels are measured in and around boxes.")] = None,
    score: Annotated[
        float | None, typer.Option(help="From which on a box is accepted; default: the detector's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accepted boxes against the things in masks: right is an overlap of 0.8 or more."""
    from raysemi import api
    from raysemi.launch.terminal import check_tables

    with Bar("images") as bar:
        result = api.check_boxes(source, pool, run=run, score=score, progress=bar)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        for table in check_tables(result):
            print_table(*table)
