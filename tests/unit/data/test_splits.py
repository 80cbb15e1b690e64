from __future__ import annotations

import pytest

from raysemi.data.sources import Item
from raysemi.data.splits import labeled_keys, split_origin
from raysemi.errors import DataError


@pytest.fixture
def root(tmp_path):
    (tmp_path / "splits/1_8").mkdir(parents=True)
    return tmp_path


def items(root, count=20, masks=17):
    return [
        Item(f"town/{n:02d}", has_mask=n < masks, image=root / f"images/train/town/{n:02d}.jpg") for n in range(count)
    ]


def test_names_files_and_folders(root):
    train = items(root)
    (root / "splits/1_4.txt").write_text("town/03\n\ntown/01\r\n")
    (root / "splits/1_8/labeled.txt").write_text("town/05")
    (root / "splits/7.txt").write_text("town/09\n")
    (root / "mine.lst").write_text("\ufefftown/02\n", encoding="utf-8")
    assert labeled_keys("1_4", train, root=root) == {"town/03", "town/01"}
    assert labeled_keys("1_4.txt", train, root=root) == {"town/03", "town/01"}
    assert labeled_keys("1_8", train, root=root) == {"town/05"}
    assert labeled_keys("7", train, root=root) == {"town/09"}  # a list of that name comes before the number
    assert labeled_keys(str(root / "mine.lst"), train, root=root) == {"town/02"}
    assert labeled_keys(str(root / "splits/1_8"), train, root=None) == {"town/05"}


def test_lines_of_the_papers_lists(root):
    (root / "splits/p.txt").write_text("images/train/town/04.jpg labels/train/town/04.png\nimages/train/town/06.jpg\n")
    assert labeled_keys("p", items(root), root=root) == {"town/04", "town/06"}


def test_numbers_draw_the_same_whatever_the_order_and_nest(root):
    train = items(root)
    five = labeled_keys(5, train, root=root, seed=3)
    assert len(five) == 5
    assert labeled_keys("5", train[::-1], root=None, seed=3) == five
    assert five < labeled_keys(9, train, root=root, seed=3)
    assert labeled_keys(5, train, root=root, seed=4) != five
    assert labeled_keys(17, train, root=root) == {item.key for item in train if item.has_mask}


def test_draws_are_spread_over_all_keys(root):
    train = items(root)
    counts = dict.fromkeys((item.key for item in train if item.has_mask), 0)
    for seed in range(400):
        for key in labeled_keys(4, train, root=None, seed=seed):
            counts[key] += 1
    assert all(60 <= count <= 130 for count in counts.values())  # 94 expected, standard deviation 8.5


def test_without_a_split_every_image_with_a_mask_is_labeled(root):
    assert labeled_keys(None, items(root, 4, 3), root=root) == {"town/00", "town/01", "town/02"}


@pytest.mark.parametrize(
    ("split", "text"),
    [
        ("1_16", "splits/ holds 1_8, bad, empty, twice, val"),
        ("18", "between 1 and the 17"),
        ("0", "between 1 and the 17"),
        ("bad", r"town/xx, town/77, which is not among the 20\. Correct"),
        ("val", "1 are validation images"),
        ("empty", "empty file"),
        ("twice", "town/01 twice"),
    ],
)
def test_wrong_splits_are_told(root, split, text):
    (root / "splits/bad.txt").write_text("town/01\ntown/xx\ntown/77\n")
    (root / "splits/val.txt").write_text("town/01\nv/1\n")
    (root / "splits/empty.txt").write_text("\n")
    (root / "splits/twice.txt").write_text("town/01\ntown/01\n")
    with pytest.raises(DataError, match=text):
        labeled_keys(split, items(root), root=root, val=[Item("v/1", has_mask=True)])


def test_a_source_without_a_folder_takes_numbers(root):
    with pytest.raises(DataError, match="no list in splits/"):
        labeled_keys("1_8", items(root), root=None)


def test_where_the_labeled_images_come_from_is_told(root):
    (root / "splits/92.txt").write_text("town/03\n")
    (root / "splits/1_8/labeled.txt").write_text("town/05")
    elsewhere = root / "elsewhere/ids.lst"
    elsewhere.parent.mkdir()
    elsewhere.write_text("town/05")
    assert split_origin("92", root=root, seed=3) == {"split": "92", "list": "splits/92.txt"}
    assert split_origin("1_8", root=root) == {"split": "1_8", "list": "splits/1_8/labeled.txt"}
    assert split_origin(str(elsewhere), root=root / "splits") == {"split": "ids", "list": "ids.lst"}
    assert split_origin("93", root=root, seed=3) == {"split": "93", "drawn": 93, "seed": 3}
    assert split_origin(92, root=None) == {"split": "92", "drawn": 92, "seed": 0}
    assert split_origin(None, root=root) == {}
