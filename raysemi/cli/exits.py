"""How the command line ends: an exit code, and one line of each error."""

from __future__ import annotations

import errno
import logging
import sys
from typing import Any

import typer

from raysemi.errors import CheckpointError, CheckpointFailure, ConfigError, DataError, DataFailure, RaysemiError
from raysemi.launch import logs

MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit codes: the user's mistake, a failure, Ctrl-C."""
GOES_ON = {"pack", "train", "demo"}
"""Commands that keep what was finished when Ctrl-C came; every other one begins anew."""


class Commands(typer.core.TyperGroup):
    """Turns our errors into one line and an exit code; anything else is a defect and keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was called."""
        try:
            return super().invoke(ctx)
        except RaysemiError as error:
            for line in str(error).splitlines():
                _complain(line)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt as error:
            next_time = "goes on with what is finished" if ctx.invoked_subcommand in GOES_ON else "begins anew"
            if sys.stderr.isatty():
                typer.echo(err=True)  # the line of ^C
            logs.say(f"stopped. {str(error) or f'The same command {next_time}.'}", logging.WARNING)
            raise typer.Exit(INTERRUPTED) from error


def _complain(line: str) -> None:
    try:
        as_json = logs.as_json()
    except ConfigError:  # this is what is to be told
        as_json = False
    if as_json:
        logs.say(line, logging.ERROR)
    else:
        typer.secho(f"error: {line}", err=True, fg="red" if sys.stderr.isatty() else None)


def exit_code(error: RaysemiError) -> int:
    """2 for what the user can set right, 1 for what failed around it (a full disk, a dead worker)."""
    failure = isinstance(error, DataFailure | CheckpointFailure) or _for_want_of_room(error)
    mistake = isinstance(error, ConfigError | DataError | CheckpointError) and not failure
    return MISTAKE if mistake else FAILURE


def _for_want_of_room(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
