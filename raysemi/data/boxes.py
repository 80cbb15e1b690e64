"""Boxes of things: from masks, beside a pool in `boxes-NAME.parquet`, and in the views of an image.

A box is (x1, y1, x2, y2) in pixels, edges and not centres: the box of the single pixel (0, 0) is (0, 0, 1, 1). The file
has a row a box with `key, x1, y1, x2, y2, label, score`: key of the pool, box in the source image, class index, score
in [0, 1]. Images without a box have no row.
Axes: N boxes of an image, M of a pool, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from raysemi.bounded import parse_json
from raysemi.data.joined import AnyPool, JoinedPool
from raysemi.data.limits import plain_keys, read_table
from raysemi.data.pool import Pool
from raysemi.data.views import Geometry
from raysemi.data.write_pool import write_whole
from raysemi.errors import DataError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("x1", pa.float32()),
        ("y1", pa.float32()),
        ("x2", pa.float32()),
        ("y2", pa.float32()),
        ("label", pa.uint8()),
        ("score", pa.float32()),
    ]
)
MOST = 100
"""Boxes of an image at most that a stream hands out: the best ones."""
_MOST_FOUND = 10_000
"""Boxes of an image at most that a file may hold, on average; a million in all are always allowed."""
_MADE = b"raysemi"
_NEIGHBOURS = np.ones((3, 3), dtype=np.int64)


def mask_boxes(
    mask_HW: NDArray[np.uint8], classes: Sequence[int], min_area: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Smallest boxes around the connected components (8 neighbours) of each class.

    Args:
        mask_HW: class index; 255 = not annotated, which joins no component.
        classes: class indices that are things.
        min_area: pixels; a component of no more is left out.

    Returns:
        float32 [N, 4] boxes, and int64 [N] the position of each one's class in `classes`.
    """
    boxes, labels = [], []
    for position, index in enumerate(classes):
        component_HW, _ = ndimage.label(mask_HW == index, structure=_NEIGHBOURS)
        areas = np.bincount(component_HW.ravel())[1:]
        for area, (rows, columns) in zip(areas, ndimage.find_objects(component_HW), strict=True):
            if area > min_area:
                boxes.append((columns.start, rows.start, columns.stop, rows.stop))
                labels.append(position)
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels, dtype=np.int64)


def box_view(boxes_N4: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """Boxes of a source image in one of its views, cut off where the view shows the image no more.

    Returns:
        float32 [N, 4]; a box of which nothing is shown has no width or no height.
    """
    across, down = geometry.resized_width / geometry.width, geometry.resized_height / geometry.height
    height, width = geometry.shown
    x = (boxes_N4[:, 0::2] * across - geometry.left).clip(0, width)
    y = (boxes_N4[:, 1::2] * down - geometry.top).clip(0, height)
    if geometry.flip:
        x = geometry.crop - x[:, ::-1]
    return np.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), axis=1).astype(np.float32)


@dataclass(frozen=True)
class PoolBoxes:
    """The accepted boxes of a pool, in the order of its index. Tensors, so that loader processes share one copy."""

    starts: Tensor
    """int64 [samples + 1]: the boxes of row i of the index are those from starts[i] to starts[i + 1]."""
    boxes_M4: Tensor
    """float32, in source pixels, the best of an image first."""
    labels_M: Tensor
    """uint8 class index."""
    most: int
    """Boxes of the image that has the most; at least 1."""

    @cached_property
    def digest(self) -> str:
        """Hex name of what is accepted."""
        parts = (self.starts, self.boxes_M4, self.labels_M)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    def view(self, row: int, geometry: Geometry) -> NDArray[np.float32]:
        """Boxes of an image in one of its views: float32 [most, 5], the box and its class; class -1 = no box."""
        start, stop = self.starts[row : row + 2].tolist()
        found = np.full((self.most, 5), -1.0, dtype=np.float32)
        found[: stop - start, :4] = box_view(self.boxes_M4[start:stop].numpy(), geometry)
        found[: stop - start, 4] = self.labels_M[start:stop].numpy()
        return found


