"""COCO, or any data set with annotations in COCO's instances format.

    ROOT/{train2017,val2017}/ID.jpg          or images/..., or train/ and val/
    ROOT/masks/ID.png                        ready index masks, taken unchanged; or masks/{train2017,val2017}/ID.png
    ROOT/annotations/instances_{train2017,val2017}.json    otherwise: drawn from the instances
    ROOT/unlabeled2017/ID.jpg                more images: `images=unlabeled2017` makes a pool of these alone

Class 0 is background, class 1 the category with the smallest id, and so on: the 81 classes of the papers for COCO 2017.
How instances become a mask changes the IoU of class 0 and so the mean: start from 0, paint crowd regions 255, then the
other instances from the largest area to the smallest.

Source: Lin et al. 2014, arXiv:1405.0312. The papers' own masks are of unpublished make; this recipe is ours. A
polygon holds the pixels whose centre it holds; pycocotools' may differ by a pixel along the outline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysemi.data.paths import AnyPath
from raysemi.data.sources import FileSource, Item, Part, default_palette, listed, source_root
from raysemi.data.sources.folder import folder_items, read_raw_mask
from raysemi.errors import DataError

CLASSES_2017 = Path(__file__).with_name("coco_classes.txt").read_text(encoding="utf-8").splitlines()
_TRAIN_2017 = 118_287
_PARTS: tuple[Part, ...] = ("train", "val")
RECIPE = "background 0, crowd 255, then instances from the largest area to the smallest"


class Coco(FileSource):
    """Source `coco`.

    Args:
        root: the data set's folder.
        check: refuse a train2017 folder without its 118,287 images; False for a part of the data set.
        images: folder below the root, or below its `images`, whose images are the train part in place of train2017's,
            all of them without a mask: `unlabeled2017`, for a second unlabeled pool.

    Raises:
        DataError: no images, or neither masks nor annotations.
    """

    standard = "coco"

    def __init__(self, root: str | AnyPath | None, check: bool = True, images: str | None = None) -> None:
        self.root = source_root(root, "coco")
        self._check = check
        self._bare = images
        self._ready = (self.root / "masks").is_dir()
        self.recipe = "ready masks" if self._ready else RECIPE
        self._read: dict[Part, dict[str, Any]] = {}
        self.classes = tuple(CLASSES_2017)
        self._index_of: dict[int, int] = {}
        annotated = [part for part in _PARTS if self._annotations(part).is_file()]
        if not self._ready and (annotated or images is None):
            part = annotated[0] if annotated else "val"
            self.classes, self._index_of = _categories(self._instances(part), self._annotations(part))
        self.palette = default_palette(self.classes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": {}}  # what an image needs travels in its item

    def items(self, part: Part) -> list[Item]:
        """Images of the part; with annotations every image that they name has a mask, if only of background."""
        images = self._images(part)
        if part == "train" and self._bare is not None:
            return folder_items(images, None)
        if self._ready:
            inside = self.root / "masks" / images.name
            flat = not inside.is_dir()
            listing = folder_items(images, self.root / "masks" if flat else inside, strict=not flat)
        else:
            listing = self._annotated(part, folder_items(images, None))
        if part == "train" and self._check and images.name == "train2017" and len(listing) != _TRAIN_2017:
            raise DataError(
                f"{images} must hold {_TRAIN_2017} images; got {len(listing)}. Complete it, or add `check=false`."
            )
        return listing

    def mask(self, item: Item) -> NDArray[np.uint8] | None:
        """The ready mask, or one drawn from the item's annotations."""
        if item.mask is not None:
            raw = read_raw_mask(item.mask)
            if raw.ndim != 2 or raw.max(initial=0) > 255:
                raise DataError(f"mask {item.mask} must have one 8-bit channel; got {raw.dtype} {raw.shape}.")
            return raw.astype(np.uint8)
        if item.note is None:
            return None
        height, width, annotations = item.note
        return rasterise(height, width, annotations, self._index_of)

    def _images(self, part: Part) -> AnyPath:
        names = [f"{part}2017", f"images/{part}2017", part, f"images/{part}"]
        if part == "train" and self._bare is not None:
            names = [self._bare, f"images/{self._bare}"]
        found = next((self.root / name for name in names if (self.root / name).is_dir()), None)
        if found is None:
            raise DataError(f"{self.root} must hold the {part} images in {listed(names)}; got none. Put them there.")
        return found

    def _annotations(self, part: Part) -> AnyPath:
        folder = self.root / "annotations"
        exact = [folder / f"instances_{part}2017.json", folder / f"instances_{part}.json"]
        return next((path for path in exact if path.is_file()), exact[0])

    def _instances(self, part: Part) -> dict[str, Any]:
        if part not in self._read:
            path = self._annotations(part)
            try:
                content = json.loads(path.read_bytes())
                self._read[part] = {name: content[name] for name in ("images", "annotations", "categories")}
            except FileNotFoundError as error:
                raise DataError(f"coco must have {path}, or masks in {self.root}/masks; got neither.") from error
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} must be in COCO's instances format; got {error!r}. Replace it.") from error
        return self._read[part]

    def _annotated(self, part: Part, found: list[Item]) -> list[Item]:
        path = self._annotations(part)
        if part == "train" and not path.is_file():
            return found  # unlabeled images need no annotations
        content = self._instances(part)
        classes, _ = _categories(content, path)
        if classes != self.classes:
            raise DataError(f"{path} must have the categories of the train annotations; got {listed(classes[1:])}.")
        try:
            of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
            for annotation in content["annotations"]:
                of_image[annotation["image_id"]].append(
                    {name: annotation.get(name) for name in ("category_id", "segmentation", "area", "iscrowd")}
                )
            notes = {
                Path(image["file_name"]).with_suffix("").as_posix(): (
                    image["height"],
                    image["width"],
                    of_image[image["id"]],
                )
                for image in content["images"]
            }
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} must be in COCO's instances format; got {error!r}. Replace it.") from error
        missing = sorted(notes.keys() - {item.key for item in found})
        if missing:
            raise DataError(
                f"{self._images(part)} must hold every image of {path.name}; got none for {listed(missing)}."
            )
        return [Item(item.key, item.key in notes, item.image, None, notes.get(item.key)) for item in found]


