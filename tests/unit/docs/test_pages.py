"""What the documents point at is there: links, anchors, files, tests, settings, recipes, sweeps."""

from __future__ import annotations

import ast
import fnmatch
import re
from itertools import product
from pathlib import Path

import pytest
from documents import ROOT, anchors, code_in_text, links

from raysemi import catalogue, config_io
from raysemi.engine.detect import DetectConfig
from raysemi.engine.trackers import MlflowConfig, WandbConfig
from raysemi.errors import ConfigError
from raysemi.tune.sweep import SweepConfig

TOP = ("tests", "raysemi", "docs", "infra", "tune", "jobs", "requirements")
SECTIONS = ("data", "model", "method", "weighting", "gradients", "train", "optim", "eval", "ray", "log", "boxes")


def test_links_and_anchors_lead_somewhere() -> None:
    wrong = []
    for where, file, target in links():
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (file.parent / path).resolve() if path else file
        if not found.is_file() or not found.is_relative_to(ROOT):
            wrong.append(f"{where}: {target} is no file of the repository")
        elif anchor and anchor not in anchors(found):
            wrong.append(f"{where}: {target} has no such heading")
    assert not wrong, "\n".join(wrong)


def expanded(code: str) -> list[str]:
    """`a.{b,c}` as [`a.b`, `a.c`]."""
    parts = [part.split(",") if index % 2 else [part] for index, part in enumerate(re.split(r"[{}]", code))]
    return ["".join(chosen) for chosen in product(*parts)]


def test_files_that_are_named_exist() -> None:
    wrong = []
    for where, code in code_in_text():
        if re.fullmatch(rf"(?:{'|'.join(TOP)})/[\w./{{}},*-]+", code):
            wrong += [f"{where}: {path}" for path in expanded(code) if not list(ROOT.glob(path.rstrip("/")))]
    assert not wrong, "\n".join(wrong)


def test_tests_that_are_named_exist() -> None:
    files = {file.relative_to(ROOT).as_posix(): file for file in (ROOT / "tests").rglob("test_*.py")}
    names = {path: re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8")) for path, file in files.items()}
    everywhere = [name for own in names.values() for name in own]
    wrong = []
    for where, code in code_in_text():
        if match := re.fullmatch(r"((?:\w+/)*test_\w+\.py)(?:::(test_[\w*]+))?", code):
            fitting = [path for path in names if f"/{path}".endswith(f"/{match[1]}")]
            found = [name for path in fitting for name in names[path]]
            if not fitting or (match[2] and not fnmatch.filter(found, match[2])):
                wrong.append(f"{where}: {code}")
        elif re.fullmatch(r"test_[\w*]+", code) and not fnmatch.filter(everywhere, code):
            wrong.append(f"{where}: {code}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Paths of all settings that a run of some method, or a detector's, has, and of their sections."""
    leaves: set[str] = set(config_io.leaves(DetectConfig(run="a", data={"labeled": "a", "val": "a"})))
    leaves |= {f"log.mlflow.{name}" for name in MlflowConfig.model_fields}  # null unless they are asked for
    leaves |= {f"log.wandb.{name}" for name in WandbConfig.model_fields}
    for method, weighting, rule in product(catalogue.names(), ("none", "rank"), catalogue.values("gradients")):
        try:
            config = config_io.load(f"folder-{method}", ["data.pools=a", f"weighting={weighting}", f"gradients={rule}"])
        except ConfigError:
            continue
        leaves |= config_io.leaves(config).keys()
    sections = {path.rsplit(".", depth)[0] for path in leaves for depth in range(1, path.count(".") + 1)}
    return leaves | sections | {"data.pools"}


def test_settings_that_are_named_exist(known: set[str]) -> None:
    wrong = []
    for where, code in code_in_text():
        words = code.strip("'").split(" ") if "=" in code else [code]
        for word in words:
            path = word.strip("'").partition("=")[0]
            if not re.fullmatch(rf"(?:{'|'.join(SECTIONS)})\.[a-z_0-9.,{{}}]+(?:\.\*)?", path):
                continue
            wrong += [f"{where}: {one}" for one in expanded(path) if one.removesuffix(".*") not in known]
    assert not wrong, "\n".join(wrong)


def test_recipes_with_settings_are_accepted() -> None:
    """`voc-unimatch weighting=rank` in the tables of published settings."""
    recipes = {file.stem for file in (ROOT / "raysemi/recipes").glob("*.yaml")}
    for where, code in code_in_text():
        recipe, *overrides = code.split()
        if recipe in recipes and all("=" in word for word in overrides):
            assert config_io.load(recipe, overrides), where


def test_the_table_of_ready_sweeps_is_whole() -> None:
    text = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|", text, re.MULTILINE)
    found = set()
    for row in rows:
        first, *more = re.findall(r"`([\w-]+)`", row)
        found |= {first, *(first.partition("-")[0] + name if name.startswith("-") else name for name in more)}
    assert found == {file.stem for file in (ROOT / "tune/sweeps").glob("*.yaml")}


def test_sweeps_settings_that_are_named_exist() -> None:
    fields = set(SweepConfig.model_fields)
    for where, code in code_in_text():
        if where.startswith("docs/sweeps.md") and (match := re.fullmatch(r"(\w+)(?:\.\w+)?: .+", code)):
            assert match[1] in fields or match[1] in {f for m in fields for f in _inner(m)}, f"{where}: {code}"


def _inner(field: str) -> set[str]:
    kind = SweepConfig.model_fields[field].annotation
    return set(getattr(kind, "model_fields", {}))


def test_public_names_in_python_are_public() -> None:
    import raysemi

    for where, code in code_in_text():
        if match := re.match(r"raysemi\.([a-z_]+)\(", code):
            assert hasattr(raysemi, match[1]), f"{where}: {code}"


def test_modules_of_the_layers_exist() -> None:
    """The table of layers in architecture.md and the test of layers name the same parts."""
    text = (ROOT / "tests/test_layers.py").read_text(encoding="utf-8")
    layers = next(
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LAYERS"
    )
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Layers")[2].partition("\n## ")[0]
    for name in layers:
        path = Path(*name.split("."))
        if name != "raysemi":
            assert f"`{path.name}" in table or f"`{path.name}.py`" in table, name


def test_the_table_of_costs_is_that_of_the_recipes() -> None:
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    line = (
        r"^\| (`\w+-\w+`(?:, `[\w-]+`)?) \| ([\d,]+) \| (\d+) \+ (\d+), crop (\d+) \| (\d+) of [^|]+ \| ([\d.]+) \| \|$"
    )
    rows = re.findall(line, text, re.MULTILINE)
    assert len(rows) == 7
    for recipes, *numbers, hours in rows:
        steps, labeled, unlabeled, crop, evaluations = (int(number.replace(",", "")) for number in numbers)
        for recipe in re.findall(r"`([\w-]+)`", recipes):
            config = config_io.load(recipe)
            assert (config.train.steps, config.data.crop) == (steps, crop)
            assert (config.train.batch.labeled, config.train.batch.unlabeled) == (labeled, unlabeled)
            assert round(steps / config.eval.every) == evaluations
            assert f"{steps * 0.1 / 3600:.1f}" == hours
