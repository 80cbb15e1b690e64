"""The six kinds of object of the drawn data set `scenes`: outline, surface normals and texture of each.

Every kind is a function of local coordinates, in which the object fills about the unit circle (x to the right, y down,
z towards the viewer, seen from straight above), and of a generator, from which it draws its own proportions, attitude
and pattern. Nothing here knows colours: a surface says where its three colours go, the scene chooses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""float32; numpy's stubs forget that at the first scalar."""
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Surface:
    """What one object looks like before it is coloured and lit, H x W points."""

    inside_HW: Flags
    """The outline, exact at each point."""
    normal_3HW: Array
    """Unit normal towards the viewer; any value outside."""
    tone_HW: Array
    """Texture in [0, 1]: 0 the first colour, 1 the second."""
    accent_HW: Flags | None
    """Points of the third colour (a stem, a lid, a seam)."""
    gloss: float
    """Strength of the highlight, 0 to 1."""


Shape = Callable[[Array, Array, np.random.Generator, Array], Surface]


def _rotation(rng: np.random.Generator) -> Array:
    """A uniform random rotation matrix (a random unit quaternion)."""
    w, x, y, z = (q := rng.normal(size=4)) / np.sqrt((q * q).sum())
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows, np.float32)


def wave(phase: Array, duty: float) -> Array:
    """A square wave of period 1: 1 during the share `duty` of each period."""
    return (phase - np.floor(phase) < duty).astype(np.float32)


def lookup(grain: Array, s: Array, t: Array) -> Array:
    """Noise at texture coordinates; `grain` repeats with period 1."""
    side = len(grain)  # a power of two, so that `&` wraps negative numbers as well
    return grain[(t * side).astype(np.int32) & (side - 1), (s * side).astype(np.int32) & (side - 1)]


def pattern(s: Array, t: Array, rng: np.random.Generator, grain: Array) -> Array:
    """A printed pattern over texture coordinates of about [-1, 1]: the textures that several kinds share."""
    kind, pitch, duty = rng.integers(6), rng.uniform(1.5, 4.5), rng.uniform(0.3, 0.7)
    if kind == 0:
        return wave(s * pitch, duty)
    if kind == 1:
        return wave(t * pitch, duty)
    if kind == 2:
        return np.abs(wave(s * pitch, 0.5) - wave(t * pitch, 0.5))
    if kind == 3:
        near_s, near_t = (x * pitch - np.floor(x * pitch) - 0.5 for x in (s, t))
        return (near_s * near_s + near_t * near_t < 0.25 * duty * duty + 0.02).astype(np.float32)
    if kind == 4:
        return 0.8 * lookup(grain, s * 0.4, t * 0.4)
    return wave((s + t) * pitch * 0.7, duty)


def ball(x: Array, y: Array, rng: np.random.Generator, grain: Array) -> Surface:
    """A glossy sphere with sharp panels: wedges, bands, octants, dots or two halves."""
    r2 = x * x + y * y
    normal = np.stack((x, y, np.sqrt(np.maximum(1 - r2, 0))))
    a, b, c = np.tensordot(_rotation(rng), normal, 1)
    kind, accent = rng.integers(5), None
    if kind == 0:
        wedges = int(rng.integers(2, 5))
        tone = wave(np.arctan2(a, b) * np.float32(wedges / (2 * np.pi)), 0.5)
        accent = c > rng.uniform(0.9, 0.97)
    elif kind == 1:
        tone = wave(c * rng.uniform(1.0, 2.5) + rng.uniform(), rng.uniform(0.35, 0.65))
    elif kind == 2:
        tone = (a * b * c > 0).astype(np.float32)
    elif kind == 3:
        near = np.abs(np.stack((a, b, c))).max(axis=0)
        corner = np.abs(a) + np.abs(b) + np.abs(c)
        tone = ((near > 0.94) | (corner > 1.68)).astype(np.float32)
    else:
        tone = (c > 0).astype(np.float32)
        accent = np.abs(c) < rng.uniform(0.08, 0.2)
    return Surface(r2 <= 1, normal, tone, accent, rng.uniform(0.35, 1.0))


