"""`raysemi bench grid`: what it plans and refuses, what it runs and does not run again, what it tells."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from makers import tiny_run
from PIL import Image
from typer.testing import CliRunner

from raysemi import config_io
from raysemi.bench.grid import Cell, GridRun, Plan, make_plan, run_grid
from raysemi.bench.grid_report import as_json, as_markdown, read_rows
from raysemi.cli import app
from raysemi.cli.exits import MISTAKE
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import ConfigError


def call(*arguments):
    return CliRunner().invoke(app, ["bench", "grid", *(str(one) for one in arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def recipes(scenes, tmp_path_factory):
    """Path that recipes of two methods begin with."""
    folder = tmp_path_factory.mktemp("recipes")
    for method in ("supervised", "fixmatch"):
        config = tiny_run(scenes, folder / method, method, "train.steps=3", "eval.pictures=1")
        (folder / f"tiny-{method}.yaml").write_text(config_io.dump(config), encoding="utf-8")
    return folder / "tiny"


def plan(folder, recipes, methods=None, overrides=(), weighting=("none",), gradients=("uniform",), seeds=(0,)):
    return make_plan(folder, str(recipes), methods, weighting, gradients, seeds, overrides)


def test_pairs_that_the_config_refuses_are_listed_with_the_reason(tmp_path, recipes):
    made = plan(tmp_path, recipes, weighting=("none", "rank"), gradients=("uniform", "pareto"), seeds=(0, 3))
    assert made.cells == (
        Cell("supervised", "none", "uniform"),
        Cell("fixmatch", "none", "uniform"),
        Cell("fixmatch", "none", "pareto"),
        Cell("fixmatch", "rank", "uniform"),
        Cell("fixmatch", "rank", "pareto"),
    )
    refused = dict(made.refused)
    assert set(refused) == {
        Cell("supervised", "none", "pareto"),
        Cell("supervised", "rank", "uniform"),
        Cell("supervised", "rank", "pareto"),
    }
    assert "there is no second gradient" in refused[Cell("supervised", "none", "pareto")]


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path, recipes):
    out = tmp_path / "grid"
    result = call("--recipes", recipes, "--out", out, "--seeds", "0,7", "--weighting", "none", "--dry-run")
    assert result.exit_code == 0, result.output
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    assert ["fixmatch", "none", "pareto", "7", "not begun"] in rows
    assert any(row[:3] == ["supervised", "none", "pareto"] and "refused: gradients.name" in row[4] for row in rows)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--methods", "fixmach"), "--methods must be among"),
        (("--methods", "fixmach"), "Did you mean fixmatch?"),
        (("--weighting", "rang"), "--weighting must be among none, rank; got rang"),
        (("--gradients", "paretto"), "Did you mean pareto?"),
        (("--seeds", "0,x"), "--seeds must be numbers from 0 on"),
        (("optim.lrr=1",), "Did you mean optim.lr?"),
        (("seed=4",), "seed must not be given to a grid, which sets it itself; got seed=4. Use --seeds."),
        (("gradients.name=pareto",), "Use --gradients."),
        (("train.stop_at=1",), "Use train.steps."),
        (("data.pools=/no/where",), "pool must be a folder with a pool.json"),
        (("--report",), "has no grid.json"),
    ],
)
def test_mistakes_are_said_before_anything_runs(tmp_path, recipes, options, text):
    out = tmp_path / "grid"
    result = call("--recipes", recipes, "--out", out, *options)
    assert result.exit_code == MISTAKE, result.output
    assert text in result.output
    assert not out.exists()


def test_a_method_without_such_a_recipe_is_told(tmp_path, recipes):
    with pytest.raises(ConfigError, match="recipe must be a YAML file or the name of one"):
        plan(tmp_path, recipes, methods=["unimatch"])


def test_the_plan_is_read_as_it_was_written_and_grows(tmp_path, recipes):
    first = plan(tmp_path, recipes, weighting=("rank",), overrides=("optim.lr=0.02",))
    first.write(tmp_path)
    assert Plan.read(tmp_path) == first
    second = plan(tmp_path, recipes, overrides=("optim.lr=0.02", "train.log_every=2"), seeds=(5,))
    both = first.joined(second)
    assert both.seeds == (0, 5)
    assert both.cells == (
        Cell("fixmatch", "rank", "uniform"),
        Cell("supervised", "none", "uniform"),
        Cell("fixmatch", "none", "uniform"),
    )
    assert [cell for cell, _ in both.refused] == [Cell("supervised", "rank", "uniform")]
    with pytest.raises(
        ConfigError, match=r"begun with --recipes \S+ optim.lr=0.02, and now --recipes \S+ optim.lr=0.5"
    ):
        plan(tmp_path, recipes, overrides=("optim.lr=0.5",))


def finished(folder, make_run, miou_of):
    """A grid's folder as its runs leave it; of three seeds of fixmatch one has failed and one has not begun."""
    cells = (Cell("supervised", "none", "uniform"), Cell("fixmatch", "none", "pareto"))
    made = Plan("camvid", ("optim.lr=0.1",), cells, (0, 1, 2), ((Cell("supervised", "rank", "uniform"), "no labels"),))
    make_run.root = folder / "runs"
    for (method, seed), miou in miou_of.items():
        (cell,) = (cell for cell in cells if cell.method == method)
        run = GridRun(cell, seed, folder)
        make_run(run.name, method, seed=seed)
        result = json.loads((run.location / "result.json").read_text()) | {"miou": miou, "seconds": 100.0 + seed}
        (run.location / "result.json").write_text(json.dumps(result))
        one = {"network": "student", "part": "encoder", "images": 8, "backwards": 2}
        decoder, teacher = one | {"part": "decoder", "images": 12}, one | {"network": "teacher", "backwards": 0}
        run.note(state="done", peak_bytes=(5 + seed) * 2**20, memory="resident memory", passes=[one, decoder, teacher])
    GridRun(cells[1], 1, folder).note(state="failed", reason="no room")
    return made


