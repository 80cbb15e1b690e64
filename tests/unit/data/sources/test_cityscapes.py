from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from raysemi.data.sources import open_source
from raysemi.errors import DataError

TABLE = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
TABLE |= {28: 15, 31: 16, 32: 17, 33: 18}


@pytest.fixture
def root(tmp_path):
    for part, city in (("train", "aachen"), ("val", "ulm")):
        (tmp_path / "leftImg8bit" / part / city).mkdir(parents=True)
        (tmp_path / "gtFine" / part / city).mkdir(parents=True)
    return tmp_path


def put(root, name, kind=None, values=None):
    Image.new("RGB", (34, 1)).save(root / f"leftImg8bit/{name}_leftImg8bit.png")
    if kind is not None:
        Image.fromarray(np.array(values, np.uint8)).save(root / f"gtFine/{name}_gtFine_{kind}.png")


def test_label_ids_are_converted_by_the_table_and_all_others_ignored(root):
    put(root, "train/aachen/aachen_000000_000019", "labelIds", [[*range(34), 34, 77, 255]])
    source = open_source("cityscapes", root)
    (item,) = source.items("train")
    assert item.key == "aachen/aachen_000000_000019"
    assert source.mask(item).tolist() == [[*(TABLE.get(value, 255) for value in range(34)), 255, 255, 255]]
    assert source.classes[18] == "bicycle"
    assert len(source.classes) == len(source.palette) == 19


def test_train_ids_are_taken_directly_and_first(root):
    put(root, "val/ulm/ulm_1", "labelIds", [[7, 7]])
    put(root, "val/ulm/ulm_1", "labelTrainIds", [[18, 255]])
    put(root, "val/ulm/ulm_2")
    source = open_source("cityscapes", root)
    items = {item.key: item for item in source.items("val")}
    assert source.mask(items["ulm/ulm_1"]).tolist() == [[18, 255]]
    assert not items["ulm/ulm_2"].has_mask


def test_missing_images_are_told(root, tmp_path):
    with pytest.raises(DataError, match="leftImg8bit/train must hold"):
        open_source("cityscapes", root).items("train")
    with pytest.raises(DataError, match="must hold leftImg8bit"):
        open_source("cityscapes", tmp_path / "gtFine")
