"""Each operation against PIL itself, to the bit; the draws against the published ranges."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from raysemi.ops import intensity
from raysemi.ops.intensity import OPERATIONS

VIEWS = SimpleNamespace(operations=3, operations_vary=True)
NUMBERS = (0.0, 0.013, 0.25, 0.3, 0.501, 0.72, 0.9, 0.9999)
"""Uniform numbers that strengths are made of."""


def pil_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    moved = ((np.asarray(hue).astype(int) + int(shift)) % 256).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


PIL = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "blur": lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "colour": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "hue": pil_hue,
}


def pictures() -> list[np.ndarray]:
    """Noise, narrow noise, one value, nearly one value, a smooth picture, all pairs of red and green, a grey ramp."""
    rng = np.random.Generator(np.random.Philox(key=4))
    noise = rng.integers(0, 256, (61, 47, 3))
    even = np.full((9, 11, 3), 77)
    spotted = even.copy()
    spotted[3, 5] = (0, 200, 78)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)).resize((120, 90))
    red, green = np.meshgrid(np.arange(256), np.arange(256))
    pairs = np.stack((red, green, np.full_like(red, 90)), axis=-1)
    ramp = np.repeat(np.arange(256)[None, :, None], 3, axis=2)
    made = [noise, rng.integers(100, 140, (50, 67, 3)), even, spotted, np.asarray(smooth), pairs, ramp]
    return [one.astype(np.uint8) for one in made]


def tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_an_operation_is_pils_to_the_bit(operation):
    changed = 0
    for picture in pictures():
        for number in NUMBERS:
            strength = float(np.float32(operation.strength(number)))  # as it travels
            expected = np.asarray(PIL[operation.name](Image.fromarray(picture), strength))
            ours = operation.act(tensor(picture), strength)
            assert ours.dtype == torch.uint8
            np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), expected)
            changed += int((expected != picture).sum())
    assert (changed > 0) == (operation.name != "identity")


def test_any_blur_is_pils():
    picture = pictures()[0]
    for sigma in np.linspace(0.1, 4.0, 79, dtype=np.float32).tolist():
        expected = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))
        ours = intensity._blur(tensor(picture), sigma)
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), expected)


def test_autocontrast_of_every_width_is_pils():
    """A reciprocal in place of a division already shows at some widths."""
    act = {operation.name: operation.act for operation in OPERATIONS}["autocontrast"]
    for width in range(1, 256):
        ramps = [np.arange(low, low + width + 1) for low in (0, (255 - width) // 2, 255 - width)]
        picture = np.stack(ramps, axis=-1)[None].astype(np.uint8)
        expected = np.asarray(ImageOps.autocontrast(Image.fromarray(picture)))
        np.testing.assert_array_equal(act(tensor(picture), 0.0).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3)])
def test_tiny_images(shape):
    picture = pictures()[0][: shape[0], : shape[1]]
    for operation in OPERATIONS:
        strength = float(np.float32(operation.strength(0.6)))
        expected = np.asarray(PIL[operation.name](Image.fromarray(picture), strength))
        np.testing.assert_array_equal(operation.act(tensor(picture), strength).permute(1, 2, 0).numpy(), expected)


def test_each_image_gets_its_own_operations_in_their_order():
    names = {operation.name: index for index, operation in enumerate(OPERATIONS)}
    plans = [
        [("solarize", 100), ("brightness", 0.5)],
        [("brightness", 0.5), ("solarize", 100)],  # the other order is another view
        [("blur", 1.5), ("hue", -60), ("equalize", 0)],
        [],
        [("posterize", 4), ("posterize", 4), ("autocontrast", 0), ("colour", 0.25)],
    ]
    picture = pictures()[4]
    parameters = torch.zeros(len(plans), len(intensity.PARAMETERS))
    for row, plan in zip(parameters, plans, strict=True):
        for place, (name, strength) in enumerate(plan):
            row[2 * place : 2 * place + 2] = torch.tensor([names[name], strength])
    images = tensor(picture).expand(len(plans), -1, -1, -1)
    for plan, ours in zip(plans, intensity.apply(images, parameters), strict=True):
        image = Image.fromarray(picture)
        for name, strength in plan:
            image = PIL[name](image, strength)
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(image))
    assert not np.array_equal(*intensity.apply(images, parameters)[:2].numpy())


def test_an_empty_batch():
    assert intensity.apply(torch.zeros(0, 3, 5, 7, dtype=torch.uint8), torch.zeros(0, 8)).shape == (0, 3, 5, 7)


def test_no_host_wait():
    for operation in OPERATIONS:  # a meta tensor has nothing to read
        made = operation.act(torch.empty(3, 13, 17, dtype=torch.uint8, device="meta"), operation.strength(0.6))
        assert (made.shape, made.dtype) == ((3, 13, 17), torch.uint8)


def drawn(count: int, views: SimpleNamespace = VIEWS) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=7))
    return np.stack([intensity.draw(rng, views) for _ in range(count)])


def numbers(rows: np.ndarray) -> np.ndarray:
    """Least number of operations that each row can stand for: an identity at the end does not show."""
    acts = rows[:, ::2] != 0
    return np.where(acts.any(axis=1), acts.shape[1] - acts[:, ::-1].argmax(axis=1), 0)


def test_the_number_of_operations_is_uniform():
    """Of 3 places the third is used with probability 1/3, the second with 2/3, each by a non-identity in 10 of 11."""
    rows = drawn(100_000)
    for place, share in enumerate((1.0, 2 / 3, 1 / 3, 0.0)):
        assert abs((rows[:, 2 * place] != 0).mean() - share * 10 / 11) < 0.005
    always = drawn(2_000, SimpleNamespace(operations=4, operations_vary=False))
    assert ((always[:, ::2] != 0).mean(axis=0) > 0.88).all()
    assert numbers(drawn(500, SimpleNamespace(operations=1, operations_vary=True))).max() == 1


def test_operations_are_drawn_with_replacement_and_alike():
    rows = drawn(100_000)
    counts = Counter(rows[:, 0].astype(int).tolist())
    assert sorted(counts) == list(range(11))
    assert max(abs(count / 100_000 - 1 / 11) for count in counts.values()) < 0.004
    used = rows[rows[:, 2] != 0]
    assert abs((used[:, 0] == used[:, 2]).mean() - 1 / 11) < 0.006


def test_strengths_have_the_published_ranges():
    rows = drawn(100_000)
    of = {operation.name: rows[:, 1][rows[:, 0] == index] for index, operation in enumerate(OPERATIONS)}
    for name in ("identity", "autocontrast", "equalize"):
        assert not of[name].any()
    for name in ("contrast", "brightness", "colour", "sharpness"):  # always a reduction
        assert 0.05 < of[name].min() < 0.052
        assert 0.948 < of[name].max() <= 0.95
        assert abs(of[name].mean() - 0.5) < 0.01
    assert np.float32(0.1) <= of["blur"].min() < 0.105
    assert 1.995 < of["blur"].max() <= 2.0
    assert abs(of["blur"].mean() - 1.05) < 0.02
    bits = Counter(of["posterize"].astype(int).tolist())
    assert sorted(bits) == [4, 5, 6, 7]
    assert max(abs(count / len(of["posterize"]) - 0.25) for count in bits.values()) < 0.02
    assert (of["solarize"].min(), of["solarize"].max()) == (1, 255)
    assert abs(of["solarize"].mean() - 128) < 3
    assert (of["hue"].min(), of["hue"].max()) == (-127, 127)
    assert abs(of["hue"].mean()) < 3
    assert abs(np.abs(of["hue"]).mean() - 63.25) < 2


def test_the_ends_of_the_uniform_numbers():
    strength = {operation.name: operation.strength for operation in OPERATIONS}
    last = 1.0 - 2.0**-53  # the largest number that a generator of doubles draws
    assert (strength["posterize"](0.0), strength["posterize"](last)) == (7, 4)
    assert (strength["solarize"](0.0), strength["solarize"](last)) == (255, 1)
    assert (strength["hue"](0.0), strength["hue"](0.5), strength["hue"](last)) == (-127, 0, 127)
    assert strength["contrast"](0.0) == 0.95
    assert strength["contrast"](last) > 0.05 - 1e-12


def test_a_setting_does_not_shift_another_draw():
    plain, more = drawn(50), drawn(50, SimpleNamespace(operations=4, operations_vary=False))
    acts = plain != 0
    assert np.array_equal(plain[acts], more[acts])