MIOU = {("supervised", 0): 40.0, ("supervised", 1): 43.0, ("supervised", 2): 41.5, ("fixmatch", 0): 44.5,
        ("fixmatch", 2): 42.0}  # fmt: skip


def test_the_report_says_mean_spread_and_gain_of_the_same_seeds(tmp_path, make_run):
    made = finished(tmp_path, make_run, MIOU)
    rows = read_rows(made, tmp_path)
    supervised, fixmatch = as_json(made, rows)["cells"]
    assert supervised["miou"] == pytest.approx(41.5)
    assert supervised["miou_std"] == pytest.approx(1.5)
    assert supervised["gain"] is None
    assert fixmatch["miou_by_seed"] == {"0": 44.5, "2": 42.0}
    assert fixmatch["gain"] == pytest.approx(2.5)  # 4.5 and 0.5; seed 1 has no pair
    assert fixmatch["gain_std"] == pytest.approx(8**0.5)
    assert fixmatch["images"] == {"student": {"encoder": 8, "decoder": 12}, "teacher": {"encoder": 8}}
    assert fixmatch["backwards"] == 2
    assert fixmatch["peak_bytes"] == 7 * 2**20
    assert fixmatch["seconds"] == 101.0
    assert fixmatch["missing"] == {"1": "failed, not begun: no room"}
    text = as_markdown(made, rows)
    passes = "student 8, decoder 12; teacher 8 | 2"
    assert f"| fixmatch | none | pareto | 43.2 ± 1.8 | 44.5, ·, 42.0 | +2.5 ± 2.8 | {passes} | 7 | 101 |" in text
    assert "- supervised-rank-uniform is not run: no labels" in text
    assert "- fixmatch-none-pareto, seed 1: failed, not begun: no room" in text


