"""A part of a resized image: the same as a part of the whole, and what Pillow makes but for single levels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from raysemi.data import resize
from raysemi.data.resize import resized_part


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def parts(count: int, most: int = 140):
    """Random images, sizes, corners and flips; also equal sides, sides longer by one pixel, strips."""
    rng = np.random.default_rng(5)
    for number in range(count):
        height, width = (int(side) for side in rng.integers(1, most, 2))
        factor = rng.uniform(0.1, 2.2) if number % 4 else 1.0
        resized = tuple(max(int(side * factor + 0.5) + int(number % 8 == 4), 1) for side in (height, width))
        size = tuple(int(rng.integers(1, side + 1)) for side in resized)
        corner = tuple(int(rng.integers(0, side - shown + 1)) for side, shown in zip(resized, size, strict=True))
        yield picture(height, width, number), resized, corner, size, bool(rng.random() < 0.5)


def whole(image: Image.Image, resized: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(resized[::-1], Image.Resampling.BILINEAR)).astype(int)


def cut(pixels: np.ndarray, corner: tuple[int, int], size: tuple[int, int], flip: bool) -> np.ndarray:
    part = pixels[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    return part[:, ::-1] if flip else part


@pytest.fixture
def never_pillow(monkeypatch):
    monkeypatch.setattr(resize, "MOST_MADE", float("inf"))


@pytest.mark.usefixtures("never_pillow")
def test_a_part_is_cut_from_the_whole():
    for image, resized, corner, size, flip in parts(400):
        all_of_it = resized_part(image, resized, (0, 0), resized)
        part = resized_part(image, resized, corner, size, flip)
        assert np.array_equal(part, cut(all_of_it, corner, size, flip)), (image.size, resized, corner, size)


@pytest.mark.usefixtures("never_pillow")
def test_it_is_what_pillow_makes_but_for_single_levels():
    values = one = more = 0
    for image, resized, corner, size, flip in parts(400):
        apart = np.abs(
            resized_part(image, resized, corner, size, flip) - cut(whole(image, resized), corner, size, flip)
        )
        assert apart.max() <= 2, (image.size, resized, corner, size)
        values, one, more = values + apart.size, one + (apart == 1).sum(), more + (apart == 2).sum()
    assert values > 2_000_000
    assert one / values < 0.03
    assert more / values < 1e-4


def test_pillow_makes_it_where_torch_would_make_too_much(monkeypatch):
    """A small part of the middle of sides without a common divisor."""
    image, resized, corner, size = picture(211, 307), (331, 479), (150, 220), (32, 32)
    by_pillow = resized_part(image, resized, corner, size, True)
    assert np.abs(by_pillow - cut(whole(image, resized), corner, size, True)).max() <= 1
    monkeypatch.setattr(resize, "MOST_MADE", float("inf"))
    assert np.abs(by_pillow.astype(int) - resized_part(image, resized, corner, size, True)).max() <= 2

    made = []
    monkeypatch.undo()
    monkeypatch.setattr(resize, "_by_pillow", lambda *arguments: made.append(arguments))
    resized_part(image, resized, corner, size)
    assert len(made) == 1
    resized_part(image, resized, (0, 447), size)  # at an end there is nothing before it
    resized_part(image, (422, 614), (201, 300), (96, 96))  # an edge in common every other pixel
    assert len(made) == 1


@pytest.mark.usefixtures("never_pillow")
@pytest.mark.parametrize("resized", [(360, 480), (362, 483), (359, 479), (361, 481), (720, 960), (180, 240)])
def test_lengths_near_the_image_own_are_resized_too(resized):
    """Torch leaves an axis alone where it would make as many pixels as it takes, whatever the factor."""
    image = picture(360, 480)
    expected = whole(image, resized)
    for top, left in [(0, 0), (35, 152), (resized[0] - 100, resized[1] - 80), (19, 17)]:
        part = resized_part(image, resized, (top, left), (100, 80))
        assert np.abs(part - cut(expected, (top, left), (100, 80), False)).max() <= 2
