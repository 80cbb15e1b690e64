"""The command line: every command a few lines over `raysemi.api` and its neighbours.

A verb is a function in the file of its topic and has its place in the list here; a group of verbs is a file with an
`app` of its own. Only typer is imported at once: torch and the like come with the command that needs them, so that help
is instant.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from raysemi import __version__
from raysemi.cli import about, bench, checkpoint, data, detect, runs, submit, tune
from raysemi.cli.exits import Commands
from raysemi.launch.logs import log_to_stderr
from raysemi.launch.terminal import is_first_rank

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing Rich takes longer than all the rest of --help
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Semantic segmentation from few labels and a large unlabeled pool.",
)
for verb in (
    data.pack,
    data.index,
    data.verify,
    data.plan,
    runs.train,
    runs.evaluate,
    runs.predict,
    about.weights,
    runs.report,
    about.methods,
    about.doctor,
    runs.demo,
    submit.submit,
):
    app.command()(verb)
app.add_typer(bench.app, name="bench")
app.add_typer(detect.app, name="detect")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(tune.app, name="tune")


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
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and is_first_rank():  # a job of Ray's started this process
        from raysemi.launch.job import say_which_raysemi_runs

        say_which_raysemi_runs()
