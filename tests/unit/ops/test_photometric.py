from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from scipy import ndimage

from raysemi.ops import photometric

VIEWS = SimpleNamespace(
    jitter=0.8, brightness=0.5, contrast=0.5, saturation=0.4, hue=0.25, greyscale=0.2, blur=0.5, blur_sigma=(0.1, 2.0)
)
OFF = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0]
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def images(batch: int = 5) -> torch.Tensor:
    noise = torch.rand(batch, 3, 13, 17, generator=torch.Generator().manual_seed(0))
    noise[0, :, :4] = 0.5  # grey, black and white: where hue has no meaning
    noise[0, :, 4:6], noise[0, :, 6:8] = 0.0, 1.0
    return noise


def drawn(count: int, views: SimpleNamespace = VIEWS) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=7))
    return np.stack([photometric.draw(rng, views) for _ in range(count)])


def test_each_image_gets_its_own_operations_in_its_own_order_as_torchvision_does():
    before = images(24)
    parameters = torch.from_numpy(drawn(24, SimpleNamespace(**{**vars(VIEWS), "jitter": 1.0, "blur": 0.0})))
    assert len({tuple(row[4:8].tolist()) for row in parameters}) > 10
    assert 0 < parameters[:, 8].sum() < 24
    after = photometric.apply(before, parameters)
    for image, row, ours in zip(before, parameters.tolist(), after, strict=True):
        for operation in map(int, row[4:8]):
            image = ADJUST[operation](image, row[operation])
        if row[8]:
            image = tv.rgb_to_grayscale(image, num_output_channels=3)
        torch.testing.assert_close(ours, image, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("column", "value"), [(0, 1.4), (1, 0.6), (1, 1.5), (2, 0.3), (2, 1.5), (3, 0.25), (3, -0.2)])
def test_one_operation_alone(column, value):
    parameters = torch.tensor([OFF] * 5)
    parameters[:, column] = value
    expected = ADJUST[column](images(), value)
    torch.testing.assert_close(photometric.apply(images(), parameters), expected, atol=1e-4, rtol=0)


def test_blur_is_a_gaussian_with_repeated_borders():
    parameters = torch.tensor([OFF] * 5)
    parameters[:, 9] = torch.tensor([0.0, 0.1, 0.7, 1.3, 2.0])
    after = photometric.apply(images(), parameters)
    for image, sigma, ours in zip(images(), parameters[:, 9].tolist(), after, strict=True):
        expected = image.numpy()
        if sigma:
            expected = ndimage.gaussian_filter(expected, (0, sigma, sigma), mode="nearest", truncate=4.0)
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_what_is_off_changes_no_bit_beside_an_image_that_is_changed():
    parameters = torch.from_numpy(np.concatenate([drawn(4), [OFF]]).astype(np.float32))
    after = photometric.apply(images(), parameters)
    assert torch.equal(after[4], images()[4])
    assert not torch.equal(after[:4], images()[:4])
    alone = torch.cat([photometric.apply(images()[i : i + 1], parameters[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(after, alone, atol=1e-6, rtol=0)


def test_layout_range_and_empty_batch():
    parameters = torch.from_numpy(drawn(5))
    after = photometric.apply(images().contiguous(memory_format=torch.channels_last), parameters)
    torch.testing.assert_close(after, photometric.apply(images(), parameters), atol=1e-6, rtol=0)
    assert after.min() >= 0
    assert after.max() <= 1 + 1e-6
    assert photometric.apply(images()[:0], parameters[:0]).shape == (0, 3, 13, 17)


def test_draws_have_the_published_frequencies_and_ranges():
    rows = drawn(4000)
    column = {name: rows[:, i] for i, name in enumerate(photometric.PARAMETERS)}
    jittered = column["hue"] != 0
    assert abs(jittered.mean() - 0.8) < 0.02
    assert abs((column["sigma"] > 0).mean() - 0.5) < 0.025
    assert abs(column["greyscale"].mean() - 0.2) < 0.02
    for name, low, high in [("brightness", 0.5, 1.5), ("saturation", 0.6, 1.4), ("hue", -0.25, 0.25)]:
        values = column[name][jittered]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
    orders, counts = np.unique(rows[jittered, 4:8], axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 0.6 * counts.mean()
    assert np.array_equal(rows[~jittered][:, :8], np.tile(np.float32(OFF[:8]), (int((~jittered).sum()), 1)))


def test_a_setting_does_not_shift_another_draw():
    plain = drawn(50)
    other = drawn(50, SimpleNamespace(**{**vars(VIEWS), "jitter": 0.0, "greyscale": 1.0}))
    assert np.array_equal(plain[:, 9], other[:, 9])
