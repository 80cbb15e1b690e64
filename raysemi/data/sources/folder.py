"""Images and masks of your own: the plain layout of folders.

    ROOT/images/{train,val}/**/KEY.jpg|jpeg|png|webp     KEY may hold folders: `town/0001`
    ROOT/labels/{train,val}/**/KEY.png                   one for each labeled image
    ROOT/classes.txt (or classes.yaml)                   the classes
    ROOT/splits/NAME.txt                                 a labeled key a line; the rest of train is unlabeled

`classes.txt` is either a name a line, in the order of the mask values 0, 1, ...:

    sky
    building

or a YAML map, when the values in the masks are other ids or the masks are coloured:

    classes:                                # the position in this list is the class index in the pool
      - {name: road, id: 7, color: [128, 64, 128]}
      - {name: vehicle, id: [26, 27, 28], color: [0, 0, 142]}   # several ids become one class
      - vegetation                          # a bare name: its id is its position
    ignore: [0, 1, 2, -1]                   # ids that count as not annotated; 255 always does unless it is a class
    ignore_colors: [[0, 0, 0]]              # the same for coloured masks

`color` may be a list of colours too; the first is used to draw the class. A mask is a PNG with one channel (8 or 16
bit; a palette PNG is read by its raw index), or, when colours are given, RGB. An id or colour that is in none of the
lists is an error, never silently ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raysemi.bounded import YAMLFault, parse_yaml
from raysemi.data.paths import AnyPath, as_path, below
from raysemi.data.pool import IMAGE_SUFFIXES, NOT_ANNOTATED
from raysemi.data.sources import FileSource, Item, Palette, Part, default_palette, listed, source_root
from raysemi.errors import DataError

_MAX_CLASSES = 255
_ENTRY_KEYS = {"name", "id", "color"}
_MAP_KEYS = {"classes", "ignore", "ignore_colors"}


@dataclass(frozen=True)
class ClassMap:
    """Names, colours, and what the values of a mask mean."""

    names: tuple[str, ...]
    palette: Palette
    index_of_id: dict[int, int]
    """Value in a one-channel mask -> class index or 255."""
    index_of_colour: dict[int, int]
    """Packed RGB (r << 16 | g << 8 | b) -> class index or 255; empty when no colours are given."""


class Folder(FileSource):
    """Source `folder`.

    Args:
        root: the data set's folder.
        classes: file of the class names, default `ROOT/classes.txt` or `ROOT/classes.yaml`.

    Raises:
        DataError: the folder or the class file is missing or wrong.
    """

    def __init__(self, root: str | AnyPath | None, classes: str | AnyPath | None = None) -> None:
        self.root = source_root(root, "folder")
        if not (self.root / "images").is_dir():
            raise DataError(f"--root must hold images/train and labels/train; got {self.root}. See `raysemi pack -h`.")
        found = [path for path in (self.root / "classes.txt", self.root / "classes.yaml") if path.is_file()]
        path = as_path(classes) if classes is not None else (found or [self.root / "classes.txt"])[0]
        self.map = read_class_map(path)
        self.classes, self.palette = self.map.names, self.map.palette

    def items(self, part: Part) -> list[Item]:
        """Every image of the part, with its mask where there is one."""
        return folder_items(self.root / "images" / part, self.root / "labels" / part)

    def mask(self, item: Item) -> NDArray[np.uint8] | None:
        """Class indices; ids and colours translated by the class map."""
        return None if item.mask is None else to_indices(read_raw_mask(item.mask), self.map, item.mask)


def folder_items(images: AnyPath, labels: AnyPath | None, strict: bool = True) -> list[Item]:
    """Images below a folder, each with the PNG of the same key below the other folder.

    Args:
        images, labels: the two folders; no masks without the second.
        strict: refuse a mask without an image.

    Raises:
        DataError: folder missing or empty, an image format that pools do not take, a key twice, a mask without image.
    """
    if not images.is_dir():
        raise DataError(f"{images} must be a folder of images; got nothing there. Create it, or correct --root.")
    others = {suffix[1:] for suffix in Image.registered_extensions()} - set(IMAGE_SUFFIXES)
    found: dict[str, AnyPath] = {}
    faults = []
    for path in _files(images):
        suffix = path.suffix[1:].lower()
        if suffix in others:
            faults.append(f"{path} must be one of {', '.join(IMAGE_SUFFIXES)}. Convert it")
        if suffix not in IMAGE_SUFFIXES:
            continue
        key = _key(path, images)
        if key in found:
            faults.append(f"{path} must not share the key {key!r} with {found[key].name}. Rename one")
        found[key] = path
    masks = {_key(path, labels): path for path in _files(labels, ".png")} if labels else {}
    if strict:
        lost = sorted(masks.keys() - found.keys())
        faults += [f"{masks[key]} must have an image {images / key}.*. Add it or remove the mask" for key in lost]
    if faults:
        raise DataError(f"{'; '.join(faults[:20])}. ({len(faults)} faults in all)")
    if not found:
        raise DataError(f"{images} must hold images ({', '.join(IMAGE_SUFFIXES)}); got none. Put them there.")
    return [Item(key, key in masks, path, masks.get(key)) for key, path in found.items()]


def _key(path: AnyPath, folder: AnyPath) -> str:
    inside = below(path, folder)
    assert inside is not None
    return inside.with_suffix("").as_posix()


def _files(folder: AnyPath, suffix: str | None = None) -> list[AnyPath]:
    return [
        path
        for path in folder.rglob("*")
        if not path.name.startswith(".") and (suffix is None or path.suffix.lower() == suffix) and path.is_file()
    ]


def read_raw_mask(path: AnyPath) -> NDArray[Any]:
    """What a mask file holds: [H, W] raw index (never through a palette), or [H, W, 3] RGB.

    Raises:
        DataError: unreadable, or neither one channel nor RGB.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
            if image.mode in ("L", "P") or image.mode.startswith("I"):
                return np.asarray(image)
            if image.mode == "1":
                return np.asarray(image).astype(np.uint8)
            if image.mode in ("RGB", "RGBA"):
                return np.asarray(image.convert("RGB"))
            mode = image.mode
    except Exception as error:  # a broken file can raise anything
        raise DataError(f"mask {path} must be a readable PNG; got {error}. Save it again.") from error
    raise DataError(f"mask {path} must have one channel or RGB; got mode {mode}. Save it again.")


