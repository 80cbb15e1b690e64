"""Confidence, class peaks and the threshold that follows them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysemi.ops.pseudo_label import (
    class_peaks,
    confidence_and_label,
    image_confidence,
    peaks_by_class,
    update_threshold,
)


def make(seed, images=3, classes=5, height=6, width=7):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, height, width, generator=g) * 3
    return logits, torch.rand(images, height, width, generator=g) < 0.6


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, 1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def peaks_oracle(logits, valid):
    p = softmax(logits)
    label, confidence = p.argmax(1), p.max(1)
    chosen = [confidence[(label == k) & valid] for k in range(p.shape[1])]
    return np.array([c.max() if c.size else 0.0 for c in chosen])


def test_confidence_is_the_largest_probability():
    logits, _ = make(0)
    confidence, label = confidence_and_label(logits.requires_grad_())
    p = softmax(logits.detach().numpy())
    np.testing.assert_allclose(confidence.numpy(), p.max(1), rtol=1e-6)
    np.testing.assert_array_equal(label.numpy(), p.argmax(1))
    assert confidence.dtype == torch.float32
    assert label.dtype == torch.int64
    assert not confidence.requires_grad


def test_confidence_of_large_and_of_equal_logits():
    confidence, label = confidence_and_label(torch.tensor([1e4, 1e4 + 1.0, -1e4]).view(1, 3, 1, 1))
    assert confidence.item() == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-6)
    assert label.item() == 1
    confidence, label = confidence_and_label(torch.zeros(1, 4, 1, 1))
    assert (confidence.item(), label.item()) == (0.25, 0)


def test_half_logits_give_float32_confidence():
    logits = make(1)[0].bfloat16()
    confidence, _ = confidence_and_label(logits)
    np.testing.assert_allclose(confidence.numpy(), softmax(logits.float().numpy()).max(1), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_peaks_equal_the_oracle(seed):
    logits, valid = make(seed)
    valid[0] = False
    logits[:, 4] = -50.0  # a class that no pixel has
    np.testing.assert_allclose(
        class_peaks(logits, valid).numpy(), peaks_oracle(logits.numpy(), valid.numpy()), rtol=1e-6
    )
    assert torch.equal(peaks_by_class(*confidence_and_label(logits), valid, 5), class_peaks(logits, valid))


def test_the_largest_over_shards_is_the_largest():
    logits, valid = make(6)
    shards = torch.stack([class_peaks(logits[i : i + 1], valid[i : i + 1]) for i in range(3)])
    assert torch.equal(shards.amax(0), class_peaks(logits, valid))
    assert torch.equal(class_peaks(logits[:0], valid[:0]), torch.zeros(5))


def test_worked_threshold():
    # rank 0 has peaks .9 of class 0 and .7 of class 2, rank 1 .8 of class 0: their mean is .8
    peaks = torch.maximum(torch.tensor([0.9, 0.0, 0.7]), torch.tensor([0.8, 0.0, 0.0]))
    moved = update_threshold(torch.tensor(0.85), peaks)
    assert moved.item() == pytest.approx(0.84995, abs=3e-8)
    assert moved.dtype == torch.float32
    assert torch.equal(update_threshold(0.85, peaks), moved)


def test_all_padded_leaves_the_threshold():
    logits, valid = make(7)
    threshold = torch.tensor(0.123456789)
    assert torch.equal(update_threshold(threshold, class_peaks(logits, torch.zeros_like(valid))), threshold)


def test_threshold_stays_in_range_and_moves_slowly():
    threshold = torch.tensor(0.85)
    g = torch.Generator().manual_seed(8)
    for _ in range(100):
        moved = update_threshold(threshold, torch.rand(6, generator=g), momentum=0.9)
        assert 0.0 < moved <= 1.0
        assert abs(moved - threshold) <= 0.1 + 1e-7
        threshold = moved
    assert update_threshold(torch.tensor(1.0), torch.ones(81), momentum=0.999).item() == 1.0


def test_no_host_wait():
    logits, valid = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 4, 5, device="meta", dtype=torch.bool)
    threshold = torch.empty((), device="meta")  # a meta tensor has nothing to read
    assert update_threshold(threshold, class_peaks(logits, valid)).shape == ()


def test_the_worked_confidence_of_an_image():
    """augseg.md section 3.2: (.9, .05, .05) gives .57690, (.4, .3, .3) gives .00354; mean .29022."""
    logits = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [0.1, 0.2, 0.7]]).log().T[None, :, None]  # one row of 3
    valid = torch.tensor([[[True, True, False]]])
    assert image_confidence(logits[..., :1], valid[..., :1]).item() == pytest.approx(0.57690, abs=1e-5)
    assert image_confidence(logits[..., 1:2], valid[..., 1:2]).item() == pytest.approx(0.00354, abs=1e-5)
    assert image_confidence(logits, valid).item() == pytest.approx(0.29022, abs=1e-5)
    assert image_confidence(logits, torch.zeros_like(valid)).item() == 0.0


def test_the_confidence_of_images_is_the_mean_over_their_valid_pixels():
    logits, valid = make(4)
    p = softmax(logits.numpy())
    sure = (1 + (p * np.log(p)).sum(1) / np.log(5)) * p.max(1)
    expected = [one[mask].mean() for one, mask in zip(sure, valid.numpy(), strict=True)]
    np.testing.assert_allclose(image_confidence(logits.requires_grad_(), valid).numpy(), expected, rtol=1e-5)
    assert image_confidence(1e4 * logits, valid).tolist() == [1.0] * 3
    assert image_confidence(0 * logits, valid).max() < 1e-6
    assert not image_confidence(logits, valid).requires_grad
