from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from raysemi.data.sources import open_source
from raysemi.data.sources.coco import decode_runs, fill_polygon, rasterise
from raysemi.errors import DataError


def polygon(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


@pytest.fixture
def root(tmp_path):
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
    for name in ("000000000009", "000000000025"):
        Image.new("RGB", (8, 6)).save(tmp_path / f"train2017/{name}.jpg")
    Image.new("RGB", (8, 6)).save(tmp_path / "val2017/000000000139.jpg")
    return tmp_path


def instances(images, annotations):
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def put_annotations(root):
    (root / "annotations").mkdir()
    images = [{"id": 9, "file_name": "000000000009.jpg", "height": 6, "width": 8}]
    images.append({"id": 25, "file_name": "000000000025.jpg", "height": 6, "width": 8})
    small = {"image_id": 9, "category_id": 90, "area": 4, "iscrowd": 0, "segmentation": [polygon(2, 2, 4, 4)]}
    large = {"image_id": 9, "category_id": 13, "area": 24, "iscrowd": 0, "segmentation": [polygon(1, 1, 7, 5)]}
    runs = {"counts": [0, 12, 36], "size": [6, 8]}
    crowd = {"image_id": 9, "category_id": 1, "area": 99, "iscrowd": 1, "segmentation": runs}
    (root / "annotations/instances_train2017.json").write_text(instances(images, [small, crowd, large]))


def test_ready_masks_are_taken_unchanged(root):
    (root / "masks").mkdir()
    Image.fromarray(np.array([[0, 80, 255]], np.uint8)).save(root / "masks/000000000009.png")
    Image.fromarray(np.array([[1, 2, 3]], np.uint8)).save(root / "masks/000000000139.png")
    source = open_source("coco", root, check=False)
    items = {item.key: item for item in source.items("train")}
    assert source.mask(items["000000000009"]).tolist() == [[0, 80, 255]]
    assert not items["000000000025"].has_mask
    assert source.mask(source.items("val")[0]).tolist() == [[1, 2, 3]]
    assert len(source.classes) == 81
    assert (source.classes[1], source.classes[12], source.classes[80]) == ("person", "stop sign", "toothbrush")


def test_instances_are_painted_crowd_first_then_from_large_to_small(root):
    put_annotations(root)
    source = open_source("coco", root, check=False)
    assert source.classes == ("background", "person", "stop sign", "toothbrush")
    items = {item.key: item for item in source.items("train")}
    mask = pickle.loads(pickle.dumps(source)).mask(items["000000000009"])  # as it happens in another process
    assert mask.shape == (6, 8)
    expected = np.zeros((6, 8), np.uint8)
    expected[:, :2] = 255  # the crowd: 12 pixels down the columns of six
    expected[1:5, 1:7] = 2  # the stop sign lies over the crowd
    expected[2:4, 2:4] = 3  # the toothbrush, the smallest, lies on top
    assert (mask == expected).all()
    assert (source.mask(items["000000000025"]) == 0).all()
    assert len(source.items("train")[0].note) == 3


def test_the_size_of_the_train_part_is_checked(root):
    put_annotations(root)
    with pytest.raises(DataError, match="118287 images; got 2"):
        open_source("coco", root).items("train")


def test_a_polygon_holds_the_pixels_whose_centre_it_holds():
    triangle = [0.0, 0.0, 5.0, 0.0, 0.0, 4.0]
    y, x = np.mgrid[0:6, 0:7] + 0.5
    assert (fill_polygon(triangle, 6, 7) == (x / 5 + y / 4 < 1)).all()
    wider_than_the_image = [-3.0, 1.0, 9.0, 1.0, 9.0, 3.0, -3.0, 3.0]
    assert fill_polygon(wider_than_the_image, 4, 5).sum(axis=1).tolist() == [0, 5, 5, 0]


def test_runs_go_down_the_columns_and_may_be_compressed():
    expected = np.array([[0, 1, 0], [1, 1, 0]], bool)
    assert (decode_runs([1, 3, 2], 2, 3) == expected).all()
    assert (decode_runs("132", 2, 3) == expected).all()
    runs = [40, 3, 41, 1, 5]  # 40 needs two characters, the last two are negative differences
    assert (decode_runs(compress(runs), 9, 10).T.ravel() == np.repeat([0, 1, 0, 1, 0], runs)).all()
    with pytest.raises(ValueError, match="4 x 4"):
        decode_runs([1, 3], 4, 4)


def compress(runs):
    """The published encoder, written from its description: 5 bits a character, sign in the last group."""
    text = ""
    for position, run in enumerate(runs):
        value = run - runs[position - 2] if position > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 if more else bits) + 48)
    return text


def test_broken_annotations_are_told(root):
    with pytest.raises(DataError, match="neither"):
        open_source("coco", root)
    (root / "annotations").mkdir()
    path = root / "annotations/instances_train2017.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="instances format"):
        open_source("coco", root)
    with pytest.raises(DataError, match="category"):
        rasterise(3, 4, [{"iscrowd": 0, "area": 1, "category_id": 7, "segmentation": []}], {1: 1})
    with pytest.raises(DataError, match="run lengths"):
        rasterise(
            3, 4, [{"iscrowd": 0, "area": 1, "category_id": 1, "segmentation": {"counts": [3], "size": [3, 4]}}], {1: 1}
        )
    image = {"id": 1, "file_name": "gone.jpg", "height": 6, "width": 8}
    path.write_text(instances([image], []))
    with pytest.raises(DataError, match="none for gone"):
        open_source("coco", root, check=False).items("train")
