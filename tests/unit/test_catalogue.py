"""`raysemi methods`: what the config classes declare, all of it, and nothing that they do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from raysemi import catalogue
from raysemi.cli import app
from raysemi.cli.exits import MISTAKE
from raysemi.config_io import load
from raysemi.methods import METHODS


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["methods", *arguments], catch_exceptions=False)


def leaves(tree: Any, path: str) -> dict[str, Any]:
    if isinstance(tree, BaseModel):
        parts = (leaves(getattr(tree, name), f"{path}.{name}") for name in type(tree).model_fields)
        return {key: value for part in parts for key, value in part.items()}
    return {path: list(tree) if isinstance(tree, tuple) else tree}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_stands_there_with_the_default_of_a_run(name):
    run = load(None, ["run=x", "data.pools=x", f"method={name}"])
    described = {setting["path"]: setting["default"] for setting in catalogue.describe(name)["settings"]}
    assert {"method.name": name} | described == leaves(run.method, "method")


def searched(setting: dict[str, Any]) -> list[Any]:
    search = setting["search"] or {"choices": []}
    return search["choices"] if "choices" in search else [search["low"], search["high"]]


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_meaning_and_searches_what_the_config_accepts(name):
    """Each value, set with what its range requires and what stands beside it, makes a run."""
    described = {setting["path"]: setting for setting in catalogue.describe(name)["settings"]}
    for path, setting in described.items():
        assert setting["meaning"], path
        needed = {key: values[0] for key, values in setting["requires"].items()}
        assert needed.keys() <= described.keys()
        for value in searched(setting):
            beside = (setting["search"].get("beside", {})).get(value, {}) if isinstance(value, str) else {}
            texts = [f"{key}={json.dumps(wanted)}" for key, wanted in ({path: value} | needed | beside).items()]
            load(None, ["run=x", "data.pools=x", f"method={name}", *texts])


def test_a_range_names_the_settings_that_it_needs():
    fixmatch = {setting["path"]: setting for setting in catalogue.describe("fixmatch")["settings"]}
    assert fixmatch["method.criterion.power"]["requires"] == {"method.criterion.name": ["balanced"]}
    assert fixmatch["method.average.ratio"]["requires"] == {"method.average.kind": ["period"]}
    assert fixmatch["method.threshold"]["requires"] == {}
    assert fixmatch["method.average.kind"]["search"] == {"choices": ["ema", "period"]}  # it needs a teacher
    for name, kinds in (("u2pl", ["ema"]), ("unimatch", ["none", "ema", "period"])):
        described = {setting["path"]: setting for setting in catalogue.describe(name)["settings"]}
        assert described["method.average.kind"]["search"]["choices"] == kinds
        assert (described["method.average.ratio"]["search"] is None) == ("period" not in kinds)
    derprop = {setting["path"]: setting for setting in catalogue.describe("derprop")["settings"]}
    assert derprop["method.labeler"]["search"] == {
        "choices": ["student", "momentum"], "beside": {"momentum": {"method.fp.weight": 0.0}},
    }  # fmt: skip
    assert derprop["method.threshold.momentum"]["requires"] == {"method.threshold.mode": ["dynamic"]}
    lines = {row[0]: row[3] for row in catalogue.settings_table("fixmatch")[1]}
    assert lines["method.criterion.power"] == "0.25 to 0.75 (with method.criterion.name=balanced)"


def test_nested_sections_ranges_and_defaults_of_parents():
    fixmatch = {setting["path"]: setting for setting in catalogue.describe("fixmatch")["settings"]}
    assert fixmatch["method.threshold"]["search"] == {"low": 0.7, "high": 0.99, "log": False}
    assert fixmatch["method.threshold"]["default"] == 0.95
    assert fixmatch["method.threshold"]["meaning"] == "Least teacher probability at which a pixel is trusted."
    assert fixmatch["method.average.kind"]["default"] == "ema"  # of the field, not of its class
    assert fixmatch["method.criterion.min_kept"]["unit"] == "pixels"
    derprop = {setting["path"]: setting for setting in catalogue.describe("derprop")["settings"]}
    assert derprop["method.region.segments"]["search"] == {"choices": [16, 32, 64, 128, 256]}
    assert derprop["method.kernel"]["default"] == [-1.0, 1.0]


def test_what_a_method_needs():
    about = {name: catalogue.describe(name) for name in ("supervised", "fixmatch", "derprop")}
    assert [each["unlabeled"] for each in about.values()] == ["unused", "needed", "optional"]
    assert [each["strong_views"] for each in about.values()] == [0, 1, 1]
    assert [each["heads"] for each in about.values()] == [[], [], ["correlation"]]
    assert [each["average"] for each in about.values()] == ["none", "ema", "period"]
    assert about["fixmatch"]["source"] == "Sohn et al. 2020, arXiv:2001.07685, eqs. 3-4"
    assert "uniform" in about["fixmatch"]["gradients"]
    assert "none" in about["fixmatch"]["weighting"]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "supervised"])
def test_every_method_names_its_source_on_one_line(name):
    source = catalogue.describe(name)["source"]
    assert source
    assert "\n" not in source
    assert "Differs" not in source
    assert "Axes" not in source


def test_the_command_prints_tables():
    result = call()
    assert result.exit_code == 0
    assert all(name in result.output for name in METHODS)
    one = call("derprop").output
    for setting in catalogue.describe("derprop")["settings"]:
        assert f" {setting['path']} " in one
    assert "0.02 to 1.0, log" in one
    assert "null, 64, 128" in one


def test_the_command_prints_json():
    assert [each["name"] for each in json.loads(call("--json").output)] == list(METHODS)
    assert json.loads(call("fixmatch", "--json").output) == catalogue.describe("fixmatch")


def test_an_unknown_method_is_a_mistake():
    result = call("fixmach")
    assert result.exit_code == MISTAKE
    assert "Did you mean fixmatch?" in result.output
