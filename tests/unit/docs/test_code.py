"""Python, YAML and JSON of the documents work as they stand, and so does the README's quick start, on small sizes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import Block, blocks, commands
from makers import call, semi_batch, step_context, tiny_segmentor
from PIL import Image

import raysemi
from raysemi import config_io
from raysemi.data.sources.scenes import CLASSES, draw_scene
from raysemi.launch import logs
from raysemi.tune import checks, sweep

SMALL = ["ray=none", "train.steps=2", "eval.every=2", "data.crop=64", "data.loader_processes=0", "train.log_every=1"]
SMALL += ["train.batch.labeled=2", "train.batch.unlabeled=2", "model.encoder=test_efficientnet", "model.weights=random"]
"""Settings that make seconds of a recipe's minutes."""
UNCHECKED = {
    "docs/architecture.md": "the way of an image, which the picture beside it draws",
    "docs/cluster.md": "a formula of hours; its table is compared with the recipes in test_pages.py",
}
"""Blocks that are neither commands nor code, by file, and why."""


def of(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def one(language: str, file: str) -> Block:
    (block,) = [block for block in of(language) if block.file == file]
    return block


def test_no_block_is_passed_over() -> None:
    """Each has a test here, or in `test_commands.py`."""
    known = {("python", "docs/guide.md"), ("python", "docs/methods.md"), ("json", "docs/observability.md")}
    known |= {("yaml", "docs/presets.md"), ("yaml", "docs/sweeps.md"), ("yaml", "docs/results.md")}
    known |= {("text", file) for file in UNCHECKED}
    assert {(block.language, block.file) for block in blocks() if block.language} == known
    assert len([block for block in blocks() if block.language]) == len(known)


@pytest.fixture
def reader(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, which is the current one: pools, and two photographs."""
    (tmp_path / "pools").mkdir()
    for name in ("scenes", "camvid-1_64"):
        (tmp_path / "pools" / name).symlink_to(scenes)
    (tmp_path / "holiday").mkdir()
    for number in range(2):
        Image.fromarray(draw_scene(0, "val", number).image_HW3).save(tmp_path / "holiday" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guides_python_trains_loads_and_predicts(reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, load = one("python", "docs/guide.md"), raysemi.load_config
    monkeypatch.setattr(raysemi, "load_config", lambda recipe, overrides: load(recipe, [*overrides, *SMALL]))
    names: dict[str, object] = {}
    exec(compile(block.text, str(block), "exec", dont_inherit=True), names)
    assert names["logits_BKHW"].shape == (1, len(CLASSES), 240, 320)
    assert sorted(path.name for path in (reader / "predicted/labels").iterdir()) == ["0.png", "1.png"]


def test_the_method_of_the_documents_trains_the_student() -> None:
    block = one("python", "docs/methods.md")
    names: dict[str, object] = {"__name__": "agreement"}
    exec(compile(block.text, str(block), "exec", dont_inherit=True), names)
    method = names["Agreement"](names["AgreementConfig"](), 5)
    student = tiny_segmentor(5)
    terms = method.objectives(semi_batch(5, views=method.strong_views), step_context(student))
    assert terms.keys() == {"supervised", "agreement"}
    assert all(term.total > 0 and term.normaliser > 0 for term in terms.values())
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term.total, [next(student.encoder.parameters())], retain_graph=True)
        assert gradient.abs().max() > 0


def test_the_recipe_with_a_base_is_read(reader: Path) -> None:
    (reader / "mine.yaml").write_text(one("yaml", "docs/presets.md").text, encoding="utf-8")
    config, base = config_io.load("mine.yaml"), config_io.load("cityscapes-unimatch")
    changed = {path for path, value in config_io.leaves(config).items() if value != config_io.leaves(base)[path]}
    assert changed == {"run", "data.labeled", "data.unlabeled", "data.val", "data.crop", "eval.window"}


def test_the_sweep_is_accepted(reader: Path) -> None:
    (reader / "mine.yaml").write_text(one("yaml", "docs/sweeps.md").text, encoding="utf-8")
    space = checks.build(sweep.load("mine.yaml"))
    names = {parameter.name for parameter in space.parameters}  # fixmatch calls its strong_weight otherwise
    assert names == {"fixmatch.threshold", "derprop.strong_weight", "optim.lr", "weighting.k"}


def test_the_measured_sweep_is_accepted(reader: Path) -> None:
    (reader / "mine.yaml").write_text(one("yaml", "docs/results.md").text, encoding="utf-8")
    space = checks.build(sweep.load("mine.yaml"))
    own = {f"derprop.{name}" for name in ("strong_weight", "threshold.initial")}
    assert {parameter.name for parameter in space.parameters} == own | {
        "optim.lr", "fixmatch.unsupervised_weight", "fixmatch.threshold",
    }  # fmt: skip


def test_the_log_line_has_the_fields_of_a_real_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = json.loads(one("json", "docs/observability.md").text)
    monkeypatch.setenv("RAYSEMI_LOG", "json")
    logs.say(shown["message"], logging.INFO, run=shown["run"], rank=0, step=40, metrics=shown["metrics"])
    real = json.loads(capsys.readouterr().err)
    assert real.keys() == shown.keys()
    assert {**real, "time": 0} == {**shown, "time": 0}
    assert len(real["time"]) == len(shown["time"])


def test_the_readmes_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images laid out as it says; its own commands, of which the training is made small."""
    monkeypatch.chdir(tmp_path)
    for part, count, labeled in (("train", 7, 4), ("val", 3, 3)):
        for kind in ("images", "labels"):
            Path("mydata", kind, part).mkdir(parents=True)
        for number in range(count):
            scene = draw_scene(0, part, number)
            Image.fromarray(scene.image_HW3).save(f"mydata/images/{part}/photo-{number}.png")
            if number < labeled:
                mask_HW = scene.label_HW.astype(np.uint8)
                Image.fromarray(mask_HW).save(f"mydata/labels/{part}/photo-{number}.png")
    Path("mydata/classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    shown = [words[1:] for where, words in commands() if where.startswith("README.md") and words[0] == "raysemi"]
    shown = [words for words in shown if len(words) > 1]
    assert [words[0] for words in shown] == ["pack", "train", "report"]
    for words in shown:
        result = call(*words, *(SMALL if words[0] == "train" else []))
        assert result.exit_code == 0, result.output
    assert json.loads(Path("runs/mydata/result.json").read_text())["unlabeled"] == 3
    assert "derprop" in Path("runs/mydata/report.html").read_text(encoding="utf-8")
