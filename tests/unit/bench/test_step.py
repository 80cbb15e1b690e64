"""`raysemi bench step`: real steps of a small network, timed and weighed."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from raysemi.bench.passes import record
from raysemi.bench.step import GOALS, StepBench, StepSettings, measure_step
from raysemi.bench.step_table import as_markdown, measure_all, settings_of_all
from raysemi.cli import app
from raysemi.cli.exits import MISTAKE
from raysemi.errors import ConfigError
from raysemi.methods import METHODS

FIELDS = {
    "method", "backbone", "crop", "batch", "threads", "step_s", "floor_s", "ratio", "peak_bytes", "peak_floor_bytes",
    "device", "torch", "compile", "precision",
}  # fmt: skip
SMALL = ("model.channels=16", "model.low_channels=8")


def call(*arguments):
    command = ["bench", "step", "--backbone", "test_efficientnet", "--batch", "2", *(str(a) for a in arguments)]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def test_it_prints_its_numbers_for_a_program():
    result = call("--method", "fixmatch", "--crop", 65, "--pairs", 3, "--override", "optim.name=adamw", "--json")
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got.keys() >= FIELDS
    assert (got["method"], got["crop"], got["batch"], got["pairs"], got["goal"]) == ("fixmatch", 65, 2, 3, 1.1)
    assert got["torch"] == torch.__version__
    assert 0.1 < got["ratio"] < 10
    assert got["ratio_quartiles"][0] <= got["ratio"] <= got["ratio_quartiles"][1]
    assert got["step_s"] > 0 < got["floor_s"]
    assert [one["part"] for one in got["passes"]] == ["encoder", "decoder"] * 2
    if not torch.cuda.is_available():
        trainer = StepBench(StepSettings("fixmatch", "test_efficientnet", 65, 2).config()).trainer
        # weights, gradients, two moments, the averaged copy
        least = 5 * sum(p.numel() * p.element_size() for p in trainer.student.parameters())
        assert got["peak_bytes"] > least
        assert got["peak_floor_bytes"] > least
        assert got["peak_bytes"] < 2**30 + 10 * least  # nothing of this process, which has run many tests


def test_it_prints_a_table_for_people(monkeypatch):
    monkeypatch.setattr("raysemi.bench.step._in_a_fresh_process", lambda settings, passes: 3 * 2**20)
    result = call("--method", "derprop", "--crop", 49, "--pairs", 1, "--threads", 1)
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if "student" in line]
    assert [row[1].strip() for row in rows] == ["encoder", "decoder", "correlation"] * 2
    assert [row[2].strip() for row in rows] == ["4", "6", "4", "2", "2", "2"]
    assert "goal 1.15" in result.output
    assert "peak memory of step 3 MiB" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--method", "fixmach", "--crop", 49), "method.name must be one of"),
        (("--method", "fixmatch", "--crop", 49, "--precision", "fp8"), "train.precision must be one of"),
        (("--method", "fixmatch", "--crop", 49, "--override", "optim.lrr=1"), "Did you mean optim.lr?"),
    ],
)
def test_mistakes_are_said_before_anything_runs(arguments, text):
    result = call(*arguments)
    assert result.exit_code == MISTAKE
    assert text in result.output


def test_goals_are_of_methods_of_the_issue():
    assert GOALS["supervised"] == GOALS["unimatch_v2"] == 1.10
    assert GOALS["derprop"] == GOALS["ael"] == 1.15
    assert GOALS["u2pl"] == 1.25


def test_a_measured_step_is_a_real_one_and_stays_the_same_step():
    bench = StepBench(StepSettings("derprop", "test_efficientnet", 49, 2, overrides=SMALL).config())
    before = {name: value.clone() for name, value in bench.trainer.student.state_dict().items()}
    for number in range(2):
        bench.step(number)
        assert bench.trainer.step == 505
    after = bench.trainer.student.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert float(bench.trainer.skipped) == 0
    assert len({host.keys_U for host in bench.hosts}) > 1


def test_one_pair_is_enough_for_a_number(monkeypatch):
    monkeypatch.setattr("raysemi.bench.step._in_a_fresh_process", lambda settings, passes: 0)
    result = measure_step(StepSettings("supervised", "test_efficientnet", 33, 2, overrides=SMALL), pairs=1)
    assert result.ratio == pytest.approx(result.step_s / result.floor_s)


def test_pareto_counts_its_second_backward_pass_in_the_floor():
    settings = StepSettings("fixmatch", "test_efficientnet", 49, 2, gradients="pareto", overrides=SMALL)
    made = StepBench(settings.config())
    backwards = {one.network: one.num_backwards for one in record(made.trainer, lambda: made.step(0))}
    assert backwards == {"teacher": 0, "student": 2}


def test_the_views_are_those_of_the_method():
    """AugSeg's strong views are of random intensity; the parameters of a jitter are others."""
    hosts = {
        name: StepBench(StepSettings(name, "test_efficientnet", 33, 2, overrides=SMALL).config()).hosts[0]
        for name in ("fixmatch", "augseg")
    }
    assert (hosts["augseg"].strong, hosts["fixmatch"].strong) == ("intensity", "jitter")


def test_a_table_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("raysemi.bench.step._in_a_fresh_process", lambda settings, passes: 3e6 if passes else 5e6)
    rest = {"encoder": "test_efficientnet", "crop": 33, "overrides": SMALL}
    every = settings_of_all(weighting="rank", gradients="pareto", **rest)
    assert [one.method for one in every] == [name for name in METHODS if name != "supervised"]
    assert {(one.weighting, one.gradients, one.crop, one.batch) for one in every} == {("rank", "pareto", 33, 2)}
    first = measure_all(every[:1], tmp_path, pairs=1)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    both = measure_all(every[:2], tmp_path, pairs=1)
    assert file.stat().st_mtime_ns == written
    assert both[0].step_s == first[0].step_s
    line = next(line for line in as_markdown(both).splitlines() if line.startswith(f"| {every[1].method} |"))
    assert line.endswith("| 5 | 3 | 2 |")
    with pytest.raises(ConfigError, match="--out must be a folder of these settings"):
        measure_all(every[:1], tmp_path, pairs=2)


def test_sizes_of_the_goals():
    size = {
        one.method: (one.encoder, one.crop, one.batch) for one in settings_of_all(weighting="none", gradients="uniform")
    }
    assert size.pop("unimatch_v2") == ("vit_small_patch14_dinov2.lvd142m", 322, 2)
    assert set(size.values()) == {("resnet50", 321, 2)}


def test_without_all_every_size_is_needed():
    result = CliRunner().invoke(app, ["bench", "step", "--method", "fixmatch"], catch_exceptions=False)
    assert result.exit_code == MISTAKE
    assert "--method, --backbone, --crop and --batch must be given" in result.output
