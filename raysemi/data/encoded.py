"""Encoded images: which kinds a pool holds, and what a decoder keeps to itself."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
_NOISE = bytes(range(1, 250)) * 4
_FILLED_IN = range(127, 130)
"""Values of a pixel that was never there: no coefficient, so the middle of the range in each channel."""


def ends_early(data: bytes, decoded: Image.Image, *, thorough: bool = False) -> bool:
    """Whether a JPEG's pixels end before its end mark: the decoder then fills the rest with grey and says nothing.

    Bytes in front of the mark are passed over where all pixels have been read, and become pixels where some are
    missing. Less than the last block of 16 x 16 pixels may be missing unseen.

    Args:
        data: the encoded image.
        decoded: the image in any scale, as Pillow has loaded it.
        thorough: also find a progressive JPEG (its pixels come in several scans) that lacks details alone, at the price
            of decoding it twice more.
    """
    if decoded.format != "JPEG":
        return False
    last = decoded.getpixel((decoded.width - 1, decoded.height - 1))
    grey = all(value in _FILLED_IN for value in (last if isinstance(last, tuple) else (last,)))
    mark = _end_mark(data) if grey or (thorough and "progressive" in decoded.info) else None
    if mark is None:
        return False
    with Image.open(BytesIO(data)) as plain, Image.open(BytesIO(data[:mark] + _NOISE + data[mark:])) as noisy:
        for image in (plain, noisy):
            image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
        return plain.tobytes() != noisy.tobytes()


def _end_mark(data: bytes) -> int | None:
    """Where the end mark of a JPEG stands; one of a thumbnail in its head does not count."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    found = data.find(b"\xff\xd9", at)
    return None if found < 0 else found
