"""Verbs of runs: `raysemi train`, `evaluate`, `predict`, `report`, `demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from raysemi.cli.options import Best, Json, Overrides, Run, Settings
from raysemi.errors import ConfigError
from raysemi.launch import logs
from raysemi.launch.terminal import Bar, is_first_rank, print_results, print_table, train_with_progress


def _list_recipes(wanted: bool) -> None:
    if wanted:
        from raysemi import catalogue

        print_table(*catalogue.recipes_table())
        raise typer.Exit


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or a recipe's name.")],
    overrides: Overrides = None,
    *,
    names: Annotated[
        bool, typer.Option("--list", help="Name the recipes that come along.", callback=_list_recipes, is_eager=True)
    ] = False,
) -> None:
    """Train a recipe; the same command again continues the run.

    raysemi train scenes-fixmatch run=runs/a train.steps=200 ray.num_workers=2 (ray=none: without Ray)
    """
    from raysemi import config_io

    config = config_io.load(recipe, overrides or [])
    result = train_with_progress(config)
    if not is_first_rank():
        return
    if logs.as_json():
        logs.say("ended", result=result)
    else:
        print_results({config.run: result})


def evaluate(
    run: Run,
    overrides: Settings = None,
    *,
    pool: Annotated[str | None, typer.Option(help="Labeled pool; default: the run's data.val.")] = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Measure a run on a labeled pool."""
    from raysemi import api

    which: Any = "best" if best else "last"
    with Bar("images") as bar:
        result = api.evaluate(run, pool, overrides=overrides or [], which=which, progress=bar)
    if is_first_rank() and as_json:
        typer.echo(json.dumps(result))
    elif is_first_rank():
        print_results({run: result}, classes=True)


def predict(
    run: Run,
    overrides: Settings = None,
    *,
    out: Annotated[str, typer.Option(help="Folder for labels/ and overlays/, or for the pool of --shards.")],
    images: Annotated[Path | None, typer.Option(help="Folder of image files.")] = None,
    pool: Annotated[str | None, typer.Option(help="Pool, in place of --images.")] = None,
    best: Best = False,
    shards: Annotated[
        bool, typer.Option("--shards", help="Write a pool: the images with label maps and confidences.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="With --shards: Ray workers; default: this process, without Ray.")
    ] = None,
    min_confidence: Annotated[
        float | None, typer.Option(help="With --shards: pixels that are less probable become 255; default: 0.")
    ] = None,
) -> None:
    """Write an index mask and a colour overlay for every image, at its own size; or a pool of pseudo-labels.

    raysemi predict runs/a --pool pools/unlabeled --shards --min-confidence 0.9 --out pools/pseudo (the same command
    goes on with what is finished)
    """
    from raysemi import api

    which: Any = "best" if best else "last"
    given = [
        name for name, value in (("--workers", workers), ("--min-confidence", min_confidence)) if value is not None
    ]
    if given and not shards:
        raise ConfigError(f"{given[0]} must come with --shards; got it without. Add --shards or leave it out.")
    with Bar("images") as bar:
        how: dict[str, Any] = {"overrides": overrides or [], "which": which, "progress": bar}
        if shards:
            if pool is None or images is not None:
                raise ConfigError("--shards must have a --pool, and no --images; got another source. Pack the images.")
            how |= {"min_confidence": min_confidence or 0.0, "workers": workers}
            made = api.predict_shards(run, pool=pool, out=out, **how)
            where = f"{made.num_samples} images: {len(made.shards)} shards, {made.path}"
        else:
            done = api.predict(run, images=images, pool=pool, out=out, **how)
            where = f"{done} images: {Path(out) / 'labels'}, {Path(out) / 'overlays'}"
    if is_first_rank():
        typer.echo(where)


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders, local or URLs; seeds of one run become one row.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default: in the folder of a single run, else here.")
    ] = None,
) -> None:
    """Write one HTML file with curves, tables and pictures, and the tables as CSV and LaTeX."""
    from raysemi.report.page import build_report

    own = len(runs) == 1 and "://" not in runs[0]
    typer.echo(build_report(runs, out or (Path(runs[0]) if own else Path()) / "report.html"))


def demo(
    folder: Annotated[Path, typer.Option(help="Where pools and runs go.")] = Path(),
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 2,
) -> None:
    """Draw a data set, train supervised and derprop from the same few labels, compare."""
    from raysemi.demo import run_demo

    run_demo(folder, workers)
