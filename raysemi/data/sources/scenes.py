"""`scenes`: a drawn data set of lit, textured, overlapping objects on a cluttered table. Needs no download.

Six classes of object (`ball, fruit, box, can, ring, star`) and the background, so masks hold 0 to 6. Outline, relief
and texture decide the kind, and colour hints at it: most objects have a colour that is usual for their kind, the others
and all of the background any. Balls and fruit share their outline, and flat discs, scraps, bands and pebbles lie around
that are background. Size, attitude, pattern, light, shadow, noise and occlusion vary per object or image, so that a
handful of labeled images does not cover what several hundred unlabeled ones show.

An image is a pure function of (seed, part, index). It is drawn at twice its size and reduced; a pixel of the mask is
the object that covers at least half of it.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from raysemi.data.sources import Item, Palette, Part
from raysemi.data.sources.scene_clutter import clutter, ground, noise
from raysemi.data.sources.scene_shapes import SHAPES, Array, Flags, Surface
from raysemi.errors import ConfigError, DataError

CLASSES = ("background", *SHAPES)
PALETTE: Palette = (
    (38, 42, 51),
    (230, 88, 70),
    (122, 184, 82),
    (226, 168, 62),
    (72, 136, 214),
    (168, 104, 204),
    (62, 190, 180),
)
_USUAL_COLOURS = {  # ranges of hue, saturation and value
    "ball": ((0.94, 1.04), (0.55, 0.95), (0.5, 1.0)),  # red
    "fruit": ((0.2, 0.36), (0.45, 0.9), (0.4, 0.95)),  # green
    "box": ((0.05, 0.11), (0.3, 0.65), (0.35, 0.85)),  # cardboard
    "can": ((0.54, 0.66), (0.2, 0.8), (0.4, 1.0)),  # blue
    "ring": ((0.74, 0.88), (0.35, 0.9), (0.45, 1.0)),  # purple
    "star": ((0.12, 0.17), (0.55, 0.95), (0.6, 1.0)),  # yellow
}
_USUAL = 0.75
"""Probability that an object has its kind's colour."""
_JPEG_QUALITY = 92
_OVERSAMPLING = 2
_TONE_CURVE = (255 * np.linspace(0, 1, 1024) ** 0.85 + 0.5).astype(np.uint8)  # lifts shadows as a camera's curve does


@dataclass(frozen=True)
class Scene:
    """One drawn image with its truth. Both arrays are read-only."""

    image_HW3: NDArray[np.uint8]
    label_HW: NDArray[np.uint8]
    """Position in `CLASSES`."""


@dataclass(frozen=True)
class _Light:
    direction_3: Array
    ambient: float
    warmth_3: Array


def _generator(seed: int, part: Part, index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"scenes/{seed}/{part}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _colour(rng: np.random.Generator) -> Array:
    """Any colour."""
    saturation = rng.beta(1.6, 1.6) * 0.9
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), saturation, rng.uniform(0.3, 1.0)), np.float32)


def _colour_of(kind: str, rng: np.random.Generator) -> Array:
    """An object's main colour."""
    if rng.random() >= _USUAL:
        return _colour(rng)
    hue, saturation, value = (rng.uniform(*bounds) for bounds in _USUAL_COLOURS[kind])
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def _contrasting(rng: np.random.Generator, other_3: Array) -> Array:
    """A second colour that can be told from the first."""
    colours = [_colour(rng) for _ in range(3)]
    return max(colours, key=lambda colour: float(np.abs(colour - other_3).sum()))


def _light(rng: np.random.Generator) -> _Light:
    height, way = rng.uniform(0.5, 1.1), rng.uniform(0, 2 * np.pi)
    direction = (np.cos(height) * np.cos(way), np.cos(height) * np.sin(way), np.sin(height))
    warmth = 1 + rng.uniform(-0.12, 0.12) * np.array((1, 0, -1))
    return _Light(np.array(direction, np.float32), rng.uniform(0.3, 0.5), warmth.astype(np.float32))


def _shade(surface: Surface, light: _Light, turn: float, colours_33: Array) -> Array:
    """Lambert and Blinn-Phong shading of a surface that is turned by `turn` in the image plane, [points inside, 3]."""
    c, s = np.cos(turn), np.sin(turn)
    x, y, z = (float(v) for v in light.direction_3)
    # the light in the object's own axes: cheaper than turning every normal
    own = np.array((c * x + s * y, -s * x + c * y, z), np.float32)
    between = own + np.array((0, 0, 1), np.float32)
    between /= np.sqrt((between * between).sum())
    inside = surface.inside_HW
    diffuse, half_way = np.maximum(np.stack((own, between)) @ surface.normal_3HW[:, inside], 0)
    half_way *= half_way
    half_way *= half_way
    shine = (half_way * half_way) ** 3 * np.float32(0.6 * surface.gloss)
    albedo = colours_33[0] + surface.tone_HW[inside][:, None] * (colours_33[1] - colours_33[0])
    if surface.accent_HW is not None:
        albedo[surface.accent_HW[inside]] = colours_33[2]
    bright = np.float32(light.ambient) + np.float32(1.05 - light.ambient * 0.6) * diffuse
    return albedo * bright[:, None] + shine[:, None]


