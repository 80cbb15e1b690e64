from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from raysemi.data.sources import open_source
from raysemi.data.sources.folder import read_class_map
from raysemi.errors import ConfigError, DataError

MAP = """
classes:
  - {name: road, id: 7, color: [128, 64, 128]}
  - {name: vehicle, id: [26, 27], color: [[0, 0, 142], [0, 0, 70]]}
  - plants
ignore: [0, -1]
ignore_colors: [[0, 0, 0]]
"""


@pytest.fixture
def root(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "images" / part / "town").mkdir(parents=True)
        (tmp_path / "labels" / part / "town").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("sky\nbuilding\npole\n")
    Image.new("RGB", (7, 5), (9, 8, 7)).save(tmp_path / "images/train/town/a.JPG", "JPEG")
    Image.new("RGB", (7, 5)).save(tmp_path / "images/train/b.png")
    return tmp_path


def put_mask(root, values, name="town/a", mode=None):
    Image.fromarray(np.asarray(values), mode).save(root / f"labels/train/{name}.png")


def test_items_have_keys_below_the_part_and_know_their_masks(root):
    put_mask(root, np.array([[0, 1, 2, 255]], np.uint8))
    (root / "images/train/.DS_Store").write_bytes(b"x")
    (root / "images/train/notes.txt").write_text("x")
    source = open_source("folder", root)
    items = {item.key: item for item in source.items("train")}
    assert set(items) == {"town/a", "b"}
    assert items["town/a"].has_mask
    assert not items["b"].has_mask
    assert source.mask(items["b"]) is None
    assert source.mask(items["town/a"]).tolist() == [[0, 1, 2, 255]]
    suffix, data = source.image_bytes(items["town/a"])
    assert suffix == "jpg"
    assert data == (root / "images/train/town/a.JPG").read_bytes()


def test_a_palette_png_is_read_by_its_raw_index(root):
    image = Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).convert("P")
    image.putpalette([200, 10, 10, 2, 2, 2, 0, 0, 0] + [5] * 759)
    image.putdata([2, 1, 0, 255])
    image.save(root / "labels/train/town/a.png")
    source = open_source("folder", root)
    item = next(item for item in source.items("train") if item.has_mask)
    assert source.mask(item).tolist() == [[2, 1, 0, 255]]


def test_ids_are_mapped_to_positions_also_from_16_bits(root):
    (root / "classes.txt").write_text(MAP)
    source = open_source("folder", root)
    assert source.classes == ("road", "vehicle", "plants")
    assert source.palette[:2] == ((128, 64, 128), (0, 0, 142))
    put_mask(root, np.array([[7, 26, 27, 2], [0, 255, 7, 7]], np.uint16))
    item = next(item for item in source.items("train") if item.has_mask)
    mask = source.mask(item)
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 1, 1, 2], [255, 255, 0, 0]]


def test_negative_ids_in_32_bit_masks_can_be_ignored(root):
    (root / "classes.txt").write_text(MAP)
    Image.fromarray(np.array([[7, -1, 26]], np.int32)).save(root / "labels/train/town/a.tif")
    (root / "labels/train/town/a.tif").rename(root / "labels/train/town/a.png")  # a PNG holds no negative numbers
    source = open_source("folder", root)
    item = next(item for item in source.items("train") if item.has_mask)
    assert source.mask(item).tolist() == [[0, 255, 1]]


def test_colours_are_mapped_and_unknown_ones_named(root):
    (root / "classes.txt").write_text(MAP)
    source = open_source("folder", root)
    put_mask(root, np.array([[[128, 64, 128], [0, 0, 142], [0, 0, 70], [0, 0, 0]]], np.uint8))
    item = next(item for item in source.items("train") if item.has_mask)
    assert source.mask(item).tolist() == [[0, 1, 1, 255]]
    put_mask(root, np.array([[[128, 64, 128], [1, 2, 3]]], np.uint8))
    with pytest.raises(DataError, match=r"town/a\.png .*\(1, 2, 3\)"):
        source.mask(item)


def test_an_unknown_id_is_named_with_the_number_of_classes(root):
    put_mask(root, np.array([[0, 37]], np.uint8))
    source = open_source("folder", root)
    with pytest.raises(DataError, match="class id 37 of 3"):
        source.mask(next(item for item in source.items("train") if item.has_mask))


def test_rgb_masks_without_colours_and_broken_masks_are_refused(root):
    put_mask(root, np.zeros((2, 3, 3), np.uint8))
    source = open_source("folder", root)
    item = next(item for item in source.items("train") if item.has_mask)
    with pytest.raises(DataError, match="one channel; got RGB"):
        source.mask(item)
    item.mask.write_bytes(item.mask.read_bytes()[:40])
    with pytest.raises(DataError, match="readable PNG"):
        source.mask(item)


def test_all_faults_of_the_files_are_told_at_once(root):
    Image.new("RGB", (3, 2)).save(root / "images/train/old.bmp")
    Image.new("RGB", (3, 2)).save(root / "images/train/b.jpg")
    put_mask(root, np.zeros((2, 3), np.uint8), name="nowhere")
    with pytest.raises(DataError) as caught:
        open_source("folder", root).items("train")
    for text in ("old.bmp must be one of", "must not share the key 'b'", "nowhere.png must have an image"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: (root / "classes.txt").unlink(), "class names"),
        (lambda root: (root / "classes.txt").write_text("\n"), "1 to 255; got 0"),
        (lambda root: (root / "classes.txt").write_text("sky\nsky\n"), "'sky' again"),
        (lambda root: (root / "classes.txt").write_text("classes: [{name: a, id: 3}, {name: b, id: 3}]"), "3 again"),
        (lambda root: (root / "classes.txt").write_text("classes: [{nam: a}]"), "must have a name"),
        (lambda root: (root / "classes.txt").write_text("classes: [a]\ncolour: 3"), "'colour' must be one of"),
        (lambda root: (root / "classes.txt").write_text("classes: [{name: a, color: [1, 2]}]"), r"must be \[r, g, b\]"),
        (lambda root: (root / "images").rename(root / "pictures"), "must hold images/train"),
    ],
)
def test_a_wrong_folder_or_class_file_is_told(root, change, text):
    change(root)
    with pytest.raises(DataError, match=text):
        open_source("folder", root)


def test_empty_and_missing_parts_are_told(root):
    source = open_source("folder", root)
    with pytest.raises(DataError, match=r"images/val must hold images"):
        source.items("val")
    (root / "images/val/town").rmdir()
    (root / "images/val").rmdir()
    with pytest.raises(DataError, match=r"images/val must be a folder"):
        source.items("val")


def test_class_map_keeps_255_for_a_class_that_asks_for_it(tmp_path):
    (tmp_path / "classes.yaml").write_text("classes: [{name: a, id: 0}, {name: b, id: 255}]")
    assert read_class_map(tmp_path / "classes.yaml").index_of_id == {0: 0, 255: 1}


def test_unknown_sources_and_missing_roots_are_told(tmp_path):
    with pytest.raises(ConfigError, match="folder, voc"):
        open_source("imagenet", tmp_path)
    with pytest.raises(DataError, match="exists"):
        open_source("folder", tmp_path / "nowhere")