def test_a_report_needs_no_other_option_and_draws_label_maps(tmp_path, make_run):
    finished(tmp_path, make_run, MIOU).write(tmp_path)
    shown = call("--out", tmp_path, "--report")
    assert shown.exit_code == 0, shown.output
    assert "43.2 ± 1.8" in shown.output
    told = CliRunner().invoke(app, ["bench", "grid", "--out", str(tmp_path), "--report", "--json"])
    assert [cell["method"] for cell in json.loads(told.stdout)["cells"]] == ["supervised", "fixmatch"]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "grid.csv").read_text())))
    assert float(lines[1]["gain"]) == pytest.approx(2.5)
    assert lines[1]["miou_seed_1"] == ""
    assert (tmp_path / "grid.png").stat().st_size < 1e6
    with Image.open(tmp_path / "grid.png") as drawn:
        wide, high = drawn.size
    assert wide > 3 * 150  # truth and two cells beside each other
    assert high > 2 * 150  # two images below each other


@pytest.mark.slow
def test_a_run_that_fails_is_recorded_the_others_go_on_and_what_is_finished_is_not_run_again(tmp_path, recipes):
    out = tmp_path / "grid"
    made = plan(out, recipes, seeds=(1,))
    broken, whole = (GridRun(cell, 1, out) for cell in made.cells)
    broken.location.parent.mkdir(parents=True)
    broken.location.write_text("in the way of a folder")
    said = []
    assert run_grid(made, out, 1, said.append) == [broken]
    assert whole.finished
    assert broken.standing().startswith("failed, not begun: ")
    assert any("supervised-none-uniform-1 failed: " in line for line in said)
    before = {file: file.stat().st_mtime_ns for file in whole.location.rglob("*") if file.is_file()}
    assert before
    broken.location.unlink()
    common = ("--recipes", recipes, "--out", out, "--weighting", "none", "--gradients", "uniform", "--seeds", 1)
    both = call(*common)
    assert both.exit_code == 0, both.output
    assert broken.finished
    assert "fixmatch-none-uniform-1 begins" not in both.output
    assert before == {file: file.stat().st_mtime_ns for file in before}
    told = CliRunner().invoke(app, ["bench", "grid", "--out", str(out), "--report", "--json"])
    supervised, fixmatch = json.loads(told.stdout)["cells"]
    for cell, images in ((supervised, {"student": 2}), (fixmatch, {"student": 4, "teacher": 2})):
        run = out / "runs" / f"{cell['method']}-none-uniform-1"
        assert json.loads((run / "result.json").read_text())["steps"] == 3
        assert config_io.parse((run / "config.yaml").read_text()).seed == 1
        assert {network: parts["encoder"] for network, parts in cell["images"].items()} == images
        assert cell["backwards"] == 1
        assert 2**26 < cell["peak_bytes"] < 2**33
        assert cell["missing"] == {}
    assert fixmatch["gain"] == pytest.approx(fixmatch["miou"] - supervised["miou"])
    assert (out / "grid.png").is_file()


@pytest.mark.slow
def test_ctrl_c_saves_every_run_and_the_same_command_goes_on(tmp_path, recipes):
    out = tmp_path / "grid"
    options = ["--recipes", recipes, "--out", out, "--methods", "supervised", "--weighting", "none", "--gradients"]
    command = [sys.executable, "-m", "raysemi.cli", "bench", "grid", *options, "uniform", "--seeds", 0]
    run = GridRun(Cell("supervised", "none", "uniform"), 0, out)
    with subprocess.Popen(
        [str(part) for part in [*command, "train.steps=100000"]], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        while process.poll() is None:
            if run.log.is_file() and "step 3/" in run.log.read_text():
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.05)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert "each run from its last checkpoint" in said
    assert run.record["state"] == "stopped"
    (step,) = checkpoint.steps(RunFolder(run.location))
    assert step >= 3
    assert run.standing() == f"at step {step}"
    other = call(*options, "uniform", "--seeds", 0, "train.steps=50")
    assert other.exit_code == MISTAKE
    assert "was begun with" in other.output
