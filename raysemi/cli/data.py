"""Verbs of pools: `raysemi pack`, `index`, `verify`, `plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from raysemi.cli.options import OverRay, Processes
from raysemi.errors import ConfigError
from raysemi.launch.terminal import Bar


def pack(
    source: Annotated[str, typer.Argument(help="folder, voc, cityscapes, coco or scenes.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the source: name=value.")] = None,
    *,
    out: Annotated[str, typer.Option(help="Folder or URL for the pools.")],
    root: Annotated[str | None, typer.Option(help="Folder or URL of the data set.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Labeled images: NAME of a list, FILE, or a number to draw; default: all with a mask."),
    ] = None,
    pools: Annotated[str, typer.Option(help="Which pools to write.")] = "labeled,unlabeled,val",
    seed: Annotated[int, typer.Option(help="Of the draw when --split is a number.")] = 0,
    processes: Processes = None,
    ray: OverRay = "none",
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
    from raysemi.launch.spread import runner

    opened = open_source(source, root, **read_options(source, options or []))
    with runner(ray, processes, {"--root": root, "--out": out}) as run, Bar("images") as bar:
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
            run=run,
        )
    for name, pool in made.items():
        if name == "labeled" and "list" in pool.made:
            typer.echo(f"labeled images: those of the list {pool.made['list']}")
        elif name == "labeled" and "drawn" in pool.made:
            typer.echo(f"labeled images: {pool.made['drawn']} drawn at random, seed {pool.made['seed']}")
        typer.echo(f"{name}: {pool.num_samples} images, {len(pool.shards)} shards, {pool.path}")


def index(
    pool: Annotated[str, typer.Argument(help="Folder or URL with tar shards.")],
    classes: Annotated[str | None, typer.Option(help="File with a class name a line; needed for masks.")] = None,
    mask_suffix: Annotated[str, typer.Option(help="What follows the key in a mask's name.")] = "mask.png",
    processes: Processes = None,
    ray: OverRay = "none",
) -> None:
    """Write the index of shards that someone else made; afterwards they are a pool."""
    from raysemi.data.index import index_shards
    from raysemi.data.paths import as_path
    from raysemi.data.sources import read_list
    from raysemi.launch.spread import runner

    names = read_list(as_path(classes)) if classes else []
    with runner(ray, processes, {"POOL": pool}) as run, Bar("shards") as bar:
        made = index_shards(pool, classes=names, mask_suffix=mask_suffix, processes=processes, progress=bar, run=run)
    typer.echo(f"{made.num_samples} images, {len(made.shards)} shards, {made.path}")


def verify(
    pool: Annotated[str, typer.Argument(help="Pool, local or URL.")],
    decode: Annotated[
        bool, typer.Option("--decode", help="Also decode every image and mask: sizes, classes, nothing cut short.")
    ] = False,
    processes: Processes = None,
) -> None:
    """Read every byte of a pool again and compare it with its digests; names what is damaged, down to the keys."""
    from raysemi.data import verify as checking
    from raysemi.data.pool import Pool

    opened = Pool.open(pool)
    with Bar("shards") as bar:
        checking.verify(opened, bar, decode=decode, processes=processes)
    can = ", and all can be decoded" if decode else ""
    typer.echo(f"{opened.num_samples} images in {len(opened.shards)} shards are as they were written{can}")


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