def _window(centre: Array, reach: float, side: int) -> tuple[slice, slice]:
    left, top = (max(0, int(v - reach)) for v in centre)
    right, bottom = (min(side, int(v + reach) + 2) for v in centre)
    return slice(top, max(bottom, top)), slice(left, max(right, left))


def _cast_shadow(canvas_HW3: Array, inside_HW: Flags, window: tuple[slice, slice], light: _Light, rise: float) -> None:
    """Darkens what lies below an outline, away from the light, with a soft edge."""
    pad = int(rise) + 4
    top, left = window[0].start, window[1].start
    height, width = inside_HW.shape
    mask = np.zeros((height + 2 * pad, width + 2 * pad), np.uint8)
    dx, dy = (round(-rise * float(v)) for v in light.direction_3[:2])
    mask[pad + dy : pad + dy + height, pad + dx : pad + dx + width] = inside_HW * np.uint8(255)
    soft = np.asarray(Image.fromarray(mask).filter(ImageFilter.BoxBlur(max(1.0, rise * 0.3))))
    side = len(canvas_HW3)
    y0, x0 = max(0, top - pad), max(0, left - pad)
    y1, x1 = min(side, top + height + pad), min(side, left + width + pad)
    cut = soft[y0 - top + pad : y1 - top + pad, x0 - left + pad : x1 - left + pad]
    strength = np.float32((0.75 - light.ambient) / 255)
    canvas_HW3[y0:y1, x0:x1] *= (1 - strength * cut)[..., None]


def _place(rng: np.random.Generator, radius: float, taken: list[tuple[float, float, float]], side: int) -> Array:
    """A centre whose overlap with what lies there is bearable: the best of a few, the first that is good enough."""
    best, least = np.zeros(2), np.inf
    for _ in range(8):
        centre = rng.uniform(min(radius, side / 2) * 0.55, side - min(radius, side / 2) * 0.55, 2)
        depths = [(radius + r - np.hypot(centre[0] - x, centre[1] - y)) / (2 * min(radius, r)) for x, y, r in taken]
        overlap = max(depths, default=0.0)
        if overlap < least:
            best, least = centre, overlap
        if overlap < rng.uniform(0, 0.5):
            break
    return best.astype(np.float32)


def draw_scene(seed: int, part: Part, index: int, size: int = 128) -> Scene:
    """Draws one image and its mask.

    Args:
        seed: seed of the data set.
        part: train or val; the two never share an image.
        index: number of the image in its part, from 0.
        size: side of the square image in pixels.

    Returns:
        The image, RGB uint8 [size, size, 3], and the class of each pixel.
    """
    rng = _generator(seed, part, index)
    side = size * _OVERSAMPLING
    light, grain = _light(rng), noise(rng, 128)
    ids_HW = np.zeros((side, side), np.uint8)
    kinds = [0]
    canvas_HW3 = ground(rng, side, grain, _colour)

    num_objects, num_clutter = int(rng.integers(3, 8)), int(rng.integers(5, 14))
    below = rng.random(num_clutter) < 0.75
    for _ in range(int(below.sum())):
        _lay_clutter(canvas_HW3, None, rng, grain, light)
    taken: list[tuple[float, float, float]] = []
    for _ in range(num_objects):
        kind = int(rng.integers(1, len(CLASSES)))
        radius = side * 0.5 * float(np.exp(rng.uniform(np.log(0.2), np.log(0.6))))
        centre, turn = _place(rng, radius, taken, side), rng.uniform(0, 2 * np.pi)
        window = _window(centre, radius * 1.1, side)
        y, x = np.ogrid[window]
        x, y = (x + 0.5 - centre[0]) / np.float32(radius), (y + 0.5 - centre[1]) / np.float32(radius)
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        surface = SHAPES[CLASSES[kind]](x * c + y * s, y * c - x * s, rng, grain)
        first = _colour_of(CLASSES[kind], rng)
        colours = np.stack((first, _contrasting(rng, first), _colour(rng)))
        shaded = _shade(surface, light, turn, colours)
        _cast_shadow(canvas_HW3, surface.inside_HW, window, light, radius * rng.uniform(0.25, 0.5))
        canvas_HW3[window][surface.inside_HW] = shaded
        kinds.append(kind)
        ids_HW[window][surface.inside_HW] = len(kinds) - 1
        taken.append((float(centre[0]), float(centre[1]), radius))
    for _ in range(int((~below).sum())):
        _lay_clutter(canvas_HW3, ids_HW, rng, grain, light)

    label_HW = np.array(kinds, np.uint8)[_covering_half(ids_HW)]
    image_HW3 = _photograph(canvas_HW3, rng, light)
    for array in (image_HW3, label_HW):
        array.setflags(write=False)  # scenes are cached
    return Scene(image_HW3, label_HW)


