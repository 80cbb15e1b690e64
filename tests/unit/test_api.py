"""What notebooks call, where the command line's tests do not reach: a run meets a pool that others made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from makers import tiny_run
from PIL import Image

import raysemi
from raysemi import api
from raysemi.errors import DataError


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "run"
    raysemi.train(tiny_run(scenes, folder, "supervised", "train.steps=1"))
    return folder


@pytest.mark.parametrize("classes", ["the run's", "none"])
def test_a_pool_is_drawn_in_the_colours_of_the_run(trained, scenes, tmp_path, classes):
    other = {"classes": [], "palette": []} if classes == "none" else {"palette": [[1, 2, 3]] * 7}
    pool = foreign(scenes / "val", tmp_path, **other)
    assert api.predict(trained, pool=pool, out=tmp_path / "out") == 5
    palette = [value for colour in api.load_model(trained).palette for value in colour]
    for file in (tmp_path / "out" / "labels").rglob("*.png"):
        with Image.open(file) as label:
            assert label.getpalette()[:21] == palette


def test_a_pool_of_other_classes_is_not_predicted(trained, scenes, tmp_path):
    names = json.loads((scenes / "val" / "pool.json").read_text())["classes"]
    pool = foreign(scenes / "val", tmp_path, classes=names[::-1])
    with pytest.raises(DataError, match=r"pool must name no classes or those of .*got .*star, ring") as caught:
        api.predict(trained, pool=pool, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def foreign(pool: Path, folder: Path, **changes: object) -> Path:
    """A copy of a pool with other contents of `pool.json`."""
    shutil.copytree(pool, folder / "pool")
    content = json.loads((pool / "pool.json").read_text())
    (folder / "pool" / "pool.json").write_text(json.dumps(content | changes))
    return folder / "pool"