def boxes_file(name: str) -> str:
    """Name of a file of boxes beside a pool.

    Raises:
        DataError: a name that is no part of a file's name.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(
            f"the name of boxes must hold letters, digits, _, - and . alone and begin with no sign; got {name!r}. "
            "Choose another."
        )
    return f"boxes-{name}.parquet"


def read_boxes(pool: Pool, name: str) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of `boxes-NAME.parquet` beside a pool, and how they were made (empty for a file of others).

    Raises:
        DataError: no such file, other columns, classes or boxes that cannot be, or boxes of another pool.
    """
    where, file_name = f"{pool.path}/{boxes_file(name)}", f"{pool.folder}/{boxes_file(name)}"
    again = f"Run `raysemi detect run DETECTOR --pool {pool.path} --name {name}`."
    try:
        with pool.filesystem.open_input_file(file_name) as file:
            table = plain_keys(read_table(file, max(1 << 20, _MOST_FOUND * pool.num_samples)))
    except FileNotFoundError as error:
        raise DataError(f"{where} must exist; got no such file. {again}") from error
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{where} must be a readable Parquet file; got {error}. {again}") from error
    missing = [column for column in SCHEMA.names if column not in table.column_names]
    if missing:
        raise DataError(
            f"{where} must have the columns {', '.join(SCHEMA.names)}; got none named {', '.join(missing)}. {again}"
        )
    try:
        made = parse_json((table.schema.metadata or {}).get(_MADE, b"{}"))
        if not isinstance(made, dict):
            raise ValueError("notes that are no map")
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{where} must have columns of the types {SCHEMA}; got {error}. {again}") from error
    if made.get("pool", pool.digest) != pool.digest:
        raise DataError(f"{where} must hold boxes of this pool; got those of one with other images. {again}")
    if any(column.null_count for column in table.columns):
        raise DataError(f"{where} must have a value in every place; got empty ones. {again}")
    label = table.column("label").to_numpy()
    if len(label) and label.max() >= len(pool.classes):
        raise DataError(
            f"{where} must hold classes below {len(pool.classes)}, those of the pool; got {label.max()}. {again}"
        )
    x1, y1, x2, y2 = (table.column(side).to_numpy() for side in ("x1", "y1", "x2", "y2"))
    wrong = int((~((x1 < x2) & (y1 < y2))).sum())
    if wrong:
        raise DataError(f"{where} must hold boxes with x1 < x2 and y1 < y2; got {wrong} others. {again}")
    return table, made


def open_boxes(pool: AnyPool, name: str, score: float) -> PoolBoxes:
    """The boxes beside a pool that are accepted, at most `MOST` of an image, ready to be looked up by row.

    Args:
        pool: the pool; of several that are read as one, each has its file.
        name: NAME in `boxes-NAME.parquet`.
        score: least score.

    Raises:
        DataError: as `read_boxes`; also keys that the pool does not have.
    """
    if isinstance(pool, JoinedPool):
        parts = [open_boxes(own, name, score) for own in pool.pools]
        of_rows = torch.cat([part.starts.diff() for part in parts])
        return PoolBoxes(
            torch.cat((torch.zeros(1, dtype=torch.int64), of_rows.cumsum(dim=0))),
            torch.cat([part.boxes_M4 for part in parts]),
            torch.cat([part.labels_M for part in parts]),
            max(part.most for part in parts),
        )
    table, _ = read_boxes(pool, name)
    keys = pa.concat_tables(pool.rows.groups(("key",))).column("key")
    rows = pc.index_in(table.column("key"), value_set=keys.combine_chunks())
    if rows.null_count:
        stranger = table.column("key").filter(pc.is_null(rows))[0].as_py()
        raise DataError(
            f"{pool.path}/{boxes_file(name)} must hold keys of this pool; got {rows.null_count} boxes of others, such "
            f"as {stranger!r}. Run `raysemi detect run` on this pool."
        )
    scores = table.column("score").to_numpy()
    (accepted,) = np.nonzero(scores >= score)
    rows = rows.to_numpy()[accepted].astype(np.int64)
    order = np.lexsort((-scores[accepted], rows))
    rows, accepted = rows[order], accepted[order]
    best = np.arange(len(rows)) - np.searchsorted(rows, rows) < MOST
    rows, accepted = rows[best], accepted[best]
    counts = np.bincount(rows, minlength=pool.num_samples)
    sides = [table.column(side).to_numpy()[accepted] for side in ("x1", "y1", "x2", "y2")]
    return PoolBoxes(
        torch.from_numpy(np.concatenate(([0], counts.cumsum()))),
        torch.from_numpy(np.stack(sides, axis=1)),
        torch.from_numpy(table.column("label").to_numpy()[accepted]),
        max(1, int(counts.max(initial=0))),
    )


def write_boxes(pool: Pool, name: str, found: Sequence[pa.RecordBatch], made: Mapping[str, Any]) -> str:
    """Writes `boxes-NAME.parquet` beside a pool, whole or not at all.

    Args:
        pool: the pool; nothing of its own files changes.
        name: NAME.
        found: rows with the columns of `SCHEMA`.
        made: how they were made, for people and for `detect check`; the pool's digest is added.

    Returns:
        The path of the file.

    Raises:
        DataError: no room or no permission.
    """
    about = json.dumps({**made, "pool": pool.digest}).encode()
    table = pa.Table.from_batches(found, SCHEMA).replace_schema_metadata({_MADE: about})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_whole(pool.filesystem, f"{pool.folder}/{boxes_file(name)}", sink.getvalue())
    return f"{pool.path}/{boxes_file(name)}"
