"""Cityscapes with its 19 training classes.

    ROOT/leftImg8bit/{train,val}/CITY/CITY_SEQ_FRAME_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/CITY_SEQ_FRAME_gtFine_labelTrainIds.png or ..._gtFine_labelIds.png

Keys are `CITY/CITY_SEQ_FRAME`. Train ids are taken as they are; label ids are converted by the table of the data set,
and what has no training class is 255.

Source: Cordts et al. 2016, "The Cityscapes dataset for semantic urban scene understanding".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysemi.data.paths import AnyPath
from raysemi.data.pool import NOT_ANNOTATED
from raysemi.data.sources import FileSource, Item, Palette, Part, source_root
from raysemi.data.sources.folder import read_raw_mask
from raysemi.errors import DataError

_TABLE: tuple[tuple[int, str, tuple[int, int, int]], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic_light", (250, 170, 30)),
    (20, "traffic_sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
"""Label id, name and colour, in the order of the train ids."""

_IMAGE_END = "_leftImg8bit"
_MASK_ENDS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


class Cityscapes(FileSource):
    """Source `cityscapes`.

    Args:
        root: folder that holds leftImg8bit and gtFine.

    Raises:
        DataError: leftImg8bit is missing.
    """

    classes = tuple(name for _, name, _ in _TABLE)
    palette: Palette = tuple(colour for _, _, colour in _TABLE)
    standard = "cityscapes"

    def __init__(self, root: str | AnyPath | None) -> None:
        self.root = source_root(root, "cityscapes")
        if not (self.root / "leftImg8bit").is_dir():
            raise DataError(f"--root must hold leftImg8bit and gtFine; got {self.root}. Give that folder.")

    def items(self, part: Part) -> list[Item]:
        """Images of the part, with masks where gtFine has them."""
        images, labels = self.root / "leftImg8bit" / part, self.root / "gtFine" / part
        masks: dict[str, AnyPath] = {}
        for end in reversed(_MASK_ENDS):  # what comes later wins
            masks |= {f"{path.parent.name}/{path.name.removesuffix(end)}": path for path in labels.glob(f"*/*{end}")}
        found = []
        for path in images.glob(f"*/*{_IMAGE_END}.png"):
            key = f"{path.parent.name}/{path.stem.removesuffix(_IMAGE_END)}"
            found.append(Item(key, key in masks, path, masks.get(key)))
        if not found:
            raise DataError(f"{images} must hold CITY/*{_IMAGE_END}.png; got none. Unpack leftImg8bit there.")
        return found

    def mask(self, item: Item) -> NDArray[np.uint8] | None:
        """Train ids, 255 where there is no training class."""
        if item.mask is None:
            return None
        raw = read_raw_mask(item.mask)
        if raw.ndim != 2:
            raise DataError(f"mask {item.mask} must have one channel; got RGB. Take the labelIds file.")
        if item.mask.name.endswith(_MASK_ENDS[1]):
            return train_ids(raw.astype(np.int64))
        if raw.max(initial=0) > NOT_ANNOTATED:
            raise DataError(f"mask {item.mask} must hold train ids up to 255; got {raw.max()}. Make it again.")
        return raw.astype(np.uint8)


def train_ids(label_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Train id of each label id; 255 for every id without one, -1 included."""
    table = np.full(NOT_ANNOTATED + 1, NOT_ANNOTATED, dtype=np.uint8)
    for train_id, (label_id, _, _) in enumerate(_TABLE):
        table[label_id] = train_id
    return table[np.where((label_ids < 0) | (label_ids > NOT_ANNOTATED), NOT_ANNOTATED, label_ids)]
