"""Verbs of what there is: `raysemi methods`, `weights` (published ones), `doctor` (this machine)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raysemi.cli.exits import FAILURE
from raysemi.cli.options import Json
from raysemi.errors import ConfigError
from raysemi.launch.terminal import print_table


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
