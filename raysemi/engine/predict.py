"""Label maps for images: an index PNG and a coloured overlay each, at the image's own size.

`OUT/labels/NAME.png` has 8 bits a pixel (class index, shown in the palette's colours), `OUT/overlays/NAME.png` is the
image under half-transparent colours. NAME is the path below the folder of images, without suffix, or the pool's key.
Axes: H x W pixels.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.engine import distributed
from raysemi.engine.evaluate import EvalConfig, image_tensor, inference, predict_labels, read_ahead
from raysemi.errors import ConfigError, DataError
from raysemi.methods.base import AcrossRanks, SingleRank
from raysemi.models.segmentor import Segmentor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
_NAMED = 5
Palette = Sequence[tuple[int, int, int]]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class _Item:
    name: str
    load: Callable[[], Picture]


@dataclass(frozen=True)
class _Loaded:
    name: str
    image_HW3: Picture | None
    fault: DataError | None


def predict_folder(
    network: Segmentor,
    images_dir: str | Path,
    out_dir: str | Path,
    palette: Palette,
    config: EvalConfig,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    across: AcrossRanks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Predicts every image file below a folder. Unreadable images are left out and named in an error at the end.

    Each rank writes the files of every world-th image; all ranks must call it, and it ends on all at once.

    Args:
        network: on the device; its modes are restored afterwards.
        images_dir: folder; its subfolders are searched too.
        out_dir: where `labels/` and `overlays/` go; files of the same name are replaced, others kept.
        palette: colour of each class, RGB.
        config: `eval.*`; mode `original` or `sliding_window`.
        device: where the network is.
        precision: autocast type; float32 = no autocast.
        across: the ranks; None = this process alone.
        progress: told (images done, images in all) of this rank.

    Returns:
        Number of images predicted, by all ranks.

    Raises:
        ConfigError: the mode leaves pixels out, or `out_dir` lies inside `images_dir`.
        DataError: no image there, two images of one name (before anything is written); unreadable images or a full
            disk, on whatever rank (what is written by then stays).
    """
    images, out = Path(images_dir), Path(out_dir)
    if not images.is_dir():
        raise DataError(f"the folder of images must exist; got {images}. Check the path, from {Path.cwd()}.")
    if out.resolve().is_relative_to(images.resolve()):
        raise ConfigError(f"the output must lie outside the folder of images {images}; got {out}. Choose another one.")
    files = sorted(file for file in images.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{images} must hold images ({', '.join(SUFFIXES)}); got none. Check the path.")
    items: dict[str, _Item] = {}
    of_name: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(images).with_suffix("").as_posix()
        if name in items:
            raise DataError(
                f"images must differ in more than the suffix; got {of_name[name]} and {file}. Rename one of them."
            )
        items[name], of_name[name] = _Item(name, lambda file=file: read_image(file)), file  # type: ignore[misc]
    return _predict(network, list(items.values()), out, palette, config, device, precision, across, progress)


def predict_pool(
    network: Segmentor,
    pool: Pool,
    out_dir: str | Path,
    palette: Palette,
    config: EvalConfig,
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    across: AcrossRanks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Predicts every image of a pool; see `predict_folder`. The pool's own classes and palette are not read.

    Raises:
        ConfigError: the mode leaves pixels out.
        DataError: a key that is no path below a folder (before anything is written); unreadable images or a full
            disk (what is written by then stays).
    """
    reader = Reader(pool)
    items = []
    for row in range(pool.num_samples):
        key = pool.key(row)
        if not key or PurePosixPath(key).is_absolute() or {"..", ""} & set(key.split("/")) or "\\" in key:
            raise DataError(
                f"{pool.path}: keys must be paths below a folder; got {key!r}. Pack the pool again from trusted files."
            )
        items.append(_Item(key, lambda row=row: reader.image(row)))  # type: ignore[misc]
    own = across or SingleRank()
    reader.expect([row] for row in range(own.rank, pool.num_samples, own.world))
    return _predict(network, items, Path(out_dir), palette, config, device, precision, across, progress)


def read_image(file: Path) -> Picture:
    """RGB pixels [H, W, 3] of an image file.

    Raises:
        DataError: it is broken, has more than 8 bits a channel, or states a rotation that its pixels do not have.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in _MODES:
                raise DataError(f"{file} must have 8 bits a channel; got mode {image.mode}. Convert it to RGB.")
            if image.getexif().get(_ORIENTATION, 1) != 1:
                raise DataError(f"{file} must not be rotated by EXIF. Rotate its pixels and drop the tag.")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} must be a readable image; got {error}. Replace or remove it.") from error


def label_png(labels_HW: Picture, palette: Palette) -> Image.Image:
    """Palette image whose pixel values are the class indices; 255 is shown white."""
    image = Image.fromarray(labels_HW)  # 8-bit grey; with a palette its values stay as they are
    image.putpalette(_colours(palette).tobytes())
    return image


def overlay(image_HW3: Picture, labels_HW: Picture, palette: Palette) -> Picture:
    """The image under the half-transparent colours of its classes."""
    return ((image_HW3.astype(np.uint16) + _colours(palette)[labels_HW] + 1) // 2).astype(np.uint8)


def _colours(palette: Palette) -> Picture:
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    table[255] = 255
    return table


def _predict(
    network: Segmentor,
    items: Sequence[_Item],
    out: Path,
    palette: Palette,
    config: EvalConfig,
    device: torch.device,
    precision: torch.dtype,
    across: AcrossRanks | None,
    progress: Callable[[int, int], None] | None,
) -> int:
    if config.mode == "center_crop":
        raise ConfigError(
            "eval.mode must be original or sliding_window to predict; got center_crop. Set eval.mode=original."
        )
    across = across or SingleRank()
    faults: list[str] = []
    failure: DataError | None = None
    try:
        mine = items[across.rank :: across.world]
        _own_share(network, mine, out, palette, config, device, precision, faults, progress)
    except DataError as error:
        failure = error  # the other ranks wait below: they are told there
    failed = distributed.gather([str(failure)] if failure else [], across)
    faults = distributed.gather(faults, across)
    if failed:
        raise failure or DataError(failed[0])
    if faults:
        named = "\n".join(faults[:_NAMED])
        more = f"\n... and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise DataError(
            f"all {len(items)} images must be readable; got {len(faults)} that are not, the other "
            f"{len(items) - len(faults)} are in {out}.\n{named}{more}"
        )
    return len(items)


def _own_share(
    network: Segmentor,
    items: Sequence[_Item],
    out: Path,
    palette: Palette,
    config: EvalConfig,
    device: torch.device,
    precision: torch.dtype,
    faults: list[str],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes this rank's files; adds to `faults` what cannot be read."""
    done = 0
    with inference(network, device, precision):
        for batch in _same_size(read_ahead(_load, items), config.batch):
            pictures = [loaded.image_HW3 for loaded in batch if loaded.image_HW3 is not None]
            faults += [str(loaded.fault) for loaded in batch if loaded.fault is not None]
            if pictures:
                labels_BHW = predict_labels(network, image_tensor(pictures, device), config).cpu().numpy()
                for loaded, picture, labels_HW in zip(batch, pictures, labels_BHW, strict=True):
                    _save(label_png(labels_HW, palette), out / "labels" / f"{loaded.name}.png")
                    seen = Image.fromarray(overlay(picture, labels_HW, palette))
                    _save(seen, out / "overlays" / f"{loaded.name}.png")
            done += len(batch)
            if progress is not None:
                progress(done, len(items))


def _load(item: _Item) -> _Loaded:
    try:
        return _Loaded(item.name, item.load(), None)
    except DataError as error:
        return _Loaded(item.name, None, error)


def _same_size(items: Iterable[_Loaded], batch: int) -> Iterator[list[_Loaded]]:
    """Neighbours of one size together, at most `batch`; an unreadable one alone."""
    waiting: list[_Loaded] = []
    for item in items:
        fits = (
            item.image_HW3 is not None
            and len(waiting) < batch
            and all(w.image_HW3 is not None and w.image_HW3.shape == item.image_HW3.shape for w in waiting)
        )
        if waiting and not fits:
            yield waiting
            waiting = []
        waiting.append(item)
    if waiting:
        yield waiting


def _save(image: Image.Image, path: Path) -> None:
    """Writes a PNG beside its place, then moves it there: an interruption leaves no half file."""
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(beside, "PNG")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"the disk of {path} must have room; got none left. Free space and predict again; the rest stays."
            ) from error
        raise DataError(f"{path} must be writable; got {error}. Choose another output folder.") from error
