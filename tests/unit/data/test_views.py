import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from raysemi.data import views
from raysemi.data.types import HostBatch
from raysemi.data.views import Geometry, ViewsConfig
from raysemi.ops import intensity, photometric

CONFIG = ViewsConfig()


def rng(key: int = 1) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.Generator(np.random.Philox(key=3)).integers(0, 256, (height // 5 + 1, width // 5 + 1, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def geometries(height: int, width: int, crop: int, count: int) -> list[Geometry]:
    source = rng(height * width)
    return [views.draw_geometry(source, CONFIG, height, width, crop) for _ in range(count)]


def whole(image: Image.Image, geometry: Geometry, how: Image.Resampling, fill: int) -> np.ndarray:
    """The plain way: resize all, pad, crop, flip."""
    resized = np.asarray(image.resize((geometry.resized_width, geometry.resized_height), how))
    side = geometry.crop
    padded = np.full((max(resized.shape[0], side), max(resized.shape[1], side), *resized.shape[2:]), fill, np.uint8)
    padded[: resized.shape[0], : resized.shape[1]] = resized
    view = padded[geometry.top : geometry.top + side, geometry.left : geometry.left + side]
    return view[:, ::-1] if geometry.flip else view


def test_the_region_alone_equals_resizing_the_whole_image():
    image = picture(75, 101)
    for geometry in geometries(75, 101, 64, 60):
        ours = views.weak_view(image, geometry)
        plain = whole(image, geometry, Image.Resampling.BILINEAR, 0)
        assert np.abs(ours.astype(int) - plain).max() <= 1  # the borders of the region have single precision in Pillow


def test_labels_take_the_pixel_that_the_image_shows():
    height, width, crop = 75, 101, 64
    number = np.arange(height * width).reshape(height, width)
    low, high = (number % 251).astype(np.uint8), (number // 251).astype(np.uint8)
    for geometry in geometries(height, width, crop, 60):
        valid = views.valid_view(geometry)
        source = views.label_view(low, geometry) + 251 * views.label_view(high, geometry).astype(int)
        unflipped = (source[:, ::-1], valid[:, ::-1]) if geometry.flip else (source, valid)
        for y, x in np.argwhere(unflipped[1])[::97]:
            # centre of the resized pixel, in source coordinates
            down = (geometry.top + y + 0.5) * height / geometry.resized_height
            across = (geometry.left + x + 0.5) * width / geometry.resized_width
            row, column = divmod(int(unflipped[0][y, x]), width)
            assert row - 1e-6 <= down <= row + 1 + 1e-6
            assert column - 1e-6 <= across <= column + 1 + 1e-6
        plain = whole(Image.fromarray(low), geometry, Image.Resampling.NEAREST, 255)
        assert np.mean(plain != views.label_view(low, geometry)) < 0.02  # Pillow adds up steps: ties may differ


def test_image_and_label_show_the_same_edge():
    mask = np.zeros((90, 120), dtype=np.uint8)
    mask[30:70, 50:95] = 1
    image = Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2))
    for geometry in geometries(90, 120, 48, 40):
        shown, label, valid = (
            views.weak_view(image, geometry)[..., 0], views.label_view(mask, geometry), views.valid_view(geometry),
        )  # fmt: skip
        clear = valid & ((shown == 0) | (shown == 255))
        assert np.array_equal(shown[clear] == 255, label[clear] == 1)
        assert (label[~valid] == 255).all()


def test_padding_lies_right_and_below_and_flips_with_the_image():
    image = Image.new("RGB", (200, 150), (7, 8, 9))
    mask = np.ones((150, 200), dtype=np.uint8)
    seen = set()
    for geometry in geometries(150, 200, 321, 40):
        seen.add(geometry.flip)
        height, width = min(geometry.resized_height, 321), min(geometry.resized_width, 321)
        valid = np.zeros((321, 321), dtype=bool)
        valid[:height, 321 - width if geometry.flip else 0 : 321 if geometry.flip else width] = True
        assert np.array_equal(views.valid_view(geometry), valid)
        view = views.weak_view(image, geometry)
        assert (view[~valid] == 0).all()
        assert (view[valid] == np.array([7, 8, 9])).all()
        assert np.array_equal(views.label_view(mask, geometry), np.where(valid, 1, 255))
    assert seen == {True, False}


def test_views_made_in_used_memory_are_the_same():
    image, mask = picture(75, 101), np.arange(75 * 101, dtype=np.uint8).reshape(75, 101)
    used = np.full((64, 64, 3), 77, np.uint8), np.full((64, 64), 78, np.uint8), np.full((64, 64), True)
    for geometry in geometries(75, 101, 64, 40):
        views.weak_view(image, geometry, used[0])
        views.label_view(mask, geometry, used[1])
        views.valid_view(geometry, used[2])
        fresh = views.weak_view(image, geometry), views.label_view(mask, geometry), views.valid_view(geometry)
        assert all(map(np.array_equal, used, fresh))


def test_resize_is_uniform_in_the_longer_side():
    drawn = geometries(375, 500, 321, 10_000)
    longs = np.array([geometry.resized_width for geometry in drawn])
    assert (longs.min(), longs.max()) == (250, 1000)
    assert abs(longs.mean() - 625) < 10
    assert all(geometry.resized_height == int(375 * geometry.resized_width / 500 + 0.5) for geometry in drawn)
    tops = [g.top for g in drawn if g.resized_height == 400]
    assert all(0 <= g.top <= max(g.resized_height - 321, 0) for g in drawn)
    assert tops == [] or max(tops) <= 79
    assert abs(np.mean([geometry.flip for geometry in drawn]) - 0.5) < 0.02


def test_every_corner_can_be_drawn_and_small_images_do_not_vanish():
    drawn = [
        views.draw_geometry(source, ViewsConfig(scale=(1, 1)), 10, 12, 8) for source in [rng(9)] for _ in range(400)
    ]
    assert {(g.top, g.left) for g in drawn} == {(y, x) for y in range(3) for x in range(5)}
    tiny = [views.draw_geometry(rng(i), CONFIG, 1, 60, 16) for i in range(50)]
    assert min(g.resized_height for g in tiny) == 1
    assert views.weak_view(Image.new("RGB", (60, 1), (9, 9, 9)), tiny[0]).max() == 9


def test_cutmix_boxes_have_the_published_shape():
    side, source = 321, rng(5)
    boxes = np.array([views.draw_box(source, CONFIG, side) for _ in range(10_000)])
    left, top, right, bottom = boxes.T
    empty = (boxes == 0).all(axis=1)
    assert abs(empty.mean() - 0.5) < 0.02
    width, height = (right - left)[~empty], (bottom - top)[~empty]
    share = width * height / side**2
    assert abs(share.mean() - 0.208) < 0.006
    assert share.min() > 0.018
    assert share.max() <= 0.4
    ratio = height / width
    assert ratio.min() > 0.29
    assert ratio.max() < 3.5
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= side


def test_draws_depend_on_seed_pass_key_and_purpose():
    def first(*args):
        return views.generator(*args).random()

    base = (0, 1, "a/b", "geometry")
    assert first(*base) == first(*base)
    others = [
        (1, 1, "a/b", "geometry"),
        (0, 2, "a/b", "geometry"),
        (0, 1, "a/c", "geometry"),
        (0, 1, "a/b", "cutmix 0"),
    ]
    assert len({first(*args) for args in [base, *others]}) == 5
    assert first(1, 11, "x", "n") != first(11, 1, "x", "n")


def test_draws_are_those_of_philox_under_the_digest():
    for seed in range(20):
        key = int.from_bytes(hashlib.blake2b(f"{seed}/2/n/a/b".encode(), digest_size=16).digest(), "little")
        expected, source = rng(key), views.generator(seed, 2, "a/b", "n")
        assert np.array_equal(source.random(9), expected.random(9))
        assert np.array_equal(source.integers(0, 99, 7), expected.integers(0, 99, 7))


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (2.0, 0.5)},
        {"scale": (0, 1)},
        {"blur_sigma": (0.1, 9)},
        {"cutmix_area": (0.1, 0.95)},
        {"zoom": 1},
        {"strong": "weak"},
        {"operations": 5},
        {"operations": 0},
    ],
)
def test_ranges_are_checked(wrong):
    with pytest.raises(ValidationError):
        ViewsConfig(**wrong)


