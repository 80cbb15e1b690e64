"""Region propagation: every implementation gives the bits of the literal sequential rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysemi.errors import ConfigError
from raysemi.ops.regions import propagate_regions

CHAIN = "0000111000"  # the labels of the worked examples, all trusted
A, B, C = range(5), range(3, 7), range(2, 6)
IMPLS = ("oracle", "loop", "bitplane", "auto")


def literal(labels, trusted, shapes, threshold):
    """The rule as written, one image, in Python numbers and fp32 ratios."""
    labels, expanded, threshold = list(labels), list(trusted), np.float32(threshold)
    for shape in shapes:
        covered = [p for p in range(len(labels)) if shape[p]]
        counted = [p for p in covered if trusted[p]]
        if not counted or np.float32(len(counted)) / np.float32(len(covered)) < threshold:
            continue
        seen = [labels[p] for p in counted]
        top = max(sorted(set(seen)), key=seen.count)  # max keeps the first, the smallest class
        if np.float32(seen.count(top)) / np.float32(len(counted)) > threshold:
            for p in covered:
                labels[p], expanded[p] = top, True
    return labels, expanded


def line(*segments, threshold=0.7, impl="oracle", untrusted=()):
    """The worked line of ten pixels after these segments, as text, and its trusted pixels."""
    labels = torch.tensor([int(c) for c in CHAIN]).view(1, 2, 5)
    trusted = torch.tensor([p not in untrusted for p in range(10)]).view(1, 2, 5)
    shapes = torch.tensor([[p in segment for p in range(10)] for segment in segments]).view(1, -1, 2, 5)
    labels, trusted = propagate_regions(labels, trusted, shapes, threshold, impl)
    return "".join(map(str, labels.flatten().tolist())), trusted.flatten().tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_order_example(impl):
    assert line(A, B, impl=impl)[0] == "0000011000"  # B then sees 0 0 1 1 and is refused
    assert line(B, A, impl=impl)[0] == "0001111000"  # A then sees 0 0 0 1 1 and is refused


@pytest.mark.parametrize("impl", IMPLS)
def test_enabling_chain(impl):
    assert line(A, C, impl=impl)[0] == "0000001000"  # A raises C from 0.5 to 0.75
    assert line(C, A, impl=impl)[0] == "0000011000"  # C alone is refused


@pytest.mark.parametrize("impl", IMPLS)
def test_ratio_tests_at_equality(impl):
    # 3 of 4 trusted at threshold 0.75: the first test keeps; 3 of 4 of one class: the second refuses
    labels, trusted = line(range(4), threshold=0.75, impl=impl, untrusted=(0,))
    assert labels == CHAIN
    assert trusted == [True] * 10
    assert line(range(4), threshold=0.7501, impl=impl, untrusted=(0,))[1][0] is False
    assert line(range(1, 5), threshold=0.75, impl=impl)[0] == CHAIN
    assert line(range(1, 5), threshold=0.7499, impl=impl)[0] == "0000011000"


@pytest.mark.parametrize("impl", IMPLS)
def test_ratios_are_compared_in_fp32(impl):
    # the nearest fp32 to 2/3 lies above it: 2 of 3 equals the threshold only when the quotient is rounded as well
    assert line((0, 1, 2), threshold=2 / 3, impl=impl, untrusted=(2,))[1] == [True] * 10
    assert line((2, 3, 4), threshold=2 / 3, impl=impl)[0] == CHAIN


@pytest.mark.parametrize("impl", ["oracle", "loop", "auto"])
def test_ties_go_to_the_smallest_class(impl):
    assert line(range(2, 6), threshold=0.4, impl=impl)[0] == "0000001000"


@pytest.mark.parametrize("impl", IMPLS)
def test_trust_gained_on_the_way_is_not_counted(impl):
    # the first segment makes pixel 4 trusted; the second still sees 2 of its 3 pixels trusted, less than 0.7
    assert line((0, 1, 2, 3, 4), (3, 4, 9), impl=impl, untrusted=(4,))[1] == [True] * 10
    assert line((0, 1, 2, 3, 4), (4, 8, 7), impl=impl, untrusted=(4, 8))[1][8] is False


def case(seed):
    """One random case: labels, trusted, shapes, threshold; every fifth has a threshold that is hit exactly."""
    rng = np.random.default_rng(seed)
    images, height, width = rng.integers(1, 4), rng.integers(1, 12), rng.integers(1, 18)
    num_segments = rng.integers(0, 9)
    num_classes = [1, 2, 3, 7, 21, 254][seed % 6]
    # two areas of a class each under some noise, or no segment would ever be accepted
    left, right = rng.integers(0, num_classes, (2, images, 1, 1))
    base = np.where(np.arange(width) < rng.integers(0, width + 1), left, right)
    other = rng.integers(0, num_classes, (images, height, width))
    labels = np.where(rng.random((images, height, width)) < rng.choice([0.5, 0.8, 0.97]), base, other)
    trusted = rng.random((images, height, width)) < rng.choice([0.5, 0.9, 1.0])
    if seed % 11 == 0:
        trusted[0] = False  # all padded
    shapes = rng.random((images, num_segments, height, width)) < rng.choice([0.05, 0.4, 0.9])
    start, stop = np.sort(rng.integers(0, width + 1, (2, images, num_segments, 1, 1)), axis=0)
    shapes &= (np.arange(width) >= start) & (np.arange(width) < stop)
    if num_segments > 2:
        shapes[:, 1] = False  # empty
        shapes[:, 2] = shapes[:, 0]  # duplicate
    threshold = rng.choice([0.5, 2 / 3, 0.75, 0.8]) if seed % 5 == 0 else rng.uniform(0.34, 0.95)
    return labels, trusted, shapes, float(threshold)


def test_random_cases_equal_the_literal_rule():
    changed, relabelled_later = 0, 0
    for seed in range(500):
        labels, trusted, shapes, threshold = case(seed)
        size = labels[0].size
        expected = [
            literal(y.reshape(size).tolist(), f.reshape(size).tolist(), r.reshape(-1, size), threshold)
            for y, f, r in zip(labels, trusted, shapes, strict=True)
        ]
        expected_labels = np.array([y for y, _ in expected]).reshape(labels.shape)
        expected_trusted = np.array([f for _, f in expected]).reshape(labels.shape)
        tensors = torch.from_numpy(labels), torch.from_numpy(trusted), torch.from_numpy(shapes)
        for impl in IMPLS:
            if impl == "bitplane" and np.float32(threshold) < 0.5:
                continue
            limit = torch.tensor(threshold) if seed % 2 else threshold
            new_labels, new_trusted = propagate_regions(*tensors, limit, impl)
            np.testing.assert_array_equal(new_labels.numpy(), expected_labels, f"{impl}, case {seed}")
            np.testing.assert_array_equal(new_trusted.numpy(), expected_trusted, f"{impl}, case {seed}")
            assert new_labels.dtype == tensors[0].dtype
        assert (expected_trusted >= trusted).all()
        assert not (expected_trusted & ~trusted & ~shapes.any(1)).any()
        changed += (expected_labels != labels).any()
        backwards = [
            literal(y.reshape(size), f.reshape(size), r.reshape(-1, size)[::-1], threshold)[0]
            for y, f, r in zip(labels, trusted, shapes, strict=True)
        ]
        relabelled_later += (np.array(backwards).reshape(labels.shape) != expected_labels).any()
        np.testing.assert_array_equal(tensors[0].numpy(), case(seed)[0])  # inputs stay as they are
        np.testing.assert_array_equal(tensors[1].numpy(), case(seed)[1])
    assert changed > 100  # else the cases prove nothing
    assert relabelled_later > 20  # and the order of segments matters in some


def test_large_images_fill_many_words():
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:41, :53]
    labels = torch.from_numpy(((yy // 14) * 4 + xx // 14) % 11)
    labels = torch.stack((labels, labels.flip(0)))
    shapes = np.stack(
        [(yy - rng.integers(41)) ** 2 + (xx - rng.integers(53)) ** 2 < rng.integers(3, 25) ** 2 for _ in range(80)]
    ).reshape(2, 40, 41, 53)
    trusted = torch.from_numpy(rng.random((2, 41, 53)) < 0.9)
    for threshold in (0.5, 0.6, 0.8):
        results = [propagate_regions(labels, trusted, torch.from_numpy(shapes), threshold, i) for i in IMPLS[:3]]
        assert not torch.equal(results[0][0], labels)
        for new_labels, new_trusted in results[1:]:
            assert torch.equal(new_labels, results[0][0])
            assert torch.equal(new_trusted, results[0][1])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_segments_and_no_images(impl):
    labels, trusted = torch.randint(0, 5, (2, 3, 4)), torch.rand(2, 3, 4) < 0.5
    new_labels, new_trusted = propagate_regions(labels, trusted, torch.zeros(2, 0, 3, 4, dtype=torch.bool), 0.7, impl)
    assert torch.equal(new_labels, labels)
    assert torch.equal(new_trusted, trusted)
    new_labels, _ = propagate_regions(labels[:0], trusted[:0], torch.zeros(0, 6, 3, 4, dtype=torch.bool), 0.7, impl)
    assert new_labels.shape == (0, 3, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_dtype_and_layout_of_the_inputs(impl, dtype):
    labels = torch.arange(254).repeat(2)[:500].view(2, 10, 25).to(dtype)
    labels[:, :, :20] = 253
    shapes = torch.ones(3, 2, 25, 10, dtype=torch.bool).permute(1, 0, 3, 2)  # not contiguous
    new_labels, new_trusted = propagate_regions(labels, torch.ones(2, 10, 25, dtype=torch.bool), shapes, 0.75, impl)
    assert new_labels.dtype == dtype
    assert new_trusted.dtype == torch.bool
    assert (new_labels == 253).all()


def test_loop_reads_nothing_back():
    # tensors without contents: any `.item()`, boolean index or unique would raise
    labels = torch.empty(2, 5, 7, dtype=torch.int64, device="meta")
    flags = torch.empty(2, 3, 5, 7, dtype=torch.bool, device="meta")
    for impl in ("loop", "auto"):
        result = propagate_regions(labels, flags[:, 0], flags, torch.empty((), device="meta"), impl)
        assert result[0].shape == result[1].shape == (2, 5, 7)


def test_refusals():
    labels, flags = torch.zeros(1, 2, 3, dtype=torch.int64), torch.ones(1, 1, 2, 3, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"at least 0\.5 for impl bitplane.* got 0\.34.* Use impl loop"):
        propagate_regions(labels, flags[0], flags, 0.34, "bitplane")
    with pytest.raises(ConfigError, match="impl must be auto, oracle, loop or bitplane; got 'fast'"):
        propagate_regions(labels, flags[0], flags, 0.7, "fast")
