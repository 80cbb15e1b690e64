from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from raysemi.data.pack import pack
from raysemi.data.sources import Item, open_source
from raysemi.data.splits import labeled_keys, split_origin
from raysemi.data.standard import standard_list, standard_names
from raysemi.errors import DataError

GIVEN = Path(__file__).parents[4] / "shared/splits"
COUNTS = {
    "voc": {"92": 92, "183": 183, "366": 366, "732": 732, "1464": 1464, "1_16": 662, "1_8": 1323, "1_4": 2646}
    | {"u2pl_1_16": 662, "u2pl_1_8": 1323, "u2pl_1_4": 2646},
    "cityscapes": {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488}
    | {"u2pl_1_16": 186, "u2pl_1_8": 372, "u2pl_1_4": 744, "u2pl_1_2": 1488},
    "coco": {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697},
}
LISTS = [(data, name) for data, lists in COUNTS.items() for name in lists]


@pytest.mark.parametrize("data", COUNTS)
def test_names_and_counts_are_the_papers_and_no_id_stands_twice(data):
    assert standard_names(data) == list(COUNTS[data])
    for name, count in COUNTS[data].items():
        ids = standard_list(data, name)
        assert (len(ids), len(set(ids))) == (count, count)


@pytest.mark.skipif(not GIVEN.is_dir(), reason=f"no copy of the published lists in {GIVEN}")
@pytest.mark.parametrize(("data", "name"), [*LISTS, ("voc", "train"), ("voc", "val")])
def test_lists_are_the_published_ones_in_their_order(data, name):
    folder = GIVEN / {"voc": "pascal"}.get(data, data)
    file = folder / f"{name}.txt" if name in ("train", "val") else folder / name / "labeled.txt"
    assert standard_list(data, name) == file.read_text(encoding="utf-8").splitlines()


def test_vocs_lists_fit_each_other():
    train, val = set(standard_list("voc", "train")), set(standard_list("voc", "val"))
    assert (len(train), len(val), len(train & val)) == (10_582, 1_449, 0)
    own = set(standard_list("voc", "1464"))
    for name in standard_names("voc"):
        ids = set(standard_list("voc", name))
        assert ids <= train
        assert ids <= own or name.startswith("1_") or (name == "u2pl_1_4" and own < ids)


def touch(folder: Path, keys: list[str], end: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        (folder / f"{key}{end}").touch()


def test_voc_needs_neither_lists_nor_sbd_for_the_splits_of_its_own_masks(tmp_path):
    train, val = standard_list("voc", "train"), standard_list("voc", "val")
    touch(tmp_path / "JPEGImages", [*train, *val, "2007_000027"], ".jpg")
    touch(tmp_path / "SegmentationClass", [*standard_list("voc", "1464"), *val], ".png")
    source = open_source("voc", tmp_path)
    items = source.items("train")
    assert [item.key for item in items] == train
    assert {item.key for item in source.items("val")} == set(val)
    for name in ("92", "183", "366", "732", "1464"):
        labeled = labeled_keys(name, items, root=source.root, standard=source.standard)
        assert labeled == set(standard_list("voc", name))
        assert {item.key for item in items if item.has_mask} >= labeled
    (tmp_path / f"JPEGImages/{train[0]}.jpg").unlink()
    touch(tmp_path / "ImageSets/Segmentation", ["train", "val"], ".txt")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text(f"{train[1]}\n{train[2]}\n")
    assert [item.key for item in source.items("train")] == train[1:3]  # VOC's own list, for want of all images


def test_a_list_of_ones_own_comes_first_and_a_list_before_a_number(tmp_path):
    train = [Item(key, has_mask=True) for key in (*standard_list("voc", "92"), "mine")]
    published = {item.key for item in train[:-1]}
    assert labeled_keys(92, train, root=tmp_path, standard="voc") == published
    assert split_origin("92", root=tmp_path, standard="voc") == {"split": "92", "list": "voc/92 of the papers"}
    assert len(labeled_keys(92, train, root=tmp_path)) == 92  # drawn: not the published ones
    assert labeled_keys(92, train, root=tmp_path) != published
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/92.txt").write_text("mine\n")
    assert labeled_keys("92", train, root=tmp_path, standard="voc") == {"mine"}
    assert split_origin("92", root=tmp_path, standard="voc")["list"] == "splits/92.txt"


def test_an_unknown_list_and_a_list_of_other_images_are_told(tmp_path):
    train = [Item("aachen/aachen_000000_000019", has_mask=True)]
    with pytest.raises(DataError, match=r"papers' lists are 1_30, 1_16, 1_8, 1_4, 1_2, u2pl_1_16, .*u2pl_1_2\. Choose"):
        labeled_keys("1_7", train, root=tmp_path, standard="cityscapes")
    with pytest.raises(DataError, match=r"cityscapes/1_30 of the papers must name train images; got .*among the 1"):
        labeled_keys("1_30", train, root=tmp_path, standard="cityscapes")


@pytest.mark.parametrize(
    ("data", "name", "image", "mask"),
    [
        ("cityscapes", "1_30", "leftImg8bit/train/{}_leftImg8bit.png", "gtFine/train/{}_gtFine_labelTrainIds.png"),
        ("coco", "1_512", "train2017/{}.jpg", "masks/{}.png"),
    ],
)
def test_pools_by_name(tmp_path, data, name, image, mask):
    listed = standard_list(data, name)
    others = ["aachen/x_1", "aachen/x_2", "ulm/x_3"] if data == "cityscapes" else ["111111111111", "111111111112"]
    for key in (*listed, *others):
        for path, picture in ((image, Image.new("RGB", (4, 3))), (mask, Image.new("L", (4, 3), 7))):
            file = tmp_path / path.format(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    source = open_source(data, tmp_path, **({"check": False} if data == "coco" else {}))
    made = pack(
        source, tmp_path / "out", split=name, pools=["labeled", "unlabeled"], processes=1, allow_same_images=True
    )
    assert {made["labeled"].key(i) for i in range(made["labeled"].num_samples)} == set(listed)
    assert {made["unlabeled"].key(i) for i in range(made["unlabeled"].num_samples)} == set(others)
    assert made["labeled"].made["list"] == f"{data}/{name} of the papers"
    assert len(made["labeled"].classes) == {"cityscapes": 19, "coco": 81}[data]


def test_images_that_coco_leaves_unlabeled_are_a_pool_of_the_same_classes(tmp_path):
    for path in ("train2017/000000000009", "unlabeled2017/000000000008", "unlabeled2017/000000000013"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), (len(path), 0, 0)).save(tmp_path / f"{path}.jpg")
    source = open_source("coco", tmp_path, images="unlabeled2017")
    (pool,) = pack(source, tmp_path / "out", pools=["unlabeled"], processes=1).values()
    assert [pool.key(i) for i in range(pool.num_samples)] == ["000000000008", "000000000013"]
    assert not pool.has_masks
    assert pool.classes == open_source("coco", tmp_path, images="train2017").classes
    assert len(pool.classes) == 81
    with pytest.raises(DataError, match="unlabelled2017, images/unlabelled2017"):
        open_source("coco", tmp_path, images="unlabelled2017").items("train")