def _categories(content: dict[str, Any], path: AnyPath) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names with background first, and category id -> class index."""
    try:
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} must give each category an id and a name; got {error!r}. Replace it.") from error
    if not 1 <= len(names) <= 254:
        raise DataError(f"{path} must have 1 to 254 categories; got {len(names)}. Merge or remove some.")
    ids = sorted(names)
    return ("background", *(names[id_] for id_ in ids)), {id_: index for index, id_ in enumerate(ids, start=1)}


def rasterise(
    height: int, width: int, annotations: list[dict[str, Any]], index_of: Mapping[int, int]
) -> NDArray[np.uint8]:
    """Class mask of one image from its instances: background 0, crowd 255, then from the largest to the smallest.

    Raises:
        DataError: a segmentation that is neither polygons nor run lengths, or an unknown category.
    """
    canvas = np.zeros((height, width), dtype=np.uint8)
    crowds = [annotation for annotation in annotations if annotation["iscrowd"]]
    things = sorted(
        (annotation for annotation in annotations if not annotation["iscrowd"]),
        key=lambda annotation: -float(annotation["area"] or 0.0),
    )
    for annotation in [*crowds, *things]:
        index = 255 if annotation["iscrowd"] else index_of.get(annotation["category_id"])
        if index is None:
            raise DataError(f"annotation must have a category of the file; got id {annotation['category_id']}. Add it.")
        segmentation = annotation["segmentation"]
        try:
            if isinstance(segmentation, dict):
                canvas[decode_runs(segmentation["counts"], *segmentation["size"])] = index
            else:
                for polygon in segmentation:
                    canvas[fill_polygon(polygon, height, width)] = index
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"segmentation must be polygons or run lengths; got {error!r}. Replace it.") from error
    return canvas


def fill_polygon(polygon: list[float], height: int, width: int) -> NDArray[np.bool_]:
    """Boolean [H, W]: the pixels whose centre lies inside a polygon x, y, x, y, ... by the even-odd rule."""
    x, y = np.array(polygon, dtype=np.float64).reshape(-1, 2).T[:, :, None]
    next_x, next_y = np.roll(x, -1, axis=0), np.roll(y, -1, axis=0)
    centres = np.arange(height) + 0.5
    edges, rows = np.nonzero((y <= centres) != (next_y <= centres))
    slope = (next_x - x)[edges, 0] / (next_y - y)[edges, 0]
    crossings = x[edges, 0] + (centres[rows] - y[edges, 0]) * slope
    flips = np.zeros((height, width + 1), dtype=np.int32)
    np.add.at(flips, (rows, np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)), 1)
    return flips.cumsum(axis=1)[:, :width] % 2 == 1


def decode_runs(counts: list[int] | str | bytes, height: int, width: int) -> NDArray[np.bool_]:
    """Boolean [H, W] of COCO's run lengths: runs of 0 and 1 in turn, down the columns.

    Args:
        counts: the run lengths, or their compressed string: groups of 5 bits, lowest first, from the character `0` on,
            bit 6 = more follow; from the fourth run on, differences to the run two before.
        height, width: size of the image in pixels.

    Raises:
        ValueError: the runs do not fill the image.
    """
    runs = counts if isinstance(counts, list) else _uncompress(counts)
    values = np.arange(len(runs)) % 2 == 1
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"runs of {sum(runs)} pixels for an image of {height} x {width}")
    return np.repeat(values, runs).reshape(width, height).T


def _uncompress(text: str | bytes) -> list[int]:
    data = text.encode("ascii") if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for character in data:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift  # the sign bit of the last group
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
