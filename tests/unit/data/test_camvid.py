"""Real street scenes through pack and reader: a split list, class counts, the same pixels as the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.sources import open_source

CAMVID = Path(__file__).resolve().parents[4] / "shared" / "data" / "camvid"
pytestmark = pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid at ../shared/data/camvid")


@pytest.mark.usefixtures("fork_server")
def test_a_split_of_camvid(tmp_path: Path) -> None:
    pack(open_source("folder", CAMVID), tmp_path, split="1_64", processes=2)
    pools = {name: Pool.open(tmp_path / name) for name in ("labeled", "unlabeled", "val")}
    assert {name: pool.num_samples for name, pool in pools.items()} == {"labeled": 6, "unlabeled": 361, "val": 101}
    assert [pools[name].num_masks for name in pools] == [6, 0, 101]
    labeled, unlabeled = ({pools[name].row(i).key for i in range(pools[name].num_samples)} for name in list(pools)[:2])
    assert labeled == set((CAMVID / "splits" / "1_64.txt").read_text().split())
    assert labeled.isdisjoint(unlabeled)
    assert len(labeled | unlabeled) == len((CAMVID / "splits" / "train.txt").read_text().split())

    reader, pixels = Reader(pools["labeled"]), np.zeros(256, np.int64)
    for index in range(6):
        key = pools["labeled"].row(index).key
        image, mask = (next(CAMVID.glob(f"{folder}/train/{key}.*")) for folder in ("images", "labels"))
        assert np.array_equal(reader.image(index), np.asarray(Image.open(image).convert("RGB")))
        assert np.array_equal(reader.mask(index), np.asarray(Image.open(mask)))
        pixels += np.bincount(reader.mask(index).ravel(), minlength=256)
    assert not pixels[11:255].any()
    classes = pools["labeled"].classes
    assert [classes[index] for index in np.argsort(pixels[:11])[:2]] == ["pedestrian", "bicyclist"]  # rare ones
