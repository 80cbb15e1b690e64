"""Sweeps that come along: each can start, on each of its data sets, and each of its trials is one of its own."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from makers import true_boxes

from raysemi import config_io
from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.sources import open_source
from raysemi.tune import checks, sweep

ROWS = {
    "corrmatch-t5": 9,
    "corrmatch-t6": 3,
    "corrmatch-t7": 4,
    "corrmatch-t8": 10,
    "derprop-t3": 8,
    "derprop-t4": 5,
    "rank-k": 5,
    "rank-alpha": 5,
    "rank-boxes": 4,
    "rank-memory": 5,
    "pos-t4": 3,
    "pos-t5": 4,
}
SEARCHES = sorted(set(sweep.names()) - set(ROWS))
CAMVID = Path(__file__).resolve().parents[4] / "shared" / "data" / "camvid"


def commands(name: str) -> Iterator[tuple[list[str], sweep.SweepConfig]]:
    """Overrides of each `raysemi tune run` in a sweep's header, and what they give."""
    for line in (sweep.SWEEPS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#   raysemi tune run "):
            _, _, _, _, named, *words = shlex.split(line)
            assert named == name
            overrides = [word for word in words if "=" in word]
            yield overrides, sweep.load(name, overrides)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    folder = tmp_path_factory.mktemp("pools") / "scenes"
    shutil.copytree(scenes, folder)
    true_boxes(Pool.open(folder / "unlabeled"), "things")
    return folder


@pytest.mark.parametrize("name", sweep.names())
def test_each_command_of_a_header_can_start(name: str, pools: Path) -> None:
    found = list(commands(name))
    assert found
    for overrides, config in found:
        assert config.question.endswith("?")
        assert (config.resources.gpus > 0) == (config.recipes == "voc")
        space = checks.build(sweep.load(name, [*overrides, f"set.data.pools={pools}"]))
        assert {p.name for p in space.parameters} or space.rows


@pytest.mark.parametrize("name", sweep.names())
def test_a_sweep_is_there_for_each_data_set(name: str) -> None:
    data = {
        config.recipes for other in (name, f"{name}-voc") if other in sweep.names() for _, config in commands(other)
    }
    if name in ROWS:
        assert data == {"voc", "scenes"}
    elif name != "methods-voc":
        assert data == {"voc", "scenes", "camvid"}


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pools") / "camvid"
    pack(open_source("folder", CAMVID), out, split="1_64", processes=1)
    return out


@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid at ../shared/data/camvid")
@pytest.mark.parametrize("name", [name for name in SEARCHES if name != "methods-voc"])
def test_a_search_can_start_on_camvid(name: str, camvid: Path) -> None:
    (given,) = (overrides for overrides, config in commands(name) if config.recipes == "camvid")
    if name == "rank-topk":  # no boxes without an hour of a detector
        given += ["set.weighting.detector=null", "space.weighting.score={choices: [0.85]}"]
    assert checks.build(sweep.load(name, [*given, f"set.data.pools={camvid}"])).parameters


@pytest.mark.parametrize("name", SEARCHES)
def test_each_parameter_is_searched_around_what_the_recipe_has(name: str) -> None:
    for _, config in commands(name):
        space = checks.build(config, tried=False)
        assert space.parameters
        for parameter in space.parameters:
            assert len(set(map(str, parameter.ends))) > 1, parameter.name
            for own in (space.bases[cell][parameter.path] for cell in parameter.cells):
                inside = own in parameter.choices if parameter.choices else parameter.low <= own <= parameter.high
                assert inside, (config.recipes, parameter.name, own)


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_of_a_table_are_runs_of_their_own(name: str) -> None:
    for _, config in commands(name):
        space = checks.build(config, tried=False)
        assert len(space.grid) == ROWS[name]
        configs = [space.config(draw, "run=run") for _, draw in space.grid]
        texts = [config_io.dump(one) for one in configs]
        assert len(set(texts)) == len(texts)
        for row, one in zip(config.rows, configs, strict=True):
            if any(path.startswith("method.region.") and "enable" not in path for path in row.set):
                assert one.method.region.enable, row.label  # or what the row sets changes nothing
            if config.recipes == "scenes":
                assert one.train.steps <= 300
        published = [row.published for row in space.rows if row.published is not None]
        assert published
        assert all(40 < miou < 90 for miou in published)


def test_every_table_of_the_papers_has_its_sweep() -> None:
    assert set(ROWS) < set(sweep.names())


def test_fewer_methods_need_fewer_parameters() -> None:
    given = ["methods=[supervised, unimatch_v2]", "space.method.strong_weight=null", "space.method.kl_weight=null"]
    space = checks.build(sweep.load("methods", given), tried=False)
    assert {parameter.name for parameter in space.parameters} == {
        "optim.lr",
        "unimatch_v2.unsupervised_weight",
        "gradients.min_ratio",
    }
