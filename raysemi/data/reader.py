"""Images and masks of a pool, read by offset and decoded; what is broken is named, or skipped and replaced."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raysemi.data.ahead import Ahead, Payloads
from raysemi.data.encoded import FORMATS, ends_early
from raysemi.data.joined import AnyPool
from raysemi.data.limits import LARGEST_PAYLOAD, LARGEST_PIXELS
from raysemi.data.pool import NOT_ANNOTATED, Row, is_plain
from raysemi.data.store import unreadable
from raysemi.errors import DataError

MOST_OPEN_SHARDS = 128
MOST_REPLACEMENTS = 16


class CorruptSample(DataError):
    """One sample's bytes are wrong; the only fault that `data.on_corrupt: skip` passes over."""


class Skipped(NamedTuple):
    """A corrupt sample that was passed over."""

    pool: str
    shard: str
    key: str
    text: str
    """What is wrong with it; may differ from one reading to the next."""

    @property
    def place(self) -> tuple[str, str, str]:
        """Pool, shard and key: the same each time."""
        return self[:3]


class Sample(NamedTuple):
    """A decoded sample, and what had to be skipped to get it."""

    row: int
    """Row of the index that was read; another than the one asked for when that one was corrupt."""
    key: str
    image: Image.Image
    """RGB."""
    mask: NDArray[np.uint8] | None
    """uint8 [H, W] class index, 255 = not annotated; None unless asked for."""
    skipped: tuple[Skipped, ...]
    """Corrupt samples that were tried before, in order."""


