"""Verbs of `raysemi bench`: `step`, `scale`, `data`, `grid`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from raysemi.cli.exits import FAILURE
from raysemi.cli.options import Json, Overrides
from raysemi.errors import ConfigError
from raysemi.launch.terminal import Bar, print_table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure speed against the least work that could do the same.",
)


@app.command("step")
def bench_step(
    method: Annotated[str | None, typer.Option(help="As in `raysemi methods`.")] = None,
    backbone: Annotated[str | None, typer.Option(help="model.encoder; its weights are random.")] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Side of the images, pixels.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Labeled images a step, and as many unlabeled ones.")] = None,
    *,
    weighting: Annotated[str, typer.Option(help="none or rank.")] = "none",
    gradients: Annotated[
        str, typer.Option(help="uniform, fixed or pareto, whose second backward pass the floor makes too.")
    ] = "uniform",
    precision: Annotated[str, typer.Option(help="train.precision: auto, fp32 or bf16.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="train.compile.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: its own.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Times that step and floor take turns.")] = 15,
    override: Annotated[list[str] | None, typer.Option(help="A setting a.b=value of the run; may be repeated.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every method that goes with these, at its published size, as Markdown.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="--all: folder for a JSON file a method; what is there is not measured again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a whole train step against its floor: the network passes that the method needs, and the optimizer.

    The batch is drawn, so no pool is needed. Peak memory is that of a process of its own for each of the two.
    raysemi bench step --method fixmatch --backbone resnet50 --crop 321 --batch 2
    raysemi bench step --all --out bench/step --threads 1
    """
    from raysemi.bench import step_table
    from raysemi.bench.step import StepSettings, measure_step

    how = {"weighting": weighting, "gradients": gradients, "precision": precision, "compile": compiled}
    rest: dict[str, Any] = {**how, "threads": threads, "overrides": tuple(override or [])}
    if every:
        if out is None or method is not None:
            raise ConfigError("--all must come with --out and without --method; got otherwise. Give --out DIR.")
        sizes = {"encoder": backbone, "crop": crop, "batch": batch}
        rest |= {name: size for name, size in sizes.items() if size is not None}
        settings = step_table.settings_of_all(**rest)
        with Bar("methods") as bar:
            results = step_table.measure_all(settings, out, pairs, bar)
        typer.echo(json.dumps([one.as_json() for one in results]) if as_json else step_table.as_markdown(results))
        return
    if method is None or backbone is None or crop is None or batch is None:
        raise ConfigError(
            "--method, --backbone, --crop and --batch must be given unless --all is; got fewer. Add them."
        )
    with Bar("pairs") as bar:
        result = measure_step(StepSettings(method, backbone, crop, batch, **rest), pairs, bar)
    if as_json:
        typer.echo(json.dumps(result.as_json()))
    else:
        print_table(*result.passes_table())
        typer.echo(result.summary())


