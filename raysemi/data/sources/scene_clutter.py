"""What is background in the drawn data set `scenes`: the table, and the flat or stony things that lie on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from raysemi.data.sources.scene_shapes import Array, Surface, lookup, pattern, wave


def noise(rng: np.random.Generator, side: int) -> Array:
    """Noise of several octaves in [0, 1], side x side, repeating without a seam."""
    total = np.zeros((side, side), np.float32)
    for cells, share in ((4, 0.34), (8, 0.28), (16, 0.22), (32, 0.16)):
        coarse = np.pad(rng.random((cells, cells), np.float32), 2, mode="wrap")
        scale = side // cells
        fine = Image.fromarray(coarse).resize((side + 4 * scale,) * 2, Image.Resampling.BICUBIC)
        total += np.float32(share) * np.asarray(fine)[2 * scale : -2 * scale, 2 * scale : -2 * scale]
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def ground(rng: np.random.Generator, side: int, grain: Array, colour: Callable[[np.random.Generator], Array]) -> Array:
    """The table: planks, cloth, tiles, marble or terrazzo in two colours, lit evenly, [side, side, 3]."""
    first = colour(rng)
    second = first + (colour(rng) - first) * np.float32(rng.uniform(0.2, 0.8))
    scale = np.float32(1 / side)
    y, x = (axis.astype(np.float32) * scale - np.float32(0.5) for axis in np.ogrid[:side, :side])
    turn = rng.uniform(0, np.pi)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = x * c + y * s, y * c - x * s
    kind, pitch = rng.integers(5), np.float32(rng.uniform(3, 9))
    shift = np.float32(rng.uniform(0, 1))
    if kind == 0:
        board = np.floor(v * pitch)
        tone = lookup(grain, u * 0.5 + board * 0.37 + shift, v * np.float32(rng.uniform(3, 7)))
        seam = wave(v * pitch, 0.04)
        tone = 0.75 * tone + 0.25 * lookup(grain, board * 0.31, shift + board * 0.17) - 0.5 * seam
    elif kind == 1:
        plaid = wave(u * pitch, rng.uniform(0.2, 0.6)) + wave(v * pitch, rng.uniform(0.2, 0.6))
        tone = 0.42 * plaid + 0.16 * lookup(grain, u * 4, v * 4)
    elif kind == 2:
        check = np.abs(wave(u * pitch * 0.5, 0.5) - wave(v * pitch * 0.5, 0.5))
        grout = np.maximum(wave(u * pitch, 0.06), wave(v * pitch, 0.06))
        tone = (0.55 * check + 0.35 * lookup(grain, u + shift, v)) * (1 - grout)
    elif kind == 3:
        warp = lookup(grain, u * 0.5 + shift, v * 0.5)
        vein = np.abs(np.sin((u * pitch * 0.8 + warp * 4) * 3.0))
        tone = 0.6 * warp + 0.4 * vein
    else:
        tone = 0.35 * lookup(grain, u * 0.6, v * 0.6) + 0.65 * (lookup(grain, u * 1.7 + shift, v * 1.7) > 0.57)
    lit = np.float32(rng.uniform(0.65, 0.95))
    tone = np.clip(tone, 0, 1).astype(np.float32)
    return (first + tone[..., None] * (second - first)) * lit


def clutter(x: Array, y: Array, rng: np.random.Generator, grain: Array, *, stain: bool) -> Surface:
    """A piece of clutter in local coordinates: scrap, coin, stick, pebble, leaf, or (with `stain`) a thin flat band.

    Flat pieces share outlines and prints with objects, and pebbles are round and shaded: only the whole tells.
    """
    flat = np.zeros((3, *np.broadcast_shapes(x.shape, y.shape)), np.float32)
    flat[2] = 1
    radius2 = x * x + y * y
    kind = rng.integers(6 if stain else 5)
    if kind == 0:  # scrap: a polygon, as the cut of half planes
        ways = np.sort(rng.uniform(0, 2 * np.pi, 3)) + np.array((0, 0.8, 1.6))
        ways = np.concatenate((ways, ways + np.pi))[: rng.integers(4, 7)]
        reach = rng.uniform(0.45, 0.95, len(ways))
        cut = [x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)) <= r for a, r in zip(ways, reach, strict=True)]
        inside = np.logical_and.reduce(cut) & (radius2 <= 1)
        tone = pattern(x, y, rng, grain) if rng.random() < 0.6 else 0.25 * lookup(grain, x * 0.4, y * 0.4)
        return Surface(inside, flat, tone, None, 0.0)
    if kind == 1:  # coin, lid, sticker: a flat disc with a rim or a print
        radius = np.sqrt(radius2)
        tone = wave(radius * rng.uniform(1, 2.5), 0.6) if rng.random() < 0.5 else pattern(x, y, rng, grain)
        return Surface(radius2 <= 0.72, flat, tone, radius > rng.uniform(0.72, 0.8), rng.uniform(0, 0.5))
    if kind == 2:  # stick: round across, far thinner than a can
        width = np.float32(rng.uniform(0.05, 0.11))
        d = np.clip(y / width, -1, 1) + 0 * x
        flat[1], flat[2] = d, np.sqrt(1 - d * d)
        tone = wave(x * rng.uniform(0.3, 3) + rng.uniform() + 0 * y, rng.uniform(0.1, 0.9))
        return Surface((np.abs(y) <= width) & (np.abs(x) <= 1), flat, tone, None, rng.uniform(0, 0.6))
    if kind == 3:  # pebble: angular lumps of rough stone
        angle = np.arctan2(y, x)
        lumps = 0.72 + 0.16 * np.cos(2 * angle + rng.uniform(0, 6)) + 0.1 * np.cos(3 * angle + rng.uniform(0, 6))
        r2 = radius2 / (lumps * lumps)
        bumps = lookup(grain, x * 0.3, y * 0.3)
        slope = np.stack((lookup(grain, x * 0.3 + 0.02, y * 0.3), lookup(grain, x * 0.3, y * 0.3 + 0.02))) - bumps
        normal = np.stack((x + slope[0] * 6, y + slope[1] * 6, np.sqrt(np.maximum(1.2 - r2, 0.02))))
        normal /= np.sqrt((normal * normal).sum(axis=0))
        return Surface(r2 <= 1, normal, 0.5 * lookup(grain[::-1], x, y), None, 0.0)
    if kind == 4:  # leaf: two arcs and a midrib
        bulge = np.float32(rng.uniform(0.25, 0.5))
        inside = np.abs(y) <= bulge * (1 - x * x)
        side = np.where(y > 0, 0.35, -0.35).astype(np.float32) + 0 * x
        flat[1], flat[2] = side, np.sqrt(1 - side * side)
        veins = wave(x * 3 - np.abs(y) * 4, 0.12)
        tone = 0.6 * veins + 0.4 * lookup(grain, x * 0.5, y * 0.5)
        return Surface(inside & (np.abs(x) <= 1), flat, tone, np.abs(y) < 0.03, rng.uniform(0, 0.4))
    radius = np.sqrt(radius2)  # a rubber band or the stain of a cup: a ring's outline without its relief
    half = rng.uniform(0.03, 0.09)
    return Surface(np.abs(radius - (0.95 - half)) <= half, flat, 0.4 * lookup(grain, x, y), None, 0.0)
