"""The command line: every command a few lines over `raysemi.api` and its neighbours.

Only typer is imported here at once: torch and the like come with the command that needs them, so that help is instant.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from raysemi import __version__
from raysemi.errors import CheckpointError, ConfigError, DataError, DataFailure, RaysemiError
from raysemi.launch.terminal import Bar, is_first_rank, log_to_stderr, print_results, print_table, train_with_progress

MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes: the user's mistake, a failure, Ctrl-C."""
GOES_ON = {"pack", "train", "demo"}
"""Commands that keep what was finished when Ctrl-C came; every other one begins anew."""


class _Commands(typer.core.TyperGroup):
    """Turns our errors into one line and an exit code; anything else is a defect and keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RaysemiError as error:
            for line in str(error).splitlines():
                typer.secho(f"error: {line}", err=True, fg="red" if sys.stderr.isatty() else None)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt as error:
            next_time = "goes on with what is finished" if ctx.invoked_subcommand in GOES_ON else "begins anew"
            typer.echo(f"\nstopped. {str(error) or f'The same command {next_time}.'}", err=True)
            raise typer.Exit(INTERRUPTED) from error


def exit_code(error: RaysemiError) -> int:
    """2 for what the user can set right, 1 for what failed around it (a full disk, a dead worker)."""
    from_system = isinstance(error, CheckpointError) and isinstance(error.__cause__, OSError)
    failure = isinstance(error, DataFailure) or from_system or _for_want_of_room(error)
    mistake = isinstance(error, ConfigError | DataError | CheckpointError) and not failure
    return MISTAKE if mistake else FAILURE


def _for_want_of_room(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing Rich takes longer than all the rest of --help
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Semantic segmentation from few labels and a large unlabeled pool.",
)

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure speed against the least work that could do the same.",
)
app.add_typer(bench, name="bench")

detect = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Boxes of things: what weighting.detector asks before it remembers an unlabeled pixel.",
)
app.add_typer(detect, name="detect")

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings a.b=value in place of the recipe's.")]
Settings = Annotated[list[str] | None, typer.Argument(help="eval.*=value in place of the run's own.")]
Run = Annotated[str, typer.Argument(help="Run folder, local or URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
Best = Annotated[bool, typer.Option("--best", help="The best checkpoint on validation instead of the last.")]
Processes = Annotated[int | None, typer.Option(help="Processes; default: one a core.")]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; ends the process with its exit code."""
    app(args=arguments, prog_name="raysemi")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    log_to_stderr(logging.DEBUG if verbose else logging.INFO)


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="folder, voc, cityscapes, coco or scenes.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the source: name=value.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the pools.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Labeled images: NAME of a list, FILE, or a number to draw; default: all with a mask."),
    ] = None,
    pools: Annotated[str, typer.Option(help="Which pools to write.")] = "labeled,unlabeled,val",
    seed: Annotated[int, typer.Option(help="Of the draw when --split is a number.")] = 0,
    processes: Processes = None,
    shard_samples: Annotated[int | None, typer.Option(help="Images a shard; default: 256.")] = None,
    keep_unlabeled_masks: Annotated[
        bool, typer.Option("--keep-unlabeled-masks", help="Store masks of unlabeled images, to measure.")
    ] = False,
    escape_dots: Annotated[bool, typer.Option("--escape-dots", help="Replace dots in keys by _ .")] = False,
    allow_same_images: Annotated[
        bool, typer.Option("--allow-same-images", help="Accept equal images in two pools.")
    ] = False,
) -> None:
    """Write a data set as pools of tar shards: OUT/labeled, OUT/unlabeled, OUT/val.

    folder: ROOT/images/{train,val}, ROOT/labels/{train,val}, ROOT/classes.txt (or the option classes=FILE).
    voc: option sbd=DIR. coco, voc: check=false. scenes, drawn: train=800 val=100 size=128 seed=0, no --root.
    The papers' lists come along: voc --split 92, cityscapes --split 1_16, coco --split 1_512 (another name lists all).
    coco --pools unlabeled images=unlabeled2017: a pool of the images that COCO leaves unlabeled.
    """
    from raysemi.data import pack as packing
    from raysemi.data.sources import open_source, read_options

    opened = open_source(source, root, **read_options(source, options or []))
    with Bar("images") as bar:
        made = packing.pack(
            opened,
            out,
            split=int(split) if split and split.isdecimal() else split,
            pools=[name.strip() for name in pools.split(",")],
            seed=seed,
            processes=processes,
            shard_samples=packing.SHARD_SAMPLES if shard_samples is None else shard_samples,
            keep_unlabeled_masks=keep_unlabeled_masks,
            escape_dots=escape_dots,
            allow_same_images=allow_same_images,
            progress=bar,
        )
    for name, pool in made.items():
        if name == "labeled" and "list" in pool.made:
            typer.echo(f"labeled images: those of the list {pool.made['list']}")
        elif name == "labeled" and "drawn" in pool.made:
            typer.echo(f"labeled images: {pool.made['drawn']} drawn at random, seed {pool.made['seed']}")
        typer.echo(f"{name}: {pool.num_samples} images, {len(pool.shards)} shards, {pool.path}")