def to_indices(raw: NDArray[Any], classes: ClassMap, path: AnyPath) -> NDArray[np.uint8]:
    """Translate the values of a mask into class indices; 255 where ignored.

    Raises:
        DataError: an id or colour that the class map does not hold.
    """
    coloured = raw.ndim == 3
    if coloured and not classes.index_of_colour:
        raise DataError(
            f"mask {path} must have one channel; got RGB. Save class indices, or give each class its colour in the "
            f"YAML form of classes.txt."
        )
    values = raw.astype(np.int64)
    if coloured:
        values = values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]
    meaning = classes.index_of_colour if coloured else classes.index_of_id
    if values.size and values.min() >= 0 and values.max() <= 0xFFFF:  # ids are small: counting is faster than sorting
        present, places = np.flatnonzero(np.bincount(values.ravel())), None
    else:
        present, places = np.unique(values, return_inverse=True)
    unknown = [int(value) for value in present if int(value) not in meaning]
    if unknown and coloured:
        colours = [(value >> 16, value >> 8 & 255, value & 255) for value in unknown]
        raise DataError(
            f"mask {path} must hold colours of classes.txt; got {listed(colours)}. Add or ignore them there."
        )
    if unknown:
        raise DataError(
            f"mask {path} must hold ids of classes.txt; got class id {listed(unknown)} of {len(classes.names)}. "
            f"Add or ignore it there, or correct the mask."
        )
    indices = np.array([meaning[int(value)] for value in present], dtype=np.uint8)
    if places is not None:
        return indices[places].reshape(values.shape)
    table = np.zeros(int(present[-1]) + 1, dtype=np.uint8)
    table[present] = indices
    return table[values]


