"""A detector and its boxes from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from makers import call
from typer.testing import CliRunner

from raysemi.cli import app
from raysemi.cli.exits import MISTAKE
from raysemi.data.boxes import write_boxes
from raysemi.data.pool import Pool


def test_a_detector_from_the_command_line(scenes: Path, tmp_path: Path) -> None:
    pools, folder = Path(shutil.copytree(scenes, tmp_path / "pools")), tmp_path / "things"
    settings = [
        f"run={folder}", f"data.pools={pools}", "data.crop=64", "data.loader_processes=0", "train.steps=2",
        "train.batch=2", "train.log_every=1", "model.encoder=test_efficientnet", "model.weights=random",
        "model.channels=16", "model.hidden=16", "model.regions=16", "boxes.score=0", "boxes.accepted=0",
    ]  # fmt: skip
    wrong = call("detect", "train", "scene", *settings)
    assert wrong.exit_code == MISTAKE
    assert "Did you mean scenes?" in wrong.output
    learned = call("detect", "train", "scenes", *settings)
    assert learned.exit_code == 0, learned.output
    assert "precision %" in learned.output
    found = call("detect", "run", folder, "--pool", pools / "val")
    assert found.exit_code == 0, found.output
    assert f"{pools / 'val'}/boxes-things.parquet" in found.output
    checked = CliRunner().invoke(
        app, ["detect", "check", "things", "--pool", str(pools / "val"), "--score", "0", "--json"]
    )
    result = json.loads(checked.stdout)
    assert (result["images"], set(result["classes"])) == (5, {"ball", "fruit", "box", "can", "ring", "star"})
    assert "all things" in call("detect", "check", folder, "--pool", pools / "val").output
    missing = call("detect", "check", "nothing", "--pool", pools / "val")
    assert missing.exit_code == MISTAKE
    assert "boxes-nothing.parquet must exist" in missing.output


def test_pixels_around_boxes_from_the_command_line(trained: Path, scenes: Path, tmp_path: Path) -> None:
    pool = Path(shutil.copytree(scenes / "val", tmp_path / "val"))
    write_boxes(Pool.open(pool), "none", [], {})
    result = CliRunner().invoke(
        app, ["detect", "check", "none", "--pool", str(pool), "--run", str(trained), "--json"], catch_exceptions=False
    )
    measured = json.loads(result.stdout)
    assert (measured["accepted_boxes"], measured["precision"], measured["recall"]) == (0, None, 0.0)
