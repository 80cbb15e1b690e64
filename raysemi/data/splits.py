"""Which train images are labeled: a named list, a file, a number, or every image that has a mask."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from raysemi.data.paths import AnyPath, as_path, below
from raysemi.data.sources import Item, listed, read_list
from raysemi.data.standard import standard_list, standard_names
from raysemi.errors import DataError


def labeled_keys(
    split: str | int | None,
    train: Sequence[Item],
    *,
    root: AnyPath | None,
    standard: str | None = None,
    seed: int = 0,
    val: Sequence[Item] = (),
) -> set[str]:
    """Keys of the labeled train images.

    Args:
        split: looked up in this order: `NAME` of `ROOT/splits/NAME.txt` or `ROOT/splits/NAME/labeled.txt`; a file with
            an id a line; a list of the papers, which comes with raysemi; a number N of images, drawn from those with a
            mask; None: all with a mask.
        train: every train image of the source.
        root: folder of the data set; None when the source has none.
        standard: data set whose lists come with raysemi (`standard.py`); None when there are none.
        seed: of the draw for a number. A larger N with the same seed holds the smaller draw.
        val: validation images, so that a list which names one can be told so.

    Returns:
        Item keys. A line may be the key itself, the image's path below the root, or `image mask` as the papers'
        lists have it.

    Raises:
        DataError: no such list, an id that is not a train image, or fewer images with a mask than asked for.
    """
    if split is None:
        return {item.key for item in train if item.has_mask}
    listing = _list_file(str(split), root)
    if listing is not None:
        return _from_list(str(listing), read_list(listing), train, root, val)
    published = standard_names(standard)
    if standard is not None and str(split) in published:
        return _from_list(_standard(standard, split), standard_list(standard, str(split)), train, root, val)
    if str(split).isdecimal():
        return _draw(int(split), train, seed)
    names = sorted(path.stem for path in (root / "splits").iterdir()) if root and (root / "splits").is_dir() else []
    known = f"splits/ holds {listed(names, 20)}" if names else "there is no list in splits/"
    known += f", the papers' lists are {', '.join(published)}" if published else ""
    raise DataError(f"--split must be a name, a file or a number; got {split!r}, and {known}. Choose one of these.")


def split_origin(
    split: str | int | None, *, root: AnyPath | None, standard: str | None = None, seed: int = 0
) -> dict[str, str | int]:
    """Where `labeled_keys` takes the labeled images from, for `pool.json`: a number may also be the name of a list.

    Args:
        split, root, standard, seed: as for `labeled_keys`.

    Returns:
        split, and list (its file, below the root where it lies there) or drawn (how many images) with seed; nothing
        without a split.
    """
    if split is None:
        return {}
    listing = _list_file(str(split), root)
    if listing is None and standard is not None and str(split) in standard_names(standard):
        return {"split": str(split), "list": _standard(standard, split)}
    if listing is None:
        return {"split": str(split), "drawn": int(split), "seed": seed}
    inside = below(listing, root) if root is not None else None
    return {"split": Path(str(split)).stem, "list": str(inside or listing.name)}


def _standard(standard: str, split: str | int) -> str:
    return f"{standard}/{split} of the papers"


def _list_file(split: str, root: AnyPath | None) -> AnyPath | None:
    given = as_path(split)
    candidates: list[AnyPath] = [given, given / "labeled.txt"]
    if root is not None:
        folder = root / "splits"
        candidates = [folder / f"{split}.txt", folder / split, folder / split / "labeled.txt", *candidates]
    return next((path for path in candidates if path.is_file()), None)


def _from_list(
    listing: str, lines: Sequence[str], train: Sequence[Item], root: AnyPath | None, val: Sequence[Item]
) -> set[str]:
    keys = {item.key for item in train}
    by_path: dict[str, str] = {}
    if root is not None and not keys.issuperset(lines):
        by_path = {str(below(item.image, root)): item.key for item in train if item.image is not None}
    chosen, unknown = set(), []
    for line in lines:
        key = line if line in keys else by_path.get(line) or by_path.get(line.split()[0])
        if key is None:
            unknown.append(line)
        else:
            chosen.add(key)
    if unknown:
        in_val = {item.key for item in val}.intersection(unknown)
        where = f", of which {len(in_val)} are validation images" if in_val else ""
        raise DataError(
            f"{listing} must name train images; got {listed(unknown)}, which is not among the {len(train)}{where}. "
            f"Correct the list or the --root."
        )
    return chosen


def _draw(count: int, train: Sequence[Item], seed: int) -> set[str]:
    keys = [item.key for item in train if item.has_mask]
    if not 1 <= count <= len(keys):
        raise DataError(
            f"--split must be between 1 and the {len(keys)} train images that have a mask; got {count}. Ask for fewer."
        )
    # a hash orders the keys: the draw depends on the names alone, not on the order in which a disk lists them
    keys.sort(key=lambda key: hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest())
    return set(keys[:count])
