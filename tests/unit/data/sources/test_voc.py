from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from raysemi.data.sources import open_source
from raysemi.data.sources.voc import check_augmented
from raysemi.errors import DataError


def palette_png(path, values):
    image = Image.fromarray(np.array(values, np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [7] * 762)
    image.putdata([value for row in values for value in row])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def root(tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ("2007_01", "2007_02", "2008_03", "2008_04"):
        Image.new("RGB", (4, 3)).save(voc / "JPEGImages" / f"{name}.jpg")
    (voc / "ImageSets/Segmentation/train.txt").write_text("2007_01\n")
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_02\n")
    palette_png(voc / "SegmentationClass/2007_01.png", [[0, 15, 255]])
    palette_png(voc / "SegmentationClass/2007_02.png", [[1, 0, 20]])
    return tmp_path


def put_sbd(folder, names):
    folder.mkdir(parents=True)
    for position, name in enumerate(names):
        values = np.array([[position, 3, 0], [0, 0, 20]], np.uint8)
        savemat(folder / f"{name}.mat", {"GTcls": {"Segmentation": values, "Boundaries": 0}})


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_plain_voc_from_any_of_its_folders(root, inside):
    source = open_source("voc", root / inside)
    assert len(source.classes) == len(source.palette) == 21
    assert source.classes[15] == "person"
    assert source.palette[1] == (128, 0, 0)
    (train,) = source.items("train")
    (val,) = source.items("val")
    assert (train.key, val.key) == ("2007_01", "2007_02")
    assert source.mask(train).tolist() == [[0, 15, 255]]
    assert source.mask(val).tolist() == [[1, 0, 20]]


def test_a_given_train_list_may_hold_images_without_masks(root):
    voc = root / "VOCdevkit/VOC2012"
    (voc / "splits").mkdir()
    (voc / "splits/train.txt").write_text("2007_01\n2008_04\n")
    items = {item.key: item for item in open_source("voc", voc).items("train")}
    assert {key: item.has_mask for key, item in items.items()} == {"2007_01": True, "2008_04": False}


def test_sbd_adds_masks_and_vocs_own_come_first(root):
    put_sbd(root / "benchmark_RELEASE/dataset/cls", ["2007_01", "2007_02", "2008_03"])
    source = open_source("voc", root, check=False)
    items = {item.key: item for item in source.items("train")}
    assert set(items) == {"2007_01", "2008_03"}  # val is left out, an image without a mask too
    assert source.mask(items["2007_01"]).tolist() == [[0, 15, 255]]
    assert source.mask(items["2008_03"]).tolist() == [[2, 3, 0], [0, 0, 20]]
    moved = root / "elsewhere"
    (root / "benchmark_RELEASE").rename(moved)
    assert len(open_source("voc", root, sbd=moved, check=False).items("train")) == 2


def test_augmented_mask_folder_is_used_and_checked(root):
    palette_png(root / "VOCdevkit/VOC2012/SegmentationClassAug/2008_04.png", [[5, 5, 0]])
    with pytest.raises(DataError, match=r"must have 10582 images.*got 2"):
        open_source("voc", root).items("train")
    items = open_source("voc", root, check=False).items("train")
    assert [item.key for item in items] == ["2007_01", "2008_04"]


@pytest.mark.parametrize("masks", ["SegmentationClassAug", "SBD"])
def test_a_given_train_list_is_checked_too_where_augmented_masks_are(root, masks):
    voc = root / "VOCdevkit/VOC2012"
    if masks == "SBD":
        put_sbd(root / "SBD/cls", ["2008_03"])
    else:
        palette_png(voc / "SegmentationClassAug/2008_03.png", [[5, 5, 0]])
    (voc / "splits").mkdir()
    (voc / "splits/train.txt").write_text("2007_01\n2008_03\n2008_04\n")
    with pytest.raises(DataError, match=r"must have 10582 images.*got 3"):
        open_source("voc", root).items("train")
    items = open_source("voc", root, check=False).items("train")
    assert {item.key: item.has_mask for item in items} == {"2007_01": True, "2008_03": True, "2008_04": False}


def test_as_many_other_ids_are_not_the_augmented_list(tmp_path):
    with pytest.raises(DataError, match="as many others"):
        check_augmented((f"{number:05d}" for number in range(10_582)), tmp_path)


def test_broken_mat_missing_image_and_missing_folder_are_told(root):
    put_sbd(root / "SBD/cls", ["2008_03"])
    (root / "SBD/cls/2008_03.mat").write_bytes(b"no matlab")
    source = open_source("voc", root, check=False)
    item = next(item for item in source.items("train") if item.key == "2008_03")
    with pytest.raises(DataError, match=r"2008_03\.mat"):
        source.mask(item)
    (root / "VOCdevkit/VOC2012/JPEGImages/2007_02.jpg").unlink()
    with pytest.raises(DataError, match="none for 2007_02"):
        source.items("val")
    with pytest.raises(DataError, match="SBD folder"):
        open_source("voc", root, sbd=root / "VOCdevkit")
    with pytest.raises(DataError, match="JPEGImages"):
        open_source("voc", root / "SBD")
