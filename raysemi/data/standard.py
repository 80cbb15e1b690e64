"""The papers' lists of labeled images, which come with raysemi: ids alone, in `sources/NAME_splits.zip`.

A zip holds `LIST.txt`, an id a line in the published order, and `NOTICE.txt`, which says where the lists are from.
Of VOC also `train.txt` and `val.txt`: VOC itself does not list the 10,582 train images of the papers.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

_PARTS = ("train", "val")
_NOTICE = "NOTICE"


def standard_names(data_set: str | None) -> list[str]:
    """Names of the lists of labeled images of a data set, in the papers' order; none for a data set without any."""
    if data_set is None:
        return []
    with zipfile.ZipFile(_file(data_set)) as lists:
        stems = [name.removesuffix(".txt") for name in lists.namelist()]
    return [stem for stem in stems if stem not in (*_PARTS, _NOTICE)]


def standard_list(data_set: str, name: str) -> list[str]:
    """Ids of a list: one of `standard_names`, or `train` or `val` of voc, in the published order."""
    with zipfile.ZipFile(_file(data_set)) as lists:
        return lists.read(f"{name}.txt").decode().splitlines()


def _file(data_set: str) -> Path:
    return Path(__file__).with_name("sources") / f"{data_set}_splits.zip"
