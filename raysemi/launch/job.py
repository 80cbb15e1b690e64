"""In the process of a job: what it says of itself."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path

from raysemi import __version__

_log = logging.getLogger(__name__)

SENT_BY = "RAYSEMI_SENT_BY"
"""Environment variable: the version of raysemi that sent this job."""


def say_which_raysemi_runs() -> None:
    """Logs where this process' raysemi lies: uploaded with the job, or installed on the cluster."""
    where = Path(__file__).parents[1]
    kind = "uploaded with the job" if where.is_relative_to(Path.cwd()) else "installed"
    _log.info("raysemi %s, %s: %s (ray %s)", __version__, kind, where, version("ray"))
    sent_by = os.environ.get(SENT_BY, __version__)
    if sent_by != __version__:
        _log.warning("raysemi %s sent this job; settings may differ here.", sent_by)