class Reader:
    """Reads samples of a pool or of joined ones; may be pickled and used after a fork: each process opens its shards.

    Args:
        pool: the pool, local or remote.
        on_corrupt: `raise`, or `skip`: `sample` then takes another sample of the pool, a pure function of the pool and
            the row, the same on every rank.
    """

    def __init__(self, pool: AnyPool, on_corrupt: Literal["raise", "skip"] = "raise") -> None:
        self.pool = pool
        self.on_corrupt = on_corrupt
        self.given: Payloads = {}
        """Bytes that somebody else has read ahead; all others are read here."""
        self._ahead: Ahead | None = None
        self._open: OrderedDict[str, pa.NativeFile] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"pool": self.pool, "on_corrupt": self.on_corrupt, "given": {}, "_ahead": None}
        return plain | {"_open": OrderedDict(), "_process": -1}

    def expect(self, steps: Iterable[Sequence[int]], masks: bool = False) -> None:
        """Tell which rows come next, some at a time, in order: those of a remote pool are then read ahead.

        Args:
            steps: rows that are read together; within one of them any order will do.
            masks: whether their masks are read too.
        """
        if not self.pool.local:
            self._ahead = Ahead(self.pool, steps, masks, self.pool.store.prefetch_bytes)

    def image(self, row_index: int) -> NDArray[np.uint8]:
        """Image of a sample, uint8 RGB [H, W, 3].

        Raises:
            DataError: names shard and key when the bytes are missing, broken, or of another size than the index says.
        """
        return np.asarray(self.picture(row_index))

    def picture(self, row_index: int) -> Image.Image:
        """Image of a sample, RGB, as Pillow holds it: what the views resize without another copy. Raises as `image`."""
        return self._picture(self._row(row_index))

    def encoded(self, row_index: int) -> bytes:
        """Image of a sample as it is stored. Raises as `image` where bytes are missing; they are not decoded."""
        row = self._row(row_index)
        return self._payload(row, row.image_offset, row.image_bytes, "image")

    def mask(self, row_index: int) -> NDArray[np.uint8]:
        """Mask of a sample, uint8 class index [H, W], 255 = not annotated.

        Raises:
            DataError: as `image`; also when the sample has no mask, or a class that the pool does not have.
        """
        return self._mask(self._row(row_index))

    def sample(self, row_index: int, with_mask: bool = False, row: Row | None = None) -> Sample:
        """A decoded sample, or, where it is corrupt and `on_corrupt` is `skip`, another one instead.

        Args:
            row_index: of the index.
            with_mask: whether its mask is wanted too.
            row: what the index says of it, where the caller has looked it up.

        Raises:
            DataError: as `image` and `mask`; with `skip` only when many in a row are corrupt, or a shard is missing.
        """
        skipped: list[Skipped] = []
        tried = row_index
        while True:
            row = self._row(tried) if row is None else row
            try:
                picture = self._picture(row)
                mask = self._mask(row) if with_mask else None
                return Sample(tried, row.key, picture, mask, tuple(skipped))
            except CorruptSample as error:
                if self.on_corrupt == "raise":
                    raise
                skipped.append(Skipped(*self.pool.origin(row.shard), row.key, str(error)))
                if len(skipped) > MOST_REPLACEMENTS:
                    raise DataError(
                        f"pool {self.pool.path}: at most {MOST_REPLACEMENTS} samples in a row may be corrupt; got "
                        f"{len(skipped)}, the last: {error}"
                    ) from error
            seed = f"{self.pool.digest}/{row_index}/{len(skipped)}".encode()
            tried = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "little") % self.pool.num_samples
            row = None

    def _picture(self, row: Row) -> Image.Image:
        picture = self._decoded(row, row.image_offset, row.image_bytes, row.image_crc32, "image", FORMATS)
        if picture.mode.startswith(("I", "F")):
            raise self._corrupt(row, "image must have 8 bits a channel", picture.mode)
        return picture if picture.mode == "RGB" else picture.convert("RGB")

    def _mask(self, row: Row) -> NDArray[np.uint8]:
        if row.mask_offset is None or row.mask_bytes is None:
            raise DataError(
                f"{self._where(row)}: sample must have a mask to be used as labeled; got none. Use a pool in which "
                f"every sample has one."
            )
        picture = self._decoded(row, row.mask_offset, row.mask_bytes, row.mask_crc32, "mask", ("PNG",))
        if picture.mode not in ("L", "P"):
            raise self._corrupt(row, "mask must be an 8-bit PNG of one channel", picture.mode)
        mask = np.asarray(picture)
        # 255 + 1 wraps to 0, so that one maximum finds any class outside the list
        if int((mask + np.uint8(1)).max()) > len(self.pool.classes):
            wrong = int(mask[mask != NOT_ANNOTATED].max())
            raise self._corrupt(row, f"mask must hold classes below {len(self.pool.classes)} or 255", wrong)
        return mask

    def _decoded(
        self, row: Row, offset: int, length: int, crc32: int | None, what: str, formats: tuple[str, ...]
    ) -> Image.Image:
        if row.height * row.width > LARGEST_PIXELS:
            raise self._corrupt(row, f"{what} must have at most {LARGEST_PIXELS} pixels", row.height * row.width)
        if not is_plain(row.key):
            raise self._corrupt(row, "key must be a path below a folder", repr(row.key))
        payload = self._payload(row, offset, length, what)
        if crc32 is not None and zlib.crc32(payload) != crc32:
            raise self._corrupt(row, f"{what} must have the bytes that were packed", "others")
        try:
            picture = Image.open(BytesIO(payload), formats=formats)
            size = picture.size
            if size == (row.width, row.height):  # known from the header, before anything large is made
                picture.load()
                if crc32 is None and ends_early(payload, picture):
                    raise ValueError("pixels that end before the end mark")
        except MemoryError:
            raise
        except Exception as error:  # a broken file can raise anything
            got = "other bytes" if isinstance(error, UnidentifiedImageError) else error  # its own text is an address
            raise self._corrupt(row, f"{what} must be a readable {'/'.join(formats)}", got) from error
        if size != (row.width, row.height):
            size_text = f"{size[0]}x{size[1]}"
            raise self._corrupt(row, f"{what} must be {row.width}x{row.height} pixels as the index says", size_text)
        return picture

    def _row(self, row_index: int) -> Row:
        row = self.pool.row(row_index)
        if (
            self._ahead is not None
            and (row.shard, row.image_offset) not in self.given
            and row_index in self._ahead.next_rows
        ):
            self.given = self._ahead.take()
        return row

    def _payload(self, row: Row, offset: int, length: int, what: str) -> bytes:
        try:
            payload = self.given.get((row.shard, offset))
            if payload is None:
                shard = self._shard(row.shard)
                size, promised = shard.size(), self.pool.shard_bytes(row.shard)
                if size != promised:  # another file, whatever lies at the offsets of this one
                    raise self._corrupt(row, f"shard must have {promised} bytes as pool.json says", size)
                inside = 0 <= offset <= size - length and 0 <= length <= LARGEST_PAYLOAD
                payload = shard.read_at(length, offset) if inside else b""
        except CorruptSample:
            raise
        except DataError as error:
            raise type(error)(f"{self._where(row)}: {error}") from error.__cause__
        except OSError as error:
            raise unreadable(f"{self._where(row)}: shard", error) from error
        if len(payload) != length:
            missing = f"{len(payload)} of {length} bytes from {offset}"
            raise self._corrupt(row, f"shard must hold all bytes of the {what}", missing)
        return payload

    def _shard(self, name: str) -> pa.NativeFile:
        if self._process != os.getpid():  # handles of the parent are not used here: their position may be shared
            self._open, self._process = OrderedDict(), os.getpid()
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        self._open[name] = file = self.pool.open_shard(name)
        if len(self._open) > MOST_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return file

    def _where(self, row: Row) -> str:
        path, shard = self.pool.origin(row.shard)
        return f"pool {path}, shard {shard}, key {row.key}"

    def _corrupt(self, row: Row, rule: str, got: object) -> CorruptSample:
        return CorruptSample(
            f"{self._where(row)}: {rule}; got {got}. Run `raysemi verify`, pack the pool again, or set "
            f"data.on_corrupt=skip."
        )
