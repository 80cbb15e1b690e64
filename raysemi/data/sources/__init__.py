"""Where images and masks come from: one source, one file; `pack` turns any of them into pools.

A source is small and picklable: it is sent to every process of `pack`, and `image_bytes` and `mask` run there.
What belongs to one image travels in its `Item`.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from raysemi.data.paths import AnyPath, as_path
from raysemi.errors import ConfigError, DataError

Part = Literal["train", "val"]
Palette = tuple[tuple[int, int, int], ...]

SOURCES = {
    "folder": "raysemi.data.sources.folder:Folder",
    "voc": "raysemi.data.sources.voc:Voc",
    "cityscapes": "raysemi.data.sources.cityscapes:Cityscapes",
    "coco": "raysemi.data.sources.coco:Coco",
    "scenes": "raysemi.data.sources.scenes:Scenes",
}
"""Name on the command line -> where the class is; adding a source adds one line."""


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Args:
        key: unique name within the source; what split lists hold. May contain `/`.
        has_mask: whether `Source.mask` can give a mask, known without opening it.
        image: file of the image; None when the source makes the image itself.
        mask: file of the mask; None when there is none or the source makes it.
        note: whatever the source needs to make this image or mask (annotations, a seed); must be picklable.
    """

    key: str
    has_mask: bool
    image: AnyPath | None = None
    mask: AnyPath | None = None
    note: Any = None


class Samples(Protocol):
    """What a shard is written from."""

    classes: tuple[str, ...]
    """Class names; a mask holds positions in this tuple."""

    def image_bytes(self, item: Item) -> tuple[str, bytes]:
        """Suffix without dot (jpg, jpeg, png, webp) and the encoded image, unchanged."""

    def mask(self, item: Item) -> NDArray[np.uint8] | None:
        """uint8 [H, W] class index, 255 where not annotated; None without a mask. Ids out of range are left in.

        Raises:
            DataError: the mask is unreadable or holds an id or a colour that the source does not know.
        """


class Source(Samples, Protocol):
    """A data set that `pack` can read."""

    @property
    def root(self) -> AnyPath | None:
        """Folder of the data set, where `splits/` is looked for; None for a source that makes its images."""

    palette: Palette
    """RGB 0..255 of each class."""
    standard: str | None
    """Data set whose lists of labeled images come with raysemi (`data/standard.py`); None: there are none."""

    def items(self, part: Part) -> list[Item]:
        """All images of the train or the val part, in any order; raises DataError when the part is not there."""


class FileSource:
    """Base of sources whose images lie in files."""

    root: AnyPath
    standard: str | None = None

    def image_bytes(self, item: Item) -> tuple[str, bytes]:
        """Suffix and bytes of the item's image file."""
        assert item.image is not None
        return item.image.suffix[1:].lower(), item.image.read_bytes()


def open_source(name: str, root: str | AnyPath | None = None, **options: Any) -> Source:
    """The source of that name.

    Args:
        name: a key of `SOURCES`.
        root: folder of the data set, or its URL; None for a source that draws its images.
        options: further keyword arguments of the source's class.

    Raises:
        ConfigError: no such source.
        DataError: the folder is missing or is not laid out as the source expects.
    """
    source: Source = _class_of(name)(root, **options)
    return source


def read_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Options of a source from `option=value` texts, for `open_source`.

    Raises:
        ConfigError: with every text that is no option of this source, or whose value is of another kind.
    """
    parameters = dict(inspect.signature(_class_of(name)).parameters)
    parameters.pop("root")
    options: dict[str, Any] = {}
    faults = []
    for text in texts:
        option, _, value = text.partition("=")
        known = parameters.get(option)
        kinds = {"bool": {"true": True, "false": False}.get(value), "int": int(value) if value.isdecimal() else None}
        if known is None or not value:
            all_of = ", ".join(f"{other}=..." for other in parameters) or "nothing"
            faults.append(f"options of source {name} must be among {all_of}; got {text!r}. Correct or remove it.")
        elif (converted := kinds.get(known.annotation, value)) is None:
            faults.append(f"option {option} of source {name} must be a {known.annotation}; got {value!r}. Correct it.")
        else:
            options[option] = converted
    if faults:
        raise ConfigError(faults)
    return options


def _class_of(name: str) -> Any:
    if name not in SOURCES:
        raise ConfigError(f"source must be one of {', '.join(SOURCES)}; got {name!r}. Choose one of these.")
    module, _, attribute = SOURCES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def source_root(root: str | AnyPath | None, source: str) -> AnyPath:
    """The folder of a data set, made absolute, or its URL; refused when it is not there."""
    if root is None:
        raise DataError(f"--root must name the folder of the data set for source {source}; got nothing. Give it.")
    folder = as_path(root)
    folder = folder.absolute() if isinstance(folder, Path) else folder
    if not folder.is_dir():
        raise DataError(f"--root must be a folder that exists; got {root}. Check the path.")
    return folder


def default_palette(classes: Sequence[str]) -> Palette:
    """Distinct colours for classes without colours of their own; black, which stands for ignored pixels, only for a
    first class named background.

    Source: the colour map of Pascal VOC (Everingham et al. 2010): the bits of the index, dealt out to R, G, B.
    """
    colours = []
    first = 0 if classes and classes[0].lower() == "background" else 1
    for index in range(first, first + len(classes)):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append((channels[0], channels[1], channels[2]))
    return tuple(colours)


def read_list(path: AnyPath) -> list[str]:
    """Lines of an id list, without blank lines.

    Raises:
        DataError: missing, unreadable or empty file, or a line that is there twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be a readable list of ids; got {error}. Check the file.") from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{path} must hold an id a line; got an empty file. Write the ids into it.")
    twice = [line for line, count in Counter(lines).items() if count > 1]
    if twice:
        raise DataError(f"{path} must name each id once; got {listed(twice)} twice. Remove the second lines.")
    return lines


def listed(values: Sequence[object], shown: int = 5) -> str:
    """The first few of many, for error texts."""
    text = ", ".join(str(value) for value in values[:shown])
    return text if len(values) <= shown else f"{text}, ... ({len(values)} in all)"