@app.command("scale")
def bench_scale(
    method: Annotated[str, typer.Option(help="As in `raysemi methods`.")] = "fixmatch",
    *,
    backbone: Annotated[str, typer.Option(help="model.encoder; its weights are random.")] = "resnet50",
    crop: Annotated[int, typer.Option(min=1, help="Side of the images, pixels.")] = 321,
    batch: Annotated[int, typer.Option(min=1, help="Labeled images of a rank's step, and as many unlabeled ones.")] = 2,
    ranks: Annotated[int, typer.Option(min=2, help="Processes on this machine.")] = 2,
    weighting: Annotated[str, typer.Option(help="none or rank.")] = "none",
    gradients: Annotated[str, typer.Option(help="uniform, fixed or pareto.")] = "uniform",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each rank.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="Times that each way is measured.")] = 15,
    override: Annotated[list[str] | None, typer.Option(help="A setting a.b=value of the run; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Time a step of several ranks against a step of one, with the same work a rank, and count what they tell.

    raysemi bench scale --method derprop --backbone resnet50 --crop 321 --batch 2
    """
    from raysemi.bench.scale import measure_scale
    from raysemi.bench.step import StepSettings

    settings = StepSettings(
        method, backbone, crop, batch, weighting, gradients, threads=threads, overrides=tuple(override or [])
    )
    with Bar("turns") as bar:
        result = measure_scale(settings, ranks, turns, bar)
    typer.echo(json.dumps(result.as_json()) if as_json else result.summary())


@app.command("data")
def bench_data(
    pool: Annotated[str, typer.Argument(help="Pool, a folder; with masks where every sample has one.")],
    *,
    processes: Annotated[str, typer.Option(help="Numbers of loader processes, one measurement each.")] = "0",
    crop: Annotated[int, typer.Option(min=1, help="Side of the views, pixels.")] = 321,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 16,
    images: Annotated[int, typer.Option(min=1, help="Images that each reads in a turn.")] = 256,
    turns: Annotated[int, typer.Option(min=1, help="Times that they take turns.")] = 5,
    beside: Annotated[str, typer.Option(help="Also time these: webdataset, folder, litdata.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Picture of the rates: FILE.png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Time the stream of a pool against its floor: reading, decoding and resizing the same images, nothing else.

    raysemi bench data pools/mine/unlabeled --processes 0,1,2 --beside webdataset,folder
    """
    import torch

    from raysemi.bench.data import DataSettings, as_lines, as_table, measure_data
    from raysemi.report.rates import check_picture, draw_rates

    if plot is not None:
        check_picture("--plot", plot)
    torch.set_num_threads(1)  # as in a loader process
    settings = DataSettings(crop, batch, images, turns, tuple(_words(beside)))
    with Bar("turns") as bar:
        results = measure_data(pool, settings, _naturals("--processes", processes), bar)
    if plot is not None:
        draw_rates(plot, *as_lines(results), crop)
    if as_json:
        typer.echo(json.dumps([result.as_dict() for result in results]))
    else:
        print_table(*as_table(results))


@app.command("grid")
def bench_grid(
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the grid: runs, logs, tables; a begun one goes on.")],
    recipes: Annotated[
        str | None,
        typer.Option(help="What the recipes' names begin with: camvid, or DIR/NAME of own NAME-METHOD.yaml."),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods; default: all with such a recipe.")] = None,
    weighting: Annotated[str, typer.Option(help="Weightings.")] = "none,rank",
    gradients: Annotated[str, typer.Option(help="Gradient rules.")] = "uniform,pareto",
    seeds: Annotated[str, typer.Option(help="Seeds: one run of each cell for each.")] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would run.")] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Only tell what has been found so far.")] = False,
    as_json: Json = False,
) -> None:
    """Train every method with every weighting and gradient rule, over seeds, and compare.

    raysemi bench grid --recipes camvid --methods supervised,fixmatch --out grids/a train.steps=500
    OUT/grid.md, grid.csv and grid.png hold the table and label maps; a run that failed is tried again next time.
    """
    from raysemi.bench import grid, grid_report

    plan = grid.Plan.read(out)
    failed = []
    if not report_only:
        if recipes is None:
            raise ConfigError("--recipes must be given; got nothing. Take camvid, or DIR/NAME of own NAME-METHOD.yaml.")
        new = grid.make_plan(
            out,
            recipes,
            None if methods is None else _words(methods),
            _words(weighting),
            _words(gradients),
            _naturals("--seeds", seeds),
            overrides or [],
        )
        if dry_run:
            rows = [[*run.cell, str(run.seed), run.standing()] for run in grid.runs_of(new, out)]
            rows += [[*cell, "", f"refused: {reason}"] for cell, reason in new.refused]
            print_table(["method", "weighting", "gradients", "seed", "state"], rows)
            return
        for cell, reason in new.refused:
            typer.echo(f"{cell.name} is not run: {reason}", err=True)
        plan = new if plan is None else plan.joined(new)
        plan.write(out)
        failed = grid.run_grid(new, out, jobs, lambda line: typer.echo(line, err=True))
    if plan is None:
        raise ConfigError(f"--out must be the folder of a grid; got {out}, which has no grid.json. Leave out --report.")
    found = grid_report.read_rows(plan, out)
    files = grid_report.write(plan, found, out)
    if as_json:
        typer.echo(json.dumps(grid_report.as_json(plan, found)))
    else:
        print_table(*grid_report.table(plan, found))
        for line in [*grid_report.notes(plan, found), *map(str, files)]:
            typer.echo(line)
    if failed:
        raise typer.Exit(FAILURE)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _naturals(option: str, text: str) -> list[int]:
    if not (words := _words(text)) or not all(word.isdecimal() for word in words):
        raise ConfigError(f"{option} must be numbers from 0 on, separated by commas; got {text!r}. Write 0,1,2.")
    return [int(word) for word in words]