@app.command()
def index(
    pool: Annotated[str, typer.Argument(help="Folder or URL with tar shards.")],
    classes: Annotated[Path | None, typer.Option(help="File with a class name a line; needed for masks.")] = None,
    mask_suffix: Annotated[str, typer.Option(help="What follows the key in a mask's name.")] = "mask.png",
    processes: Processes = None,
) -> None:
    """Write the index of shards that someone else made; afterwards they are a pool."""
    from raysemi.data.index import index_shards
    from raysemi.data.sources import read_list

    names = read_list(classes) if classes else []
    with Bar("shards") as bar:
        made = index_shards(pool, classes=names, mask_suffix=mask_suffix, processes=processes, progress=bar)
    typer.echo(f"{made.num_samples} images, {len(made.shards)} shards, {made.path}")


@app.command()
def verify(pool: Annotated[str, typer.Argument(help="Pool, local or URL.")]) -> None:
    """Read every byte of a pool again and compare it with its digests."""
    from raysemi.data import pool as pools

    opened = pools.Pool.open(pool)
    with Bar("shards") as bar:
        pools.verify(opened, bar)
    typer.echo(f"{opened.num_samples} images in {len(opened.shards)} shards are as they were written")


@app.command()
def plan(
    pool: Annotated[str, typer.Argument(help="Pool, local or URL.")],
    batch: Annotated[int, typer.Option(min=1, help="Images of a step over all ranks.")],
    world: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="The rank to print.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="First step.")] = 0,
    stop: Annotated[int, typer.Option(min=0, help="Step after the last.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
) -> None:
    """Print the keys that a rank reads, a line a step, separated by tabs (a key may hold spaces, never a tab)."""
    from raysemi.data.order import Order
    from raysemi.data.pool import Pool

    if rank >= world or batch % world:
        raise ConfigError(f"--rank must be below --world, which divides --batch; got {rank}, {world} and {batch}.")
    opened, share = Pool.open(pool), batch // world
    order = Order(opened.shard_rows, opened.digest, seed, batch)
    for step in range(start, stop):
        rows, _ = order.slots(step, rank * share, (rank + 1) * share)
        typer.echo("\t".join(opened.key(int(row)) for row in rows))


def _list_recipes(wanted: bool) -> None:
    if wanted:
        from raysemi import catalogue

        print_table(*catalogue.recipes_table())
        raise typer.Exit


@app.command()
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
    if is_first_rank():
        print_results({config.run: result})


@app.command()
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


@app.command()
def predict(
    run: Run,
    overrides: Settings = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for labels/ and overlays/.")],
    images: Annotated[Path | None, typer.Option(help="Folder of image files.")] = None,
    pool: Annotated[str | None, typer.Option(help="Pool, in place of --images.")] = None,
    best: Best = False,
) -> None:
    """Write an index mask and a colour overlay for every image, at its own size."""
    from raysemi import api

    which: Any = "best" if best else "last"
    with Bar("images") as bar:
        done = api.predict(run, images=images, pool=pool, out=out, overrides=overrides or [], which=which, progress=bar)
    if is_first_rank():
        typer.echo(f"{done} images: {out / 'labels'}, {out / 'overlays'}")


@app.command()
def weights(
    name: Annotated[str, typer.Argument(help="Encoder, as in model.encoder.")],
    *,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    stem: Annotated[str, typer.Option(help="Of resnet50 and resnet101, as in model.stem.")] = "deep",
) -> None:
    """Download the published first weights of an encoder into a file, for machines without a connection.

    There: model.encoder=NAME model.weights=FILE. Names: resnet50, resnet101 (deep stem: gluon's; plain:
    torchvision's), xception65, vit_{small,base,large}_patch14_dinov2, or any encoder that timm has weights for.
    """
    from raysemi.models.encoders import build_encoder
    from raysemi.models.weights import download, save_tensors

    if stem not in ("deep", "plain"):
        raise ConfigError(f"--stem must be deep or plain; got {stem}. Leave it out for the papers' networks.")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out must end in .safetensors; got {out}. Choose another name.")
    encoder = build_encoder(name, "plain" if stem == "plain" else "deep", output_stride=16)
    save_tensors(download(encoder, name), out)
    typer.echo(f"{encoder.published_as}: {out}")


@app.command()
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


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see all of its settings.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or all settings of one with default, meaning and search range."""
    from raysemi import catalogue

    if as_json:
        shown = [catalogue.describe(each) for each in catalogue.names()] if name is None else catalogue.describe(name)
        typer.echo(json.dumps(shown))
    elif name is None:
        print_table(*catalogue.table())
    else:
        typer.echo("\n".join(catalogue.summary(name)))
        print_table(*catalogue.settings_table(name))


@detect.command("train")
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


@detect.command("run")
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


@detect.command("check")
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


@bench.command("step")
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


@bench.command("grid")
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


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="Folder on the disk that runs and pools will use.")] = Path(),
    as_json: Json = False,
) -> None:
    """Say what this machine has and what is missing."""
    from raysemi import doctor as examination

    findings = examination.examine(path)
    report = examination.as_json(findings)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        print_table(["", "", "found", "what to do"], [[f.state, f.name, f.value, f.advice] for f in findings])
    if not report["ok"]:
        raise typer.Exit(FAILURE)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where pools and runs go.")] = Path(),
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 2,
) -> None:
    """Draw a data set, train supervised and derprop from the same few labels, compare."""
    from raysemi.demo import run_demo

    run_demo(folder, workers)


if __name__ == "__main__":
    main()
