"""Boxes of masks, in views, and beside a pool."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysemi.data.boxes import MOST, SCHEMA, box_view, boxes_file, mask_boxes, open_boxes, read_boxes, write_boxes
from raysemi.data.joined import JoinedPool
from raysemi.data.views import Geometry, ViewsConfig, draw_geometry, generator, label_view
from raysemi.errors import DataError
from raysemi.ops.boxes import inside_own_class


def rows(*boxes):
    """(key, x1, y1, x2, y2, label, score) each."""
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, box, strict=True)) for box in boxes], schema=SCHEMA)


def put(pool, table, name="a"):
    pq.write_table(table, f"{pool.folder}/{boxes_file(name)}")


# --- of masks -------------------------------------------------------------------------------------------------------


def test_two_diagonal_pixels_are_one_component():
    mask = np.zeros((6, 8), np.uint8)
    mask[1, 2] = mask[2, 3] = 3
    boxes, labels = mask_boxes(mask, [1, 3], min_area=0)
    assert boxes.tolist() == [[2, 1, 4, 3]]
    assert labels.tolist() == [1]


def test_pixels_that_nobody_annotated_join_nothing():
    mask = np.zeros((5, 9), np.uint8)
    mask[2, 1:4], mask[2, 4], mask[2, 5:7] = 1, 255, 1
    boxes, labels = mask_boxes(mask, [1], min_area=0)
    assert boxes.tolist() == [[1, 2, 4, 3], [5, 2, 7, 3]]
    assert labels.tolist() == [0, 0]


def test_touching_things_of_two_classes_are_two_and_of_one_class_one():
    mask = np.zeros((4, 10), np.uint8)
    mask[1:3, 1:4], mask[1:3, 4:9] = 1, 2
    assert mask_boxes(mask, [1, 2], 0)[0].tolist() == [[1, 1, 4, 3], [4, 1, 9, 3]]
    mask[mask == 2] = 1
    assert mask_boxes(mask, [1, 2], 0)[0].tolist() == [[1, 1, 9, 3]]


@pytest.mark.parametrize(("min_area", "found"), [(5, 1), (6, 0)])
def test_a_component_has_more_pixels_than_the_least_area(min_area, found):
    mask = np.zeros((7, 5), np.uint8)
    mask[2:4, 1:4] = 1  # 6 pixels
    mask[6, 4] = 1
    boxes, labels = mask_boxes(mask, [1], min_area)
    assert (len(boxes), len(labels)) == (found, found)
    assert boxes.dtype == np.float32
    assert boxes.shape == (found, 4)


# --- in views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(12))
def test_a_box_in_a_view_holds_what_a_drawn_mask_shows_there(number):
    """Each box drawn as a mask of its own and resampled; equal but for a pixel at the edges."""
    rng = np.random.default_rng(number)
    height, width, crop = 37, 52, 41
    geometry = draw_geometry(generator(3, number, "k", "geometry"), ViewsConfig(), height, width, crop)
    corners = np.sort(rng.integers(0, (width, height), (5, 2, 2)), axis=1).astype(np.float32)
    boxes = np.concatenate((corners[:, 0], corners[:, 1] + 1), axis=1)
    seen = box_view(boxes, geometry)
    assert seen.dtype == np.float32
    shown = 0
    for source, box in zip(boxes, seen, strict=True):
        mask = np.zeros((height, width), np.uint8)
        x1, y1, x2, y2 = source.astype(int)
        mask[y1:y2, x1:x2] = 1
        drawn = label_view(mask, geometry) == 1
        label = torch.ones(1, crop, crop, dtype=torch.int64)
        inside = inside_own_class(label, torch.tensor([[[*box.tolist(), 1.0]]]))[0].numpy()
        y, x = np.nonzero(inside != drawn)
        at_edge = np.minimum(np.abs(x + 0.5 - box[[0, 2], None]).min(0), np.abs(y + 0.5 - box[[1, 3], None]).min(0))
        assert (at_edge < 1).all()
        shown += drawn.sum()
    assert shown > 0


def test_a_flipped_padded_view_by_hand():
    """Twice the size, cut at (3, 5), 20 px of which 10 x 15 show the image, mirrored."""
    geometry = Geometry(10, 9, 20, 18, 5, 3, 20, True)
    boxes = np.array([[2.0, 3.0, 6.0, 8.0], [0.0, 0.0, 1.0, 1.0]], dtype=np.float32)
    assert box_view(boxes, geometry)[0].tolist() == [20 - 9, 1, 20 - 1, 11]
    hidden = box_view(boxes, geometry)[1]
    assert hidden[2] == hidden[0] or hidden[3] == hidden[1]


# --- beside a pool --------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path, make_pool):
    return make_pool(tmp_path / "u", 7, masks=False)


def test_boxes_are_found_by_row_whatever_the_order_of_the_file(pool):
    put(pool, rows(
        ("city/004", 1, 2, 3, 4, 1, 0.9),
        ("city/001", 5, 5, 6, 6, 2, 0.86),
        ("city/004", 7, 2, 9, 4, 0, 0.95),
        ("city/004", 0, 0, 9, 9, 2, 0.5),
    ))  # fmt: skip
    boxes = open_boxes(pool, "a", 0.85)
    assert boxes.starts.tolist() == [0, 0, 1, 1, 1, 3, 3, 3]
    assert boxes.boxes_M4.tolist() == [[5, 5, 6, 6], [7, 2, 9, 4], [1, 2, 3, 4]]  # the best of an image first
    assert boxes.labels_M.tolist() == [2, 0, 1]
    assert boxes.most == 2
    whole = Geometry(44, 56, 44, 56, 0, 0, 60, False)
    assert boxes.view(4, whole).tolist() == [[7, 2, 9, 4, 0], [1, 2, 3, 4, 1]]
    assert boxes.view(1, whole).tolist() == [[5, 5, 6, 6, 2], [-1] * 5]
    assert boxes.view(0, whole).tolist() == [[-1] * 5] * 2
    assert torch.equal(pickle.loads(pickle.dumps(boxes)).starts, boxes.starts)
    assert open_boxes(pool, "a", 0.4).most == 3


def test_boxes_of_pools_that_are_read_as_one_follow_each_other(pool, tmp_path, make_pool):
    first, second = pool, make_pool(tmp_path / "second", 4, masks=False)
    put(first, rows((first.key(1), 1, 1, 4, 4, 2, 0.9)))
    put(second, rows((second.key(3), 2, 2, 6, 7, 1, 0.9), (second.key(0), 0, 0, 3, 3, 0, 0.95)))
    joined = JoinedPool([first, second])
    boxes, alone = open_boxes(joined, "a", 0.5), open_boxes(second, "a", 0.5)
    for row in range(joined.num_samples):
        found_M4 = boxes.boxes_M4[boxes.starts[row] : boxes.starts[row + 1]]
        if row == 1:
            assert found_M4.tolist() == [[1, 1, 4, 4]]
        elif row >= first.num_samples:
            own = row - first.num_samples
            assert torch.equal(found_M4, alone.boxes_M4[alone.starts[own] : alone.starts[own + 1]])
        else:
            assert len(found_M4) == 0
    assert boxes.labels_M.tolist() == [2, 0, 1]
    assert boxes.digest != alone.digest


def test_no_box_at_all_and_too_many(pool):
    put(pool, rows(("city/002", 1, 2, 3, 4, 1, 0.3)))
    assert (open_boxes(pool, "a", 0.85).most, open_boxes(pool, "a", 0.85).starts.sum()) == (1, 0)
    put(pool, rows(*(("city/002", 1, 2, 3 + i, 4, 1, 0.5 + i / 1000) for i in range(MOST + 5))))
    boxes = open_boxes(pool, "a", 0.5)
    assert boxes.most == MOST
    assert boxes.boxes_M4[:, 2].min() == 3 + 5  # the five worst are gone


def test_a_million_boxes_are_looked_up_in_arrays(tmp_path, pool):
    """Nothing of them is a Python object: three tensors of 25 bytes a box."""
    count = 1_000_000
    keys = pa.array([f"city/{i:03d}" for i in range(7)]).take(pa.array(np.arange(count) % 7))
    columns = [np.zeros(count), np.zeros(count), np.ones(count), np.ones(count), np.zeros(count), np.full(count, 0.9)]
    table = pa.table([keys, *columns], names=SCHEMA.names).cast(SCHEMA)
    put(pool, table)
    boxes = open_boxes(pool, "a", 0.85)
    assert boxes.starts.tolist() == [MOST * i for i in range(8)]


def test_what_is_written_is_read_and_nothing_is_left_beside(pool):
    batch = rows(("city/003", 1, 2, 3, 4, 1, 0.75)).to_batches()
    path = write_boxes(pool, "things-1", batch, {"detector": "runs/d"})
    assert path == f"{pool.path}/boxes-things-1.parquet"
    table, made = read_boxes(pool, "things-1")
    assert table.to_pylist() == rows(("city/003", 1, 2, 3, 4, 1, 0.75)).to_pylist()
    assert made == {"detector": "runs/d", "pool": pool.digest}
    assert not [name for name in _names(pool) if name.endswith(".part")]
    write_boxes(pool, "things-1", [], {})
    assert read_boxes(pool, "things-1")[0].num_rows == 0


def _names(pool):
    return [file.name for file in Path(pool.folder).iterdir()]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (rows(("city/003", 1, 2, 3, 4, 3, 0.9)), "must hold classes below 3, those of the pool; got 3"),
        (rows(("town/003", 1, 2, 3, 4, 1, 0.9)), "got 1 boxes of others, such as 'town/003'"),
        (rows(("city/003", 3, 2, 3, 4, 1, 0.9)), "must hold boxes with x1 < x2 and y1 < y2; got 1 others"),
        (rows(("city/003", 1, 2, float("nan"), 4, 1, 0.9)), "must hold boxes with x1 < x2 and y1 < y2; got 1 others"),
        (rows(("city/003", 1, 2, 3, 4, None, 0.9)), "must have a value in every place"),
        (rows().drop_columns(["score", "x2"]), "y2, label, score; got none named x2"),
        (rows().set_column(5, "label", pa.array([], pa.date32())), "must have columns of the types"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_told(pool, table, expected):
    put(pool, table)
    with pytest.raises(DataError) as error:
        open_boxes(pool, "a", 0.85)
    assert expected in str(error.value)
    assert "raysemi detect run" in str(error.value)


def test_missing_broken_foreign_and_badly_named_files(pool, tmp_path, make_pool):
    with pytest.raises(DataError, match=r"boxes-a.parquet must exist; got no such file. Run `raysemi detect run"):
        open_boxes(pool, "a", 0.85)
    with open(f"{pool.folder}/boxes-a.parquet", "wb") as file:
        file.write(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="must be a readable Parquet file"):
        open_boxes(pool, "a", 0.85)
    write_boxes(make_pool(tmp_path / "v", 8, masks=False), "a", rows().to_batches(), {})
    (tmp_path / "v/boxes-a.parquet").replace(f"{pool.folder}/boxes-a.parquet")
    with pytest.raises(DataError, match="must hold boxes of this pool; got those of one with other images"):
        open_boxes(pool, "a", 0.85)
    for name in ("../a", "", ".a", "a/b", "a b"):
        with pytest.raises(DataError, match="the name of boxes must hold"):
            boxes_file(name)
