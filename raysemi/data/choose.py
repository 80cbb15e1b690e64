"""Which sample of a source goes into which pool, and what is wrong with that choice before any image is decoded."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing

from raysemi.data.paths import AnyPath, StorePath
from raysemi.data.pool import is_plain
from raysemi.data.shard import Entry, Stat
from raysemi.data.sources import Item, Part, Source
from raysemi.data.splits import labeled_keys
from raysemi.data.workers import Runner, read_ahead
from raysemi.errors import DataError

POOLS = ("labeled", "unlabeled", "val")
_FAULTS_SHOWN = 20
_IMAGES_A_TASK = 512


def choose_entries(
    source: Source,
    *,
    split: str | int | None,
    pools: Collection[str],
    keep_unlabeled_masks: bool,
    escape_dots: bool,
    seed: int,
) -> dict[str, list[Entry]]:
    """Entries of all three pools in the order of their keys, also of those that are not asked for.

    Raises:
        DataError: names every key that cannot be stored, every labeled image without a mask, every empty pool.
    """
    train = _items(source, "train", needed=bool({"labeled", "unlabeled"}.intersection(pools)))
    val = _items(source, "val", needed="val" in pools)
    labeled: set[str] = set()
    if train:
        labeled = labeled_keys(split, train, root=source.root, standard=source.standard, seed=seed, val=val)
    chosen = {
        "labeled": [Entry(item.key, item, True) for item in train if item.key in labeled],
        "unlabeled": [
            Entry(item.key, item, keep_unlabeled_masks and item.has_mask) for item in train if item.key not in labeled
        ],
        "val": [Entry(item.key, item, True) for item in val],
    }
    faults: list[str] = []
    for name in (name for name in POOLS if name in pools):
        if not chosen[name]:
            faults.append(
                f"pool {name} must hold images; got none. Choose another --split, or leave it out with "
                f"--pools {','.join(other for other in pools if other != name) or 'labeled'}."
            )
        faults += [
            f"image {entry.key} of pool {name} must have a mask; got none. Add it or take the image out."
            for entry in chosen[name]
            if entry.with_mask and not entry.item.has_mask
        ]
        faults += key_faults([entry.key for entry in chosen[name]], escape_dots)
    raise_faults(faults)
    if escape_dots:
        chosen = {
            name: [Entry(entry.key.replace(".", "_"), entry.item, entry.with_mask) for entry in entries]
            for name, entries in chosen.items()
        }
    return {name: sorted(entries, key=lambda entry: entry.key) for name, entries in chosen.items()}


def _items(source: Source, part: Part, needed: bool) -> list[Item]:
    try:
        return source.items(part)
    except DataError:
        if needed:
            raise
        return []  # a part that is not packed need not be there


def key_faults(keys: Sequence[str], escape_dots: bool) -> list[str]:
    """What is wrong with keys: WebDataset ends a key at its first dot, and a key is a relative path.

    Args:
        keys: keys of one pool.
        escape_dots: dots will be replaced by `_`; then two keys may not become one.
    """
    faults = []
    stored: dict[str, str] = {}
    for key in keys:
        if not is_plain(key):
            faults.append(f"key must be a plain relative path without `..`; got {key!r}. Rename the file.")
        elif "." in key and not escape_dots:
            faults.append(f"key must not hold a dot; got {key!r}. Rename the file or pass --escape-dots.")
        other = stored.setdefault(key.replace(".", "_") if escape_dots else key, key)
        if other != key:
            faults.append(f"keys must differ after --escape-dots; got {other!r} and {key!r}. Rename one.")
    return faults


def file_stats(chosen: Mapping[str, Sequence[Entry]]) -> dict[AnyPath, Stat]:
    """Size and time of every file of the entries.

    Raises:
        DataError: names every file that cannot be looked at.
    """
    stats: dict[AnyPath, Stat] = {}
    faults = []
    for entry in (entry for entries in chosen.values() for entry in entries):
        for path in entry.files:
            try:
                stat = path.stat()
                stats[path] = (stat.st_size, stat.st_mtime_ns)
            except OSError as error:
                faults.append(f"{path} must be readable; got {error}. Replace or remove it.")
    raise_faults(faults)
    return stats


def same_images(chosen: Mapping[str, Sequence[Entry]], stats: Mapping[AnyPath, Stat], run: Runner) -> list[str]:
    """Images with the same bytes in two pools. Only files whose length occurs in two pools are read, by `run`."""
    by_size: dict[int, list[tuple[str, str, AnyPath]]] = defaultdict(list)
    for name, entries in chosen.items():
        for entry in entries:
            if entry.item.image is not None:
                by_size[stats[entry.item.image][0]].append((name, entry.key, entry.item.image))
    alike = [images for images in by_size.values() if len({name for name, _, _ in images}) > 1]
    paths = [path for images in alike for _, _, path in images]
    tasks = [tuple(paths[start : start + _IMAGES_A_TASK]) for start in range(0, len(paths), _IMAGES_A_TASK)]
    digests: dict[AnyPath, bytes] = {}
    faults: list[str] = []
    with closing(run(image_digests, tasks)) as results:
        for task, found in results:
            digests.update(
                (path, digest) for path, digest in zip(task, found, strict=True) if isinstance(digest, bytes)
            )
            faults += [digest for digest in found if isinstance(digest, str)]
    for images in alike:
        first: dict[bytes, tuple[str, str]] = {}
        for name, key, path in (image for image in images if image[2] in digests):
            other_name, other_key = first.setdefault(digests[path], (name, key))
            if other_name != name:
                faults.append(
                    f"an image must be on one side of the split; got the same bytes as {other_key} of {other_name} and "
                    f"{key} of {name}. Remove one, or pass --allow-same-images."
                )
    return faults


def image_digests(paths: Sequence[AnyPath]) -> list[bytes | str]:
    """A digest of each file, or what is wrong with it."""
    found: list[bytes | str] = []
    remote = isinstance(paths[0], StorePath)
    for path, content in read_ahead(lambda path: path.read_bytes(), paths, remote=remote):
        try:
            found.append(hashlib.blake2b(content(), digest_size=16).digest())
        except OSError as error:
            found.append(f"image {path} must be readable; got {error}. Replace or remove it.")
    return found


def raise_faults(faults: Sequence[str], more: bool = False) -> None:
    """Raise all faults as one error, the first 20 in words.

    Args:
        faults: may be empty; then nothing happens.
        more: there may be others that were not looked for.
    """
    if not faults:
        return
    text = "\n".join(faults[:_FAULTS_SHOWN])
    if len(faults) > _FAULTS_SHOWN or more:
        text += f"\n{'at least ' if more else ''}{len(faults)} faults in all, the first {_FAULTS_SHOWN} shown"
    raise DataError(text)