def fruit(x: Array, y: Array, rng: np.random.Generator, grain: Array) -> Surface:
    """A dull, slightly lobed sphere: mottled, streaked from a dark stem, never sharply panelled."""
    angle = np.arctan2(y, x)
    lobes, depth, squash = int(rng.integers(2, 6)), rng.uniform(0.0, 0.07), rng.uniform(0.8, 1.0)
    outline = squash + (1 - squash) * np.abs(np.cos(angle + rng.uniform(0, np.pi)))
    outline = outline * (1 - depth + depth * np.cos(lobes * angle + rng.uniform(0, 6)))
    u, v = x / outline, y / outline
    r2 = u * u + v * v
    normal = np.stack((u, v, np.sqrt(np.maximum(1 - r2, 0))))
    reach, way = rng.uniform(0.0, 0.75), rng.uniform(0, 2 * np.pi)
    dx, dy = u - np.float32(reach * np.cos(way)), v - np.float32(reach * np.sin(way))
    from_stem = np.sqrt(dx * dx + dy * dy)
    s, t = rng.uniform(0, 1, 2)
    mottle = lookup(grain, u * 0.3 + s, v * 0.3 + t)
    if rng.random() < 0.5:
        streak = lookup(grain, np.arctan2(dy, dx) * np.float32(1.5 / np.pi) + s, from_stem * 0.08 + t)
        tone = 0.35 * mottle + 0.65 * streak
    else:
        specks = lookup(grain[::-1], u * 1.3 + t, v * 1.3 + s) > rng.uniform(0.62, 0.75)
        tone = 0.6 * mottle + np.float32(0.4) * specks
    normal[2] *= np.minimum(1, 0.35 + from_stem * 2.5)  # the dimple around the stem
    return Surface(r2 <= 1, normal, np.clip(tone, 0, 1), from_stem < rng.uniform(0.06, 0.14), rng.uniform(0.0, 0.35))


def box(x: Array, y: Array, rng: np.random.Generator, grain: Array) -> Surface:
    """A cuboid with two or three faces in view: printed, banded with tape, or plain with worn edges."""
    half = rng.uniform(0.4, 0.75, 3).astype(np.float32)
    half /= np.sqrt((half * half).sum())  # the corners lie on the unit sphere
    lean, turn = rng.uniform(0.45, 1.0), rng.uniform(0.35, 1.2)
    cl, sl, ct, st = np.cos(lean), np.sin(lean), np.cos(turn), np.sin(turn)
    # columns: what the viewer's x, y and z axes are in the cuboid's own axes
    turned = np.array([[ct, -st * cl, st * sl], [st, ct * cl, -ct * sl], [0, sl, cl]], np.float32)
    start = turned[:, 0, None, None] * x + turned[:, 1, None, None] * y
    ray = turned[:, 2, None, None]
    first, last = (-half[:, None, None] - start) / ray, (half[:, None, None] - start) / ray
    enter, leave = np.maximum(first, last), np.minimum(first, last)  # seen from +z: the larger crossing is in front
    face = enter.argmin(axis=0)
    front = enter.min(axis=0)
    inside = front >= leave.max(axis=0)
    point = start + front * ray
    normal = np.take((turned * np.sign(turned[:, 2:])), face, axis=0).transpose(2, 0, 1)
    axes = [(1, 2), (0, 2), (0, 1)]
    s, t = (np.choose(face, [point[pair[side]] / half[pair[side]] for pair in axes]) for side in (0, 1))
    rim = np.maximum(np.abs(s), np.abs(t))
    kind = rng.integers(4)
    accent: Flags | None = rim > rng.uniform(0.86, 0.95)
    if kind == 0:
        tone = pattern(s, t, rng, grain)
    elif kind == 1:
        tone, accent = (np.abs(s) < rng.uniform(0.12, 0.3)).astype(np.float32), None
    elif kind == 2:
        tone = 0.7 * lookup(grain, s * 0.5, t * 0.06) + 0.3 * wave(t * 1.5, 0.06)
    else:
        tone = ((rim < rng.uniform(0.55, 0.7)) * (0.75 + 0.25 * pattern(s, t, rng, grain))).astype(np.float32)
        accent = None
    return Surface(inside, normal, tone, accent, rng.uniform(0.0, 0.3))


def can(x: Array, y: Array, rng: np.random.Generator, grain: Array) -> Surface:
    """A cylinder, leaning: a wrapped label or bands on its side, a ringed lid."""
    lean, slim = rng.uniform(0.75, 1.35), rng.uniform(0.42, 0.62)
    across, along = np.float32(np.cos(lean)), np.float32(np.sin(lean))
    half = np.float32((0.97 - slim * across) / (slim * along))
    u, v = x / np.float32(slim), y / np.float32(slim)
    q = np.sqrt(np.maximum(1 - u * u, 0))
    height = (v + q * across) / along
    side = (np.abs(u) <= 1) & (np.abs(height) <= half)
    w = (half * along - v) / across
    r2 = u * u + w * w
    lid = (r2 <= 1) & ~side
    lid_normal = np.array((0, along, across), np.float32)[:, None, None]
    normal = np.where(lid, lid_normal, np.stack((u, -q * across, q * along)))
    around = np.arcsin(np.clip(u, -1, 1)) * np.float32(2 / np.pi) + np.float32(rng.uniform(-1, 1))
    level = height / half
    kind = rng.integers(3)
    if kind == 0:
        tone = wave(level * rng.uniform(0.8, 2.2) + rng.uniform(), rng.uniform(0.3, 0.7))
    elif kind == 1:
        tone = pattern(around, level, rng, grain)
    else:
        top = rng.uniform(0.35, 0.8)
        tone = (np.abs(level) < top) * (0.55 + 0.45 * wave(around * rng.uniform(1, 3), rng.uniform(0.3, 0.6)))
    tone = np.where(lid, wave(np.sqrt(r2) * rng.uniform(1.5, 3), 0.8), tone).astype(np.float32)
    accent = lid | (np.abs(level) > rng.uniform(0.9, 0.97))
    return Surface(side | lid, normal, tone, accent if rng.random() < 0.7 else None, rng.uniform(0.2, 0.9))