def read_class_map(path: AnyPath) -> ClassMap:
    """Read `classes.txt` in either of its forms.

    Raises:
        DataError: missing or malformed file; the text holds every fault.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must hold the class names, one a line; got {error}. Write it.") from error
    try:
        content = parse_yaml(text)
    except YAMLFault as error:
        if path.suffix in (".yaml", ".yml") or text.lstrip().startswith("classes:"):
            raise DataError(f"{path} must be YAML; got {error}. Correct it.") from error
        content = None
    if isinstance(content, dict) and "classes" in content:
        return _class_map(content, path)
    if path.suffix in (".yaml", ".yml"):
        raise DataError(f"{path} must be a YAML map with the key classes; got none. Add it.")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    return _class_map({"classes": names}, path)


def _class_map(content: dict[str, Any], path: AnyPath) -> ClassMap:
    entries = content["classes"] if isinstance(content["classes"], list) else []
    faults = [f"{key!r} must be one of {', '.join(sorted(_MAP_KEYS))}" for key in content if key not in _MAP_KEYS]
    if not 1 <= len(entries) <= _MAX_CLASSES:
        faults.append(f"classes must be a list of 1 to {_MAX_CLASSES}; got {len(entries)}")
    names: list[str] = []
    colours: list[tuple[int, int, int] | None] = []
    ids: dict[int, int] = {}
    packed: dict[int, int] = {}
    for index, given in enumerate(entries):
        entry = given if isinstance(given, dict) else {"name": given}
        if "name" not in entry or set(entry) - _ENTRY_KEYS:
            faults.append(f"class {index} must have a name, and may have id and color; got {given!r}")
            continue
        names.append(str(entry["name"]))
        own = entry.get("id", index)
        for value in own if isinstance(own, list) else [own]:
            _claim(ids, value, index, f"id of {names[-1]}", faults)
        shades = _colours(entry.get("color"), f"color of {names[-1]}", faults)
        colours.append(shades[0] if shades else None)
        for shade in shades:
            _claim(packed, _pack(shade), index, f"color of {names[-1]}", faults)
    faults += [
        f"class name must be used once; got {name!r} again" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    ignored = content.get("ignore", [])
    for value in ignored if isinstance(ignored, list) else [ignored]:
        _claim(ids, value, NOT_ANNOTATED, "ignore", faults)
    for shade in _colours(content.get("ignore_colors"), "ignore_colors", faults):
        _claim(packed, _pack(shade), NOT_ANNOTATED, "ignore_colors", faults)
    if faults:
        raise DataError(f"{path} must be a class list: {'; '.join(faults)}. Correct it.")
    ids.setdefault(NOT_ANNOTATED, NOT_ANNOTATED)
    defaults = default_palette(names)
    palette = tuple(own or default for own, default in zip(colours, defaults, strict=True))
    return ClassMap(tuple(names), palette, ids, packed)


def _claim(taken: dict[int, int], value: object, index: int, what: str, faults: list[str]) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        faults.append(f"{what} must be an integer; got {value!r}")
    elif value in taken:
        faults.append(f"{what} must be used once; got {value} again")
    else:
        taken[value] = index


def _colours(given: object, what: str, faults: list[str]) -> list[tuple[int, int, int]]:
    if given is None:
        return []
    several = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    good = [
        tuple(colour)
        for colour in several
        if isinstance(colour, list) and len(colour) == 3 and all(type(v) is int and 0 <= v <= 255 for v in colour)
    ]
    if len(good) < len(several):
        faults.append(f"{what} must be [r, g, b] with 0 to 255; got {given!r}")
    return [(r, g, b) for r, g, b in good]


def _pack(colour: tuple[int, int, int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]
