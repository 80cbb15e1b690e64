"""Verbs of sweeps: `raysemi tune run`, `show`, `report`, `best`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysemi.cli.options import Json
from raysemi.launch.terminal import print_table

if TYPE_CHECKING:
    from raysemi.tune.spaces import Space
    from raysemi.tune.sweep import SweepConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Search settings with Ray Tune and Optuna.",
)
Folder = Annotated[Path, typer.Argument(help="The sweep's folder (--out of `tune run`).")]


def _list_sweeps(wanted: bool) -> None:
    if wanted:
        from raysemi.tune import sweep

        print_table(["sweep", "what it answers"], [[name, sweep.load(name).question] for name in sweep.names()])
        raise typer.Exit


@app.command("run")
def run(
    sweep: Annotated[str, typer.Argument(help="YAML file, or a sweep's name.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings a.b=value in place of the sweep's.")] = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; default sweeps/NAME.")] = None,
    address: Annotated[
        str | None, typer.Option("--ray", help="Ray cluster to join; default: RAY_ADDRESS, or a new one here.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print what would be tried.")] = False,
    names: Annotated[
        bool, typer.Option("--list", help="Name the sweeps that come along.", callback=_list_sweeps, is_eager=True)
    ] = False,
) -> None:
    """Run a sweep; the same command again goes on.

    a.b=value changes the sweep: search.trials=50, set.train.steps=1000, space.method.order=declared.
    raysemi tune run derprop-lambdas set.data.pools=pools/scenes
    """
    from raysemi.tune import driver
    from raysemi.tune import sweep as sweeps
    from raysemi.tune.report import write_report
    from raysemi.tune.show import print_trials
    from raysemi.tune.study import read

    config = sweeps.load(sweep, overrides or [])
    folder = out or Path("sweeps") / Path(sweep).stem
    space = driver.prepare(config, folder, address)
    _announce(config, space)
    if dry_run:
        return
    try:
        driver.run(config, space, folder, address)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{folder} keeps every trial; the same command goes on.") from error
    _, trials, repeats = read(folder)
    print_trials(trials, repeats, alive=False)
    print(f"report: {write_report(folder)}")


@app.command("show")
def show(folder: Folder, as_json: Json = False) -> None:
    """Show the trials of a sweep, while it runs and after."""
    from raysemi.tune.report import as_json as plain
    from raysemi.tune.show import print_trials
    from raysemi.tune.study import is_driven, read

    _, trials, repeats = read(folder)
    if as_json:
        typer.echo(json.dumps({"trials": plain(trials), "repeats": plain(repeats)}))
        return
    print_trials(trials, repeats, alive=is_driven(folder))


@app.command("report")
def report(folder: Folder) -> None:
    """Write the sweep's page and its CSV file."""
    from raysemi.tune.report import write_report

    print(f"report: {write_report(folder)}")


@app.command("best")
def best(
    folder: Folder,
    *,
    out: Annotated[Path | None, typer.Option(help="Recipe to write; default FOLDER/best.yaml.")] = None,
    trial: Annotated[int | None, typer.Option(help="Another trial than the one with the largest mIoU.")] = None,
) -> None:
    """Write the best trial as a recipe, and print the command that trains it again."""
    from raysemi.tune.winner import command, write_recipe

    recipe = write_recipe(folder, out, trial)
    print(f"recipe: {recipe.file}\n{command(recipe)}")


def _announce(config: SweepConfig, space: Space) -> None:
    if config.question:
        print(config.question)
    print(f"methods: {', '.join(str(cell) for cell in space.bases)}")
    columns, rows = space.table()
    if rows:
        print_table(columns, rows)
    search = config.search
    if search.name == "grid":
        print(f"{len(space.grid)} rows, {len(space.seeds)} seeds each")
        print_table(["row", "settings"], [[label, " ".join(space.overrides(draw))] for label, draw in space.grid])
    else:
        hours = f", at most {search.hours:g} hours" if search.hours else ""
        print(f"{search.trials} trials by {search.name}{hours}; stopped early by: {config.prune.name}{_again(config)}")


def _again(config: SweepConfig) -> str:
    from raysemi.tune.sweep import num_repeats

    repeat = config.repeat
    if not repeat.seeds:
        return ""
    seeds = "a new seed" if repeat.seeds == 1 else f"{repeat.seeds} new seeds"
    each = " of each method" if repeat.of == "method" else ""
    beside = ", beside their recipes" if repeat.defaults else ""
    return f"; the best {repeat.best}{each} again on {seeds}{beside}: at most {num_repeats(config)} runs"