def _lay_clutter(
    canvas_HW3: Array, ids_HW: NDArray[np.uint8] | None, rng: np.random.Generator, grain: Array, light: _Light
) -> None:
    """Lays one piece of clutter down; on top of objects it takes their pixels back to the background."""
    side = len(canvas_HW3)
    radius = side * 0.5 * float(np.exp(rng.uniform(*np.log((0.06, 0.42) if ids_HW is None else (0.12, 0.3)))))
    centre = rng.uniform(0, side, 2).astype(np.float32)
    window = _window(centre, radius * 1.1, side)
    y, x = np.ogrid[window]
    x, y = (x + 0.5 - centre[0]) / np.float32(radius), (y + 0.5 - centre[1]) / np.float32(radius)
    turn = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    surface = clutter(x * c + y * s, y * c - x * s, rng, grain, stain=ids_HW is None)
    first = _colour(rng)
    colours = np.stack((first, _contrasting(rng, first), _colour(rng)))
    shaded = _shade(surface, light, turn, colours)
    _cast_shadow(canvas_HW3, surface.inside_HW, window, light, side * 0.008)
    canvas_HW3[window][surface.inside_HW] = shaded
    if ids_HW is not None:
        ids_HW[window][surface.inside_HW] = 0


def _covering_half(ids_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of each 2 x 2 block the value that at least half of it has; of four sorted values that is the third."""
    blocks = np.stack((ids_HW[::2, ::2], ids_HW[::2, 1::2], ids_HW[1::2, ::2], ids_HW[1::2, 1::2]))
    blocks.sort(axis=0)
    return blocks[2]


def _photograph(canvas_HW3: Array, rng: np.random.Generator, light: _Light) -> NDArray[np.uint8]:
    """Reduces the canvas, then adds what a camera does: fall-off of the light, exposure, blur, grain."""
    size = len(canvas_HW3) // _OVERSAMPLING
    # the sum of four; the exposure below holds their quarter
    image = canvas_HW3[::2, ::2] + canvas_HW3[::2, 1::2] + canvas_HW3[1::2, ::2] + canvas_HW3[1::2, 1::2]
    across = np.linspace(-1, 1, size, dtype=np.float32)
    way, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.4)
    slope = np.float32(np.cos(way)) * across + np.float32(np.sin(way)) * across[:, None]
    vignette = 1 - np.float32(rng.uniform(0, 0.15)) * (across**2 + across[:, None] ** 2)
    image *= ((1 + np.float32(strength) * slope) * vignette)[..., None] * (
        light.warmth_3 * np.float32(rng.uniform(0.19, 0.29))
    )
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.004, 0.035))
    np.clip(image, 0, 1, out=image)
    return _TONE_CURVE[(image * 1023).astype(np.int32)]


_cached_scene = functools.lru_cache(maxsize=4)(draw_scene)  # `pack` asks for image and mask of an item in turn


class Scenes:
    """The drawn data set as a source.

    Args:
        root: must be None: nothing is read.
        train, val: number of images of the two parts.
        seed: another seed gives another data set.
        size: side of the images in pixels.

    Raises:
        DataError: a root was given.
        ConfigError: a number is too small.
    """

    root: Path | None = None
    classes = CLASSES
    palette = PALETTE
    standard: str | None = None

    def __init__(
        self, root: str | Path | None = None, *, train: int = 800, val: int = 100, seed: int = 0, size: int = 128
    ) -> None:
        if root is not None:
            raise DataError(f"--root must be left out for source scenes, which is drawn; got {root}. Leave it out.")
        faults = [
            f"{name} must be at least {least}; got {value}. Choose a larger number."
            for name, value, least in (("train", train, 1), ("val", val, 1), ("size", size, 32))
            if value < least
        ]
        if faults:
            raise ConfigError(faults)
        self.counts: dict[Part, int] = {"train": train, "val": val}
        self.seed = seed
        self.size = size

    def items(self, part: Part) -> list[Item]:
        """All images of the part, in the order of their numbers."""
        return [
            Item(key=f"{part}-{index:06d}", has_mask=True, note=(part, index)) for index in range(self.counts[part])
        ]

    def _scene(self, item: Item) -> Scene:
        part, index = item.note
        return _cached_scene(self.seed, part, index, self.size)

    def image_bytes(self, item: Item) -> tuple[str, bytes]:
        """The image as JPEG."""
        file = io.BytesIO()
        Image.fromarray(self._scene(item).image_HW3).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return "jpg", file.getvalue()

    def mask(self, item: Item) -> NDArray[np.uint8]:
        """Class of each pixel, uint8 [size, size]; nothing is left out."""
        return self._scene(item).label_HW
