"""Real short runs from the command line: trained, evaluated, shown, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from makers import call
from PIL import Image
from typer.testing import CliRunner

from raysemi import config_io
from raysemi.cli import app
from raysemi.cli.exits import MISTAKE


def test_train_lists_the_recipes_that_come_along() -> None:
    result = call("train", "--list")
    assert result.exit_code == 0
    for name in config_io.recipes():
        assert f" {name} " in result.output
    assert "DerProp on Cityscapes, 19 classes, as published" in result.output


def test_train_shows_the_result_and_the_same_command_continues(trained: Path, recipe: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert result["steps"] == 2
    again = call("train", recipe)
    assert again.exit_code == 0
    assert f"{result['miou']:.2f}" in again.output
    # what errors in the middle of a run advise
    advised = ("data.on_corrupt=skip", "data.loader_processes=1", "train.micro_batch=2")
    assert call("train", recipe, *advised).exit_code == 0
    other = call("train", recipe, "optim.lr=0.5")
    assert other.exit_code == MISTAKE
    assert "whose config differs in optim.lr" in other.output


def test_faults_of_a_config_are_a_line_each(recipe: Path) -> None:
    result = call("train", recipe, "train.stepz=3", "method.threshold=2")
    assert result.exit_code == MISTAKE
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert [line.split(" must ")[0] for line in lines] == ["error: method.threshold", "error: train.stepz"]


def test_missing_pools_are_told_all_at_once(recipe: Path, tmp_path: Path) -> None:
    result = call("train", recipe, f"data.pools={tmp_path / 'nowhere'}", f"run={tmp_path / 'run'}")
    assert result.exit_code == MISTAKE
    for name in ("labeled", "unlabeled", "val"):
        assert f"error: data.{name}: pool must be a folder with a pool.json" in result.output


def test_evaluate_prints_the_fields_of_result_json(trained: Path, scenes: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(trained), "--json"])
    measured, written = json.loads(result.stdout), json.loads((trained / "result.json").read_text())
    assert list(measured) == list(written)
    for name in ("method", "steps", "labeled", "unlabeled", "iou", "miou", "pixel_accuracy"):
        assert measured[name] == pytest.approx(written[name]), name
    elsewhere = CliRunner().invoke(app, ["evaluate", str(trained), "--pool", str(scenes / "labeled"), "--json"])
    assert json.loads(elsewhere.stdout)["miou"] != measured["miou"]
    table = call("evaluate", trained)
    assert all(name in table.output for name in measured["iou"])


def test_only_eval_settings_may_change_afterwards(trained: Path) -> None:
    assert call("evaluate", trained, "eval.batch=2").exit_code == 0
    result = call("evaluate", trained, "optim.lr=2")
    assert result.exit_code == MISTAKE
    assert "must be an eval.* setting" in result.output


def test_predict_writes_masks_at_the_size_of_the_images(trained: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "a").mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 58, 3), dtype=np.uint8)).save(images / "a/x.png")
    result = call("predict", trained, "--images", images, "--out", out)
    assert result.exit_code == 0, result.output
    for folder in ("labels", "overlays"):
        with Image.open(out / folder / "a/x.png") as written:
            assert written.size == (58, 37)


def test_predict_takes_a_pool_too(trained: Path, scenes: Path, tmp_path: Path) -> None:
    assert call("predict", trained, "--pool", scenes / "val", "--out", tmp_path).exit_code == 0
    assert len(list((tmp_path / "labels").rglob("*.png"))) == 5


def test_predict_writes_a_pool_of_pseudo_labels(trained: Path, scenes: Path, tmp_path: Path) -> None:
    command = ("predict", trained, "--pool", scenes / "val", "--out", tmp_path / "out", "--shards")
    result = call(*command, "--min-confidence", 0.1)
    assert result.exit_code == 0, result.output
    assert f"5 images: 1 shards, {tmp_path / 'out'}" in result.output
    assert call("verify", tmp_path / "out").exit_code == 0
    assert call(*command, "--min-confidence", 0.1).exit_code == 0
    other = call(*command)
    assert other.exit_code == MISTAKE
    assert "got one that differs in min_confidence" in other.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--images", "."), "--shards must have a --pool, and no --images"),
        (("--pool", "p", "--images", "."), "--shards must have a --pool, and no --images"),
    ],
)
def test_a_pool_is_made_of_a_pool(trained: Path, options: tuple[str, ...], text: str) -> None:
    result = call("predict", trained, "--out", "out", "--shards", *options)
    assert result.exit_code == MISTAKE
    assert text in result.output


@pytest.mark.parametrize("option", ["--workers", "--min-confidence"])
def test_options_of_shards_come_with_shards(trained: Path, option: str) -> None:
    result = call("predict", trained, "--out", "out", "--images", ".", option, 1)
    assert result.exit_code == MISTAKE
    assert f"{option} must come with --shards" in result.output


def test_predict_needs_one_source(trained: Path, tmp_path: Path) -> None:
    result = call("predict", trained, "--out", tmp_path)
    assert result.exit_code == MISTAKE
    assert "--images or --pool, one of the two; got neither or both" in result.output


@pytest.mark.parametrize("shards", [(), ("--shards",)])
def test_predictions_go_to_a_folder(trained: Path, scenes: Path, shards: tuple[str, ...]) -> None:
    result = call("predict", trained, "--pool", scenes / "val", "--out", "s3://bucket/out", *shards)
    assert result.exit_code == 2
    assert "--out must be a folder, local or shared; got s3://bucket/out" in " ".join(result.output.split())


def test_report(trained: Path) -> None:
    result = call("report", trained)
    assert result.exit_code == 0, result.output
    assert Path(result.output.strip()).read_text(encoding="utf-8").startswith("<!")


def test_a_pool_of_other_classes_is_refused(trained: Path, scenes: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for file in (scenes / "val").iterdir():
        (pool / file.name).symlink_to(file)
    (pool / "pool.json").unlink()
    content = json.loads((scenes / "val/pool.json").read_text())
    content["classes"][0] = "sky"
    (pool / "pool.json").write_text(json.dumps(content))
    result = call("evaluate", trained, "--pool", pool)
    assert result.exit_code == MISTAKE
    assert "must have the 7 classes of" in result.output


def test_no_run_and_no_checkpoint(tmp_path: Path, trained: Path) -> None:
    result = call("evaluate", tmp_path / "nothing")
    assert result.exit_code == MISTAKE
    assert "must be a run folder; got one without config.yaml" in result.output
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert "must hold a whole checkpoint; got none" in call("predict", tmp_path, "--out", "x", "--images", "y").output