def host(num_views: int, second: bool = True, unlabeled: int = 3, strong: str = "jitter") -> HostBatch:
    source = rng(2)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.from_numpy(source.integers(0, 256, shape).astype(np.uint8))

    family = views.FAMILIES[strong]
    parameters = [[family.draw(source, CONFIG) for _ in range(unlabeled)] for _ in range(num_views + 1)]
    shape = num_views + 1, unlabeled, len(family.PARAMETERS)
    drawn = torch.from_numpy(np.array(parameters, dtype=np.float32).reshape(shape))
    return HostBatch(
        step=4,
        image_L3HW=pixels(2, 3, 9, 11),
        label_LHW=pixels(2, 9, 11),
        slots_L=torch.arange(2),
        keys_L=("a", "b"),
        weak_U3HW=pixels(unlabeled, 3, 9, 11),
        valid_UHW=pixels(unlabeled, 9, 11) > 9,
        slots_U=torch.arange(unlabeled),
        keys_U=("c",) * unlabeled,
        boxes_VU4=torch.ones((num_views, unlabeled, 4), dtype=torch.int64),
        photometric_VUP=drawn[:num_views],
        second_weak_U3HW=pixels(unlabeled, 3, 9, 11) if second else None,
        second_valid_UHW=pixels(unlabeled, 9, 11) > 9 if second else None,
        second_photometric_UP=drawn[num_views] if second else None,
        strong=strong,
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_device_makes_the_strong_views(layout):
    given = host(2)
    batch = views.on_device(given, torch.device("cpu"), layout)
    assert torch.equal(batch.weak_U3HW, given.weak_U3HW.float() / 255)
    assert torch.equal(batch.label_LHW, given.label_LHW.long())
    assert batch.strong_VU3HW.shape == (2, 3, 3, 9, 11)
    assert batch.second_weak_U3HW is not None
    for strong, weak, parameters in [
        (batch.strong_VU3HW[0], batch.weak_U3HW, given.photometric_VUP[0]),
        (batch.strong_VU3HW[1], batch.weak_U3HW, given.photometric_VUP[1]),
        (batch.second_strong_U3HW, batch.second_weak_U3HW, given.second_photometric_UP),
    ]:
        torch.testing.assert_close(strong, photometric.apply(weak, parameters), atol=1e-6, rtol=0)
        assert strong.is_contiguous(memory_format=layout)
    assert batch.weak_U3HW.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_device_makes_the_views_of_random_intensity(layout):
    given = host(2, strong="intensity")
    batch = views.on_device(given, torch.device("cpu"), layout)
    assert batch.second_weak_U3HW is not None
    for strong, weak, parameters in [
        (batch.strong_VU3HW[0], given.weak_U3HW, given.photometric_VUP[0]),
        (batch.strong_VU3HW[1], given.weak_U3HW, given.photometric_VUP[1]),
        (batch.second_strong_U3HW, given.second_weak_U3HW, given.second_photometric_UP),
    ]:
        assert torch.equal(strong, intensity.apply(weak, parameters).float() / 255)
        assert strong.is_contiguous(memory_format=layout)
    assert not torch.equal(batch.strong_VU3HW[0], batch.strong_VU3HW[1])
    identity = dataclasses.replace(given, photometric_VUP=torch.zeros_like(given.photometric_VUP))
    batch = views.on_device(identity, torch.device("cpu"), layout)
    assert torch.equal(batch.strong_VU3HW[0], batch.weak_U3HW)


def test_without_colour_strong_equals_weak():
    given = host(1, second=False)
    given.photometric_VUP[:] = torch.tensor([1.0, 1, 1, 0, 0, 1, 2, 3, 0, 0])
    batch = views.on_device(given, torch.device("cpu"), torch.contiguous_format)
    assert torch.equal(batch.strong_VU3HW[0], batch.weak_U3HW)
    assert batch.second_weak_U3HW is None


def test_no_unlabeled_images_and_no_views():
    for strong in views.FAMILIES:
        batch = views.on_device(host(2, unlabeled=0, strong=strong), torch.device("cpu"), torch.channels_last)
        assert batch.strong_VU3HW.shape == (2, 0, 3, 9, 11)
    assert views.on_device(host(0), torch.device("cpu"), torch.channels_last).strong_VU3HW.shape == (0, 3, 3, 9, 11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_to_paste_from_come_to_the_device(layout):
    plain = host(1)
    assert views.on_device(plain, torch.device("cpu"), layout).given_L3HW is None
    given = dataclasses.replace(plain, given_L3HW=plain.image_L3HW.flip(0), given_label_LHW=plain.label_LHW.flip(0))
    batch = views.on_device(given, torch.device("cpu"), layout)
    assert torch.equal(batch.given_L3HW, batch.image_L3HW.flip(0))
    assert torch.equal(batch.given_label_LHW, batch.label_LHW.flip(0))
    assert batch.given_L3HW.is_contiguous(memory_format=layout)


def test_half_of_what_is_pasted_is_larger_than_its_image():
    sides = [views.draw_any_size(rng(seed), CONFIG, 100, 70, 33).resized_height / 100 for seed in range(2000)]
    assert min(sides) >= 0.1
    assert max(sides) <= 2.0
    assert np.mean([side > 1 for side in sides]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([side < 0.55 for side in sides]) == pytest.approx(0.25, abs=0.03)
