"""Sweeps that come along: each can start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from makers import true_boxes

from raysemi.data.pool import Pool
from raysemi.tune import spaces, sweep

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


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    folder = tmp_path_factory.mktemp("pools") / "scenes"
    shutil.copytree(scenes, folder)
    true_boxes(Pool.open(folder / "unlabeled"), "things")
    return folder


@pytest.mark.parametrize("name", sweep.names())
def test_a_sweep_that_comes_along_can_start(name: str, pools: Path) -> None:
    there = ["recipes=scenes", "resources.gpus=0", "resources.workers=1", f"set.data.pools={pools}"]
    config = sweep.load(name, [*there, "set.train.steps=300"])
    assert config.question.endswith("?")
    space = spaces.build(config)
    if name in ROWS:
        assert len(space.grid) == ROWS[name]
        published = [row.published for row in space.rows if row.published is not None]
        assert published
        assert all(40 < miou < 90 for miou in published)
    else:
        assert space.parameters
        assert set(config.space) <= {p.name for p in space.parameters} | {p.path for p in space.parameters}


def test_every_table_of_the_papers_has_its_sweep() -> None:
    assert set(ROWS) < set(sweep.names())
