"""Arguments and options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings a.b=value in place of the recipe's.")]
Settings = Annotated[list[str] | None, typer.Argument(help="eval.*=value in place of the run's own.")]
Run = Annotated[str, typer.Argument(help="Run folder, local or URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
Best = Annotated[bool, typer.Option("--best", help="The best checkpoint on validation instead of the last.")]
OverRay = Annotated[
    str, typer.Option(help="none; local: workers of Ray on this machine; auto or an address: those of a cluster.")
]
Processes = Annotated[int | None, typer.Option(help="Processes; default: one a core.")]
