"""`raysemi submit`: another command, as a job of a Ray cluster."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysemi.errors import ConfigError

if TYPE_CHECKING:
    from raysemi.launch.submit import Cluster, Job

_PATHS = ("run", "root", "out", "images", "pool", "boxes")
"""Parameters of commands that name what all machines must see under one name."""


def submit(
    arguments: Annotated[list[str], typer.Argument(help="Of the command: RECIPE a.b=value ..., or what it takes.")],
    address: Annotated[
        str | None, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Job server: http://HEAD:8265.")
    ] = None,
    kind: Annotated[str, typer.Option("--job", help="train, pack, index, evaluate, predict or sweep.")] = "train",
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of the job's own process: evaluate, predict.")] = 0,
    installed: Annotated[
        bool, typer.Option("--installed", help="Run the cluster's raysemi, even from a checkout.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Send nothing; print the RayJob for kubectl.")] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(help="With --dry-run: gpu-kueue, spot, cpu-trial or a folder like these (needs kubectl)."),
    ] = None,
    image: Annotated[str | None, typer.Option(help="With --dry-run: image in place of the manifest's.")] = None,
    follow: Annotated[bool, typer.Option(help="Show the log until the end, and end as the job does.")] = True,
    stop_with_me: Annotated[
        bool, typer.Option("--stop-with-me", help="Ctrl-C stops the job too, without asking.")
    ] = False,
) -> None:
    """Run a command on a Ray cluster; the exit code is the command's own.

    raysemi submit scenes-derprop run=/storage/runs/a data.pools=/storage/pools/scenes --address http://127.0.0.1:8265

    raysemi submit --job pack --address URL -- scenes --split 24 --out /storage/pools/scenes (options behind --)

    In a checkout its code is uploaded and runs; elsewhere the cluster's own. Ray finds the token by
    RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token.
    """
    from raysemi.launch import submit as launcher

    job = replace(_checked(kind, arguments), gpus=gpus)
    for name, value in (("--overlay", overlay), ("--image", image)):
        if value is not None and not dry_run:
            raise ConfigError(f"{name} must come with --dry-run; got it without. Add --dry-run, or leave it out.")
    if dry_run:
        import yaml

        typer.echo(f"# raysemi {' '.join(job.words)}: kubectl create -f -", err=True)
        sys.stdout.write(yaml.safe_dump(launcher.manifest(job, overlay, image), sort_keys=False, width=120))
        return
    if address is None:
        raise ConfigError("--address must name the job server, http://HEAD:8265; got nothing. Or see --dry-run.")
    checkout = Path.cwd() if not installed and launcher.is_checkout(Path.cwd()) else None
    cluster = launcher.Cluster(address)
    with launcher.uploaded(job, checkout) as (sent, folder):
        what = f"the code of {checkout}" if checkout else "the recipe" if folder else "nothing"
        typer.echo(f"job: raysemi {' '.join(sent.words)}\nto: {address}\nuploads: {what}", err=True)
        job_id = cluster.submit(sent, folder)
    typer.echo(f"submitted: {job_id}", err=True)
    if follow:
        raise typer.Exit(_follow(cluster, job_id, stop_with_me))


def _checked(kind: str, arguments: list[str]) -> Job:
    """A job whose command was read as it would be over there.

    Raises:
        ConfigError: no such kind; settings or paths are wrong.
    """
    from raysemi.launch import submit as launcher

    if kind not in launcher.VERBS:
        raise ConfigError(f"--job must be one of {', '.join(launcher.VERBS)}; got {kind}. Choose one of these.")
    if kind == "train":
        return launcher.training(arguments[0], arguments[1:])
    from raysemi.cli import app

    command = typer.main.get_command(app)
    for name in launcher.VERBS[kind]:
        found = getattr(command, "commands", {}).get(name)
        if found is None:
            raise ConfigError(f"--job {kind} must be a command of this version of raysemi; got one that it lacks.")
        command = found
    given = command.make_context(kind, list(arguments)).params  # a mistake ends here, with exit code 2
    launcher.refuse_here_only([(name, str(given[name])) for name in _PATHS if given.get(name) is not None])
    out = given.get("out") or given.get("run")
    return launcher.Job(kind, tuple(arguments), run=None if out is None else str(out))


def _follow(cluster: Cluster, job_id: str, stop_with_me: bool) -> int:
    """Shows a job's log to its end; after Ctrl-C it goes on without us, or ends too."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return cluster.follow(job_id, write)
    except KeyboardInterrupt:
        stop = stop_with_me or (sys.stdin.isatty() and typer.confirm("\nStop the job too?", err=True))
        if not stop:
            raise KeyboardInterrupt(
                f"The job goes on: ray job logs --follow --address {cluster.address} {job_id}"
            ) from None
        cluster.stop(job_id)
        typer.echo("\nstopping the job, which may write a checkpoint first", err=True)
        return cluster.follow(job_id, lambda text: None)
