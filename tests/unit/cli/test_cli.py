"""The command line as a whole: instant help, every verb in it, the same verbs as jobs and as functions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import call

from raysemi import __version__
from raysemi.cli import app
from raysemi.cli.exits import MISTAKE

ROOT = Path(__file__).parents[3]


def test_help_loads_nothing_heavy() -> None:
    """What keeps `raysemi --help` instant: a tenth of a second without these, seconds with them."""
    code = (
        "import sys\nfrom raysemi.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'numpy', 'rich', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip().endswith("[]")
    for command in (
        "pack",
        "index",
        "verify",
        "plan",
        "train",
        "evaluate",
        "predict",
        "report",
        "doctor",
        "demo",
        "weights",
        "methods",
        "bench",
        "detect",
    ):
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in app.registered_commands if c.callback])
def test_every_command_has_help(command: str) -> None:
    assert call(command, "--help").exit_code == 0


def test_version() -> None:
    assert call("--version").output.strip() == __version__


def test_unknown_commands_and_options_are_mistakes() -> None:
    assert call("trane").exit_code == MISTAKE
    assert call("plan", "somewhere", "--bach", 3).exit_code == MISTAKE


def test_jobs_are_the_same_verbs(trained: Path) -> None:
    job = [sys.executable, str(ROOT / "jobs/evaluate.py"), str(trained), "--json"]
    done = subprocess.run(job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    for name in ("pack", "index", "train", "predict"):
        usage = subprocess.run([sys.executable, str(ROOT / f"jobs/{name}.py"), "-h"], capture_output=True, text=True)
        assert f"raysemi {name}" in usage.stdout


def test_api_is_what_the_command_line_does(trained: Path, recipe: Path) -> None:
    import raysemi

    assert raysemi.load_config(recipe).train.steps == 2
    assert raysemi.evaluate(trained)["miou"] == json.loads((trained / "result.json").read_text())["miou"]
    network: Any = raysemi.load_model(trained)
    assert not network.training
    assert len(network.classes) == len(network.palette) == 7
    with torch.no_grad():
        assert network(torch.rand(1, 3, 50, 70)).logits_BKHW.shape == (1, 7, 50, 70)
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        raysemi.trane  # noqa: B018
