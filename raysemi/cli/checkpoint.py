"""Verbs of `raysemi checkpoint`: `show`, `verify`, `export`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from raysemi.cli.exits import MISTAKE
from raysemi.cli.options import Json
from raysemi.errors import ConfigError
from raysemi.launch.terminal import print_table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Checkpoints of a run: what there is, whether it is whole, a file of the network.",
)
RunOrCheckpoint = Annotated[
    str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run folder or RUN/checkpoints/step-N, local or URL.")
]


@app.command("show")
def checkpoint_show(path: RunOrCheckpoint, as_json: Json = False) -> None:
    """List the checkpoints of a run, or the files of one. Sizes are compared; `verify` reads the bytes."""
    from raysemi.engine import inventory
    from raysemi.engine.checkpoint import locate

    folder, step = locate(path)
    shown = [inventory.show(folder, one) for one in inventory.find_steps(folder, step)]
    best = inventory.best(folder)
    if as_json:
        typer.echo(json.dumps({"run": folder.location, "best": best, "checkpoints": shown}))
        return
    if step is None:
        columns = ["step", "size", "files", "ranks", "raysemi", "torch", ""]
        print_table(columns, [_summary(one, best) for one in shown])
    else:
        files = shown[0]["files"].items()
        columns = ["file", "bytes", "tensors", "sha256"]
        print_table(columns, [[name, str(f["bytes"]), str(f.get("tensors", "-")), f["sha256"]] for name, f in files])
        typer.echo(shown[0]["fault"] or f"{_size(shown[0]['bytes'])}, of {shown[0]['world'] or 1} ranks")


def _summary(shown: dict[str, Any], best: dict[str, Any] | None) -> list[str]:
    versions = shown["versions"] or {}
    marks = ["best"] if best is not None and best["step"] == shown["step"] else []
    if shown["fault"]:
        marks.append(f"broken: {shown['fault']}")
    about = [str(shown["world"] or "-"), versions.get("raysemi", "-"), versions.get("torch", "-")]
    return [str(shown["step"]), _size(shown["bytes"]), str(len(shown["files"])), *about, ", ".join(marks)]


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


@app.command("verify")
def checkpoint_verify(path: RunOrCheckpoint, as_json: Json = False) -> None:
    """Read every byte of the checkpoints of a run, or of one; name each fault. Exit code 2 when one is broken."""
    from raysemi.engine import inventory
    from raysemi.engine.checkpoint import locate

    folder, step = locate(path)
    found = [inventory.verify(folder, one) for one in inventory.find_steps(folder, step)]
    left = inventory.unfinished(folder) if step is None else []
    best = inventory.best(folder) if step is None else None
    lost = best["fault"] if best else None
    ok = all(one["ok"] for one in found) and not lost
    if as_json:
        told = {"run": folder.location, "ok": ok, "checkpoints": found, "unfinished": left, "best": best}
        typer.echo(json.dumps(told))
    else:
        for one in found:
            typer.echo(f"step {one['step']}: {'whole' if one['ok'] else 'broken'}")
            for fault in one["faults"]:
                typer.echo(f"  {fault}")
            for other in one["others"]:
                typer.echo(f"  {other}: not of the checkpoint, never read")
        for name in left:
            typer.echo(f"{name}: unfinished; the next start of the run sweeps it")
        if lost:
            typer.echo(lost)
    if not ok:
        raise typer.Exit(MISTAKE)


@app.command("export")
def checkpoint_export(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN|CHECKPOINT|FILE", help="Run folder, one of its checkpoints, or a .safetensors."),
    ],
    *,
    out: Annotated[Path, typer.Option(help="FILE.safetensors or FILE.onnx.")],
    which: Annotated[str, typer.Option(help="Of a run: best, last or a step.")] = "last",
    size: Annotated[
        str | None, typer.Option(help="Of an .onnx: HEIGHTxWIDTH of its images; default: any, but for transformers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the evaluated network into one file, with classes, colours, mean and std, and where it comes from.

    raysemi checkpoint export runs/a --which best --out a.onnx
    """
    if out.suffix not in (".safetensors", ".onnx"):
        raise ConfigError(f"--out must end in .safetensors or .onnx; got {out}. Choose another name.")
    if which not in ("best", "last") and not which.isdigit():
        raise ConfigError(f"--which must be best, last or a step; got {which}. Leave it out for the last.")
    sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size or "1x1")
    if sides is None or (size is not None and out.suffix != ".onnx"):
        raise ConfigError(
            f"--size must be HEIGHTxWIDTH, and come with an .onnx; got {size}. Leave it out for any size."
        )
    from raysemi.launch.exported import export

    fixed = None if size is None else (int(sides[1]), int(sides[2]))
    wanted: Any = int(which) if which.isdigit() else which
    report = export(run, out, wanted, fixed)
    if as_json:
        typer.echo(json.dumps(report))
        return
    typer.echo(f"step {report['step']} of {run}: {out}, {_size(report['bytes'])}")
    if check := report["check"]:
        sizes = ", ".join("x".join(str(side) for side in one) for one in check["images"])
        typer.echo(
            f"onnxruntime against torch on images {sizes}: logits up to {check['max_logit']:.3g} differ by "
            f"{check['max_difference']:.3g} at most, the same class in {100 * check['agreement']:.3f} % of the pixels"
        )