def ring(x: Array, y: Array, rng: np.random.Generator, grain: Array) -> Surface:
    """A torus, sometimes seen aslant: twisted stripes, segments, sprinkles or plain; the hole shows what lies below."""
    squash, tube = rng.uniform(0.6, 1.0), rng.uniform(0.17, 0.32)
    y = y / np.float32(squash)
    radius, angle = np.sqrt(x * x + y * y), np.arctan2(y, x)
    d = (radius - np.float32(1 - tube)) / np.float32(tube)
    rise = np.sqrt(np.maximum(1 - d * d, 0))
    normal = np.stack((d * np.cos(angle), d * np.sin(angle), rise))
    turn, kind = angle * np.float32(1 / np.pi), rng.integers(4)
    if kind == 0:
        tone = wave(turn * float(rng.integers(3, 9)) + np.arcsin(np.clip(d, -1, 1)) * rng.uniform(0.2, 0.6), 0.5)
    elif kind == 1:
        tone = wave(turn * float(rng.integers(1, 5)), rng.uniform(0.3, 0.7))
    elif kind == 2:
        tone = (lookup(grain, x * 0.9, y * 0.9) > rng.uniform(0.55, 0.68)).astype(np.float32)
    else:
        tone = 0.6 * lookup(grain, turn, d * 0.05)
    return Surface(np.abs(d) <= 1, normal, tone, None, rng.uniform(0.1, 0.9))


def star(x: Array, y: Array, rng: np.random.Generator, grain: Array) -> Surface:
    """A star of four to seven arms with a ridge along each, or a flower with as many petals."""
    arms, waist = int(rng.integers(4, 8)), rng.uniform(0.36, 0.55)
    sector = np.float32(np.pi / arms)
    radius, angle = np.sqrt(x * x + y * y), np.arctan2(y, x)
    offset = angle - 2 * sector * np.round(angle / (2 * sector))  # from the nearest arm
    away = np.abs(offset)
    if rng.random() < 0.6:
        # the straight edge from the tip (1, 0) to the waist point, as a line a x + b y = c in the arm's own axes
        a, b = waist * np.sin(sector), 1 - waist * np.cos(sector)
        reach = np.float32(a) / (np.float32(a) * np.cos(away) + np.float32(b) * np.sin(away))
        slope, tilt = np.sign(offset), angle - offset
        lean = np.arctan2(np.float32(b), np.float32(a)) * slope
        flat = np.stack((np.cos(tilt + lean), np.sin(tilt + lean)))
        normal = np.concatenate((flat * 0.62, np.full_like(x[None], 0.78)))
    else:
        reach = np.float32(waist) + np.float32(1 - waist) * np.abs(np.cos(offset * np.float32(arms / 2))) ** 0.8
        bend = np.sin(radius / reach * 3.0) * 0.55
        normal = np.stack((np.cos(angle) * -bend, np.sin(angle) * -bend, np.full_like(x, 0.8)))
        normal[:2] += np.stack((-np.sin(angle), np.cos(angle))) * (offset / sector * 0.45)
    normal /= np.sqrt((normal * normal).sum(axis=0))
    share, kind = radius / reach, rng.integers(4)
    accent: Flags | None = None
    if kind == 0:
        tone, accent = share, radius < waist * rng.uniform(0.4, 0.75)
    elif kind == 1:
        tone = wave(share * rng.uniform(1.2, 2.6), 0.5)
    elif kind == 2:
        tone = 0.9 * lookup(grain, x * 0.35, y * 0.35)
    else:
        tone = (away < sector * rng.uniform(0.15, 0.4)).astype(np.float32)
        accent = share > rng.uniform(0.86, 0.93)
    return Surface(radius <= reach, normal, np.clip(tone, 0, 1), accent, rng.uniform(0.0, 0.6))


SHAPES: dict[str, Shape] = {"ball": ball, "fruit": fruit, "box": box, "can": can, "ring": ring, "star": star}
