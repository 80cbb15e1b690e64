"""The command line: real pools, a real short run, and one clear line with its exit code for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import tiny_run
from PIL import Image
from typer.testing import CliRunner, Result

from raysemi import __version__, config_io
from raysemi.cli import FAILURE, MISTAKE, app, exit_code
from raysemi.data.boxes import write_boxes
from raysemi.data.pool import Pool
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, ConfigError, DataError, DataFailure, RaysemiError

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def recipe(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a run of two steps on the drawn pools."""
    folder = tmp_path_factory.mktemp("cli")
    config = tiny_run(scenes, folder / "run", "fixmatch", "train.steps=2")
    path = folder / "two-steps.yaml"
    path.write_text(config_io.dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """The run folder after `raysemi train`."""
    result = call("train", recipe)
    assert result.exit_code == 0, result.output
    assert "mIoU" in result.output
    return recipe.parent / "run"


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
    advised = ("data.on_corrupt=skip", "data.loader_processes=1")  # what errors in the middle of a run advise
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


def test_predict_needs_one_source(trained: Path, tmp_path: Path) -> None:
    result = call("predict", trained, "--out", tmp_path)
    assert result.exit_code == MISTAKE
    assert "--images or --pool, one of the two; got neither or both" in result.output


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


def test_mistakes_in_weights_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    result = call("weights", "resnet50", "--out", tmp_path / "w.pth")
    assert (result.exit_code, "--out must end in .safetensors; got" in result.output) == (MISTAKE, True)
    result = call("weights", "resnet50", "--stem", "7x7", "--out", tmp_path / "w.safetensors")
    assert (result.exit_code, "--stem must be deep or plain; got 7x7" in result.output) == (MISTAKE, True)
    result = call("weights", "resnet11", "--out", tmp_path / "w.safetensors")
    assert (result.exit_code, "model.encoder must be" in result.output) == (MISTAKE, True)


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


def plan(pool: Path, *options: object) -> list[list[str]]:
    result = call("plan", pool, *options)
    assert result.exit_code == 0, result.output
    return [line.split("\t") for line in result.stdout.splitlines()]


def test_plan_is_the_same_on_any_number_of_ranks_from_any_start(scenes: Path) -> None:
    """16 samples in batches of 4: step 4 begins the second pass."""
    pool = scenes / "unlabeled"
    whole = plan(pool, "--batch", 4, "--stop", 12)
    assert [len(line) for line in whole] == [4] * 12
    for start in (0, 4, 8):
        assert len({key for line in whole[start : start + 4] for key in line}) == 16
    assert whole[:4] != whole[4:8]
    for world in (1, 2, 4):
        for start in (0, 3, 11):
            options = ("--batch", 4, "--world", world, "--start", start, "--stop", 12)
            shares = [plan(pool, *options, "--rank", rank) for rank in range(world)]
            joined = [[key for share in parts for key in share] for parts in zip(*shares, strict=True)]
            assert joined == whole[start:]
    assert plan(pool, "--batch", 4, "--stop", 12, "--seed", 1) != whole


def test_plan_tells_keys_with_spaces_apart(tmp_path: Path) -> None:
    for kind, mode in (("images", "RGB"), ("labels", "L")):
        for number in range(3):
            path = tmp_path / f"{kind}/val/my city {number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (5 + number, 4)).save(path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    packed = call("pack", "folder", "--root", tmp_path, "--pools", "val", "--out", tmp_path, "--processes", 1)
    assert packed.exit_code == 0, packed.output
    (keys,) = plan(tmp_path / "val", "--batch", 3, "--stop", 1)
    assert sorted(keys) == ["my city 0", "my city 1", "my city 2"]


def test_plan_refuses_what_cannot_be_divided(scenes: Path) -> None:
    result = call("plan", scenes / "val", "--batch", 4, "--world", 3)
    assert result.exit_code == MISTAKE
    assert "--world, which divides --batch; got 0, 3 and 4" in result.output


def test_pack_verify_and_index(tmp_path: Path) -> None:
    out = tmp_path / "pools"
    result = call("pack", "scenes", "train=6", "val=2", "size=40", "--split", 2, "--out", out, "--processes", 1)
    assert result.exit_code == 0, result.output
    assert "labeled images: 2 drawn at random, seed 0\nlabeled: 2 images, 1 shards" in result.stdout
    assert "unlabeled: 4 images" in result.stdout
    assert call("verify", out / "val").exit_code == 0
    shard = next((out / "val").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    damaged = call("verify", out / "val")
    assert damaged.exit_code == MISTAKE
    assert shard.name in damaged.output

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.tar").write_bytes(next((out / "labeled").glob("*.tar")).read_bytes())
    names = json.loads((out / "labeled/pool.json").read_text())["classes"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    indexed = call("index", foreign, "--classes", tmp_path / "classes.txt", "--processes", 1)
    assert indexed.exit_code == 0, indexed.output
    assert "2 images" in indexed.stdout


def test_pack_says_that_a_list_was_used(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "train", "train", "val")):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            path = tmp_path / f"{kind}/{part}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (5 + number, 4)).save(path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/2.txt").write_text("0\n")
    result = call("pack", "folder", "--root", tmp_path, "--split", 2, "--out", tmp_path / "pools", "--processes", 1)
    assert result.exit_code == 0, result.output
    assert "labeled images: those of the list splits/2.txt\nlabeled: 1 images" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["scenes", "trian=4"], "options of source scenes must be among train=..., val=..., seed=..., size=...; got"),
        (["scenes", "size=large"], "option size of source scenes must be a int; got 'large'"),
        (["nothing"], "source must be one of folder, voc, cityscapes, coco, scenes; got 'nothing'"),
        (["folder"], "--root must name the folder of the data set"),
        (["folder", "--root", "/no/such/folder"], "--root must be a folder that exists; got /no/such/folder"),
    ],
)
def test_mistakes_in_pack(tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = call("pack", *arguments, "--out", tmp_path)
    assert result.exit_code == MISTAKE
    assert expected in result.output


def test_exit_codes() -> None:
    def raised(error: RaysemiError, *causes: BaseException) -> RaysemiError:
        last: BaseException = error
        for cause in causes:
            last.__cause__ = last = cause
        return error

    full, quota, forbidden = OSError(28, "No space left on device"), OSError(122, "Quota"), PermissionError(13, "No")
    for error in (
        RaysemiError("a dead worker"),
        DataFailure("no room, said by another process"),
        raised(CheckpointError("x"), full),
        raised(CheckpointError("x"), forbidden),
        raised(DataError("x"), quota),
        raised(DataError("x"), DataError("y"), full),
    ):
        assert exit_code(error) == FAILURE
    for error in (ConfigError("x"), DataError("x"), CheckpointError("x"), raised(DataError("x"), forbidden)):
        assert exit_code(error) == MISTAKE


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@needs_dev_full
@pytest.mark.parametrize(("full", "processes"), [("labeled-000001.tar", 2), ("index.parquet", 1)])
def test_a_full_disk_while_packing_is_a_failure(tmp_path: Path, full: str, processes: int) -> None:
    (tmp_path / "labeled/.parts").mkdir(parents=True)
    (tmp_path / f"labeled/{full}.part").symlink_to("/dev/full")
    command = ["pack", "scenes", "train=6", "val=2", "size=40", "--pools", "labeled", "--shard-samples", 2]
    command += ["--processes", processes, "--out", tmp_path]
    result = call(*command)
    assert result.exit_code == FAILURE, result.output
    assert f"{full}; got" in result.output or f"{full} must be writable; got" in result.output
    assert "No space left" in result.output
    assert call(*command).exit_code == 0  # with room again


@needs_dev_full
def test_a_full_disk_while_indexing_or_predicting_is_a_failure(trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((scenes / "unlabeled/unlabeled-000000.tar").read_bytes())
    (tmp_path / "index.parquet.part").symlink_to("/dev/full")
    names = json.loads((scenes / "val/pool.json").read_text())["classes"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    indexed = call("index", tmp_path, "--classes", tmp_path / "classes.txt", "--processes", 1)
    assert indexed.exit_code == FAILURE
    assert "index.parquet must be writable; got" in indexed.output

    images, labels = tmp_path / "images", tmp_path / "out/labels"
    images.mkdir()
    labels.mkdir(parents=True)
    Image.new("RGB", (37, 58)).save(images / "x.png")
    (labels / ".x.png.part").symlink_to("/dev/full")
    predicted = call("predict", trained, "--images", images, "--out", tmp_path / "out")
    assert predicted.exit_code == FAILURE
    assert "must have room; got none left" in predicted.output


@pytest.mark.parametrize(
    ("command", "where", "text"),
    [
        (["pack", "scenes", "--out", "x"], "raysemi.data.pack.pack", "goes on with what is finished"),
        (["predict", "run", "--out", "x"], "raysemi.api.predict", "begins anew"),
        (["evaluate", "run"], "raysemi.api.evaluate", "begins anew"),
        (["verify", "VAL"], "raysemi.data.pool.verify", "begins anew"),
    ],
)
def test_ctrl_c_says_what_the_same_command_does(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], where: str, text: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    result = call(*(str(scenes / "val") if part == "VAL" else part for part in command))
    assert result.exit_code == 130
    assert f"stopped. The same command {text}." in result.output


def test_a_full_disk_is_a_failure_and_keeps_what_was_finished(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert call("train", recipe, f"run={run}", "train.stop_at=1").exit_code == 0

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    result = call("train", recipe, f"run={run}")
    assert result.exit_code == FAILURE
    assert "must have room; got none left" in result.output
    assert checkpoint.steps(RunFolder(run)) == [1]


def test_ctrl_c_saves_says_how_to_go_on_and_is_130(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "raysemi.cli", "train", recipe, f"run={run}", "train.steps=100000"]
    with subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(2)
    assert process.returncode == 130, lines
    assert "the same command goes on from its last checkpoint" in lines[-1]
    (step,) = checkpoint.steps(RunFolder(run))
    assert step >= 3


def test_jobs_are_the_same_verbs(trained: Path) -> None:
    job = [sys.executable, str(ROOT / "jobs/evaluate.py"), str(trained), "--json"]
    done = subprocess.run(job, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    for name in ("pack", "train", "predict"):
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
