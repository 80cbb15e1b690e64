"""Pascal VOC 2012, with or without the augmented masks of SBD.

    ROOT/JPEGImages/ID.jpg
    ROOT/SegmentationClass/ID.png, ROOT/SegmentationClassAug/ID.png      palette PNGs, read by their raw index
    ROOT/ImageSets/Segmentation/{train,val}.txt or ROOT/splits/{train,val}.txt
    SBD: cls/ID.mat (`GTcls.Segmentation`), in ROOT/SBD, ROOT/benchmark_RELEASE or where `sbd` says

The train part is, in this order: `ROOT/splits/train.txt`; with augmented masks, every image that has one and is not in
val; the papers' 10,582 images, where JPEGImages holds them all (without SBD's masks those that VOC itself does not
annotate are unlabeled: enough for the splits 92 to 1464); `ImageSets/Segmentation/train.txt`. With augmented masks it
must be the papers' 10,582, listed or not. Without a list of its own, the val part is the papers', which is VOC's.

Source: Everingham et al. 2010, "The Pascal Visual Object Classes Challenge"; Hariharan et al. 2011, "Semantic contours
from inverse detectors" (SBD). Where both give a mask, VOC's own is taken: its object borders are 255.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysemi.data.paths import AnyPath
from raysemi.data.sources import FileSource, Item, Part, default_palette, listed, read_list, source_root
from raysemi.data.sources.folder import read_raw_mask
from raysemi.data.standard import standard_list
from raysemi.errors import DataError

CLASSES = Path(__file__).with_name("voc_classes.txt").read_text(encoding="utf-8").splitlines()
_PLAIN_MASKS = 2913  # train and val of VOC itself; a mask folder with more holds the augmented ones


class Voc(FileSource):
    """Source `voc`.

    Args:
        root: VOC2012 folder, or the VOCdevkit that holds it.
        sbd: folder of SBD, or of its `cls`, when it lies elsewhere.
        check: compare an augmented train list with the papers' 10,582 ids; False for a part of the data set, or for
            VOC's own train list where its JPEGImages hold more.

    Raises:
        DataError: folders or lists are missing, or the augmented list is another one.
    """

    classes = tuple(CLASSES)
    palette = default_palette(CLASSES)
    standard = "voc"

    def __init__(self, root: str | AnyPath | None, sbd: str | AnyPath | None = None, check: bool = True) -> None:
        given = source_root(root, "voc")
        inside = (given, given / "VOC2012", given / "VOCdevkit" / "VOC2012")
        self.root = next((path for path in inside if (path / "JPEGImages").is_dir()), given)
        if not (self.root / "JPEGImages").is_dir():
            raise DataError(f"--root must hold JPEGImages; got {given}. Give the VOCdevkit or the VOC2012 folder.")
        self._cls = _sbd_folder([self.root, given], sbd)
        self._check = check

    def items(self, part: Part) -> list[Item]:
        """Images of the part. Unlabeled train images need no mask."""
        masks = self._masks()
        ids = self._list("val") if part == "val" else self._train(masks)
        images = self._images()
        missing = [id_ for id_ in ids if id_ not in images]
        if missing:
            raise DataError(f"{self.root}/JPEGImages must hold every {part} image; got none for {listed(missing)}.")
        return [Item(id_, id_ in masks, images[id_], masks.get(id_)) for id_ in ids]

    def mask(self, item: Item) -> NDArray[np.uint8] | None:
        """Raw index of the PNG, or `GTcls.Segmentation` of the .mat file."""
        if item.mask is None:
            return None
        raw = read_mat(item.mask) if item.mask.suffix == ".mat" else read_raw_mask(item.mask)
        if raw.ndim != 2 or raw.dtype != np.uint8:
            raise DataError(f"mask {item.mask} must have one 8-bit channel; got {raw.dtype} {raw.shape}. Replace it.")
        return raw

    def _images(self) -> dict[str, AnyPath]:
        return _by_stem((self.root / "JPEGImages").glob("*.jpg"))

    def _masks(self) -> dict[str, AnyPath]:
        found: dict[str, AnyPath] = {}
        if self._cls is not None:
            found.update(_by_stem(self._cls.glob("*.mat")))
        for folder in ("SegmentationClassAug", "SegmentationClass"):  # what comes later wins
            found.update(_by_stem((self.root / folder).glob("*.png")))
        return found

    def _list(self, part: Part) -> list[str]:
        files = (self.root / "splits" / f"{part}.txt", self.root / "ImageSets" / "Segmentation" / f"{part}.txt")
        for path in files:
            if path.is_file():
                return read_list(path)
        return standard_list("voc", part)

    def _train(self, masks: dict[str, AnyPath]) -> list[str]:
        augmented = self._cls is not None or (self.root / "SegmentationClassAug").is_dir() or len(masks) > _PLAIN_MASKS
        given = (self.root / "splits" / "train.txt").is_file()
        if not (augmented or given) and self._check:
            papers = standard_list("voc", "train")
            if self._images().keys() >= set(papers):
                return papers
        ids = self._list("train") if given or not augmented else sorted(masks.keys() - set(self._list("val")))
        if augmented and self._check:
            check_augmented(ids, self.root)
        return ids


def check_augmented(ids: Iterable[str], root: AnyPath) -> None:
    """Compare the augmented train list with the papers' 10,582 ids.

    Raises:
        DataError: it is another list.
    """
    ordered, papers = sorted(ids), sorted(standard_list("voc", "train"))
    if len(ordered) != len(papers):
        raise DataError(
            f"augmented train list of {root} must have {len(papers)} images (masks of VOC and SBD without VOC's val); "
            f"got {len(ordered)}. Complete SegmentationClassAug or SBD's cls folder, or add `check=false`."
        )
    if ordered != papers:
        raise DataError(
            f"augmented train list of {root} must be the papers' {len(papers)} images; got as many others. Check that "
            f"val.txt is VOC 2012's segmentation val list, or add `check=false`."
        )


def read_mat(path: AnyPath) -> NDArray[np.uint8]:
    """Class mask of one SBD file.

    Raises:
        DataError: not a MATLAB file with `GTcls.Segmentation`.
    """
    from scipy.io import loadmat

    try:
        with path.open("rb") as file:
            segmentation = loadmat(file, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
    except Exception as error:  # the reader has many ways to fail on a broken file
        raise DataError(f"mask {path} must be a .mat file with GTcls.Segmentation; got {error}. Replace it.") from error
    return np.atleast_2d(np.asarray(segmentation, dtype=np.uint8))


def _by_stem(paths: Iterable[AnyPath]) -> dict[str, AnyPath]:
    return {path.stem: path for path in paths if not path.name.startswith(".")}


def _sbd_folder(roots: list[AnyPath], sbd: str | AnyPath | None) -> AnyPath | None:
    if sbd is not None:
        bases = [source_root(sbd, "voc (SBD)")]
    else:
        bases = [base / name for base in roots for name in ("SBD", "benchmark_RELEASE")]
    inside = ("cls", "dataset/cls", "benchmark_RELEASE/dataset/cls")
    found = next((base / name for base in bases for name in inside if (base / name).is_dir()), None)
    if found is None and sbd is not None:
        if any(bases[0].glob("*.mat")):
            return bases[0]
        raise DataError(f"SBD folder must hold cls/*.mat; got {sbd}. Give the folder of benchmark_RELEASE.")
    return found
