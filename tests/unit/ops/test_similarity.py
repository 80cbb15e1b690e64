"""Similarity maps: the numbers of the papers' definitions, and that walking over blocks changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from raysemi.errors import ConfigError
from raysemi.ops import similarity
from raysemi.ops.similarity import (
    channel_derivative,
    label_factor,
    label_scale,
    map_distance,
    map_rows,
    normalise,
    propagate,
    propagation_factor,
    segments,
    similarity_factor,
)

SIMILARITIES = ["softmax_dot", "cosine", "l1_dot"]
TOY = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])  # D = 3: pixel 0 = (1, 0, 0), pixel 1 = (0, 0, 1)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK_CPU", 3 * 2 * 13)  # 3 rows at B = 2, N = 13: several blocks, a rest of 1


def random_pair(channels=7, images=2, cells=13, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (images, channels, cells)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(2))


def dense_map(left, right):
    return left.mT @ right


# --- derivative -------------------------------------------------------------------------------------------------


def test_derivatives_of_squares():
    squares = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0]).view(1, 5, 1)
    expected = {0: [1, 4, 9, 16, 25], 1: [3, 5, 7, 9], 2: [2, 2, 2], 3: [0, 0]}
    for order, values in expected.items():
        assert channel_derivative(squares, order).flatten().tolist() == values


@pytest.mark.parametrize("kernel", [(-1.0, 1.0), (-1.0, 0.0, 1.0), (1.0, 1.0), (1.0, -2.0, 1.0), (0.5, 0.0, 0.0, 2.0)])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_derivative_is_the_iterated_toeplitz_matrix(kernel, order):
    features = torch.randn(2, 9, 5, dtype=torch.float64)
    expected = features
    for _ in range(order):
        rows = expected.shape[1] - len(kernel) + 1
        matrix = torch.zeros(rows, expected.shape[1], dtype=torch.float64)
        for row in range(rows):
            matrix[row, row : row + len(kernel)] = torch.tensor(kernel, dtype=torch.float64)
        expected = matrix @ expected
    result = channel_derivative(features, order, kernel)
    assert result.shape == (2, 9 - order * (len(kernel) - 1), 5)
    torch.testing.assert_close(result, expected)


def test_forward_difference_has_binomial_rows():
    order, channels = 3, 8
    result = channel_derivative(torch.eye(channels)[None], order)[0]
    row = [(-1) ** (order - j) * math.comb(order, j) for j in range(order + 1)]
    for k in range(channels - order):
        assert result[k].tolist() == [0] * k + row + [0] * (channels - order - 1 - k)


def test_derivative_of_a_polynomial_and_of_a_constant_is_zero():
    k = torch.arange(7.0)
    assert channel_derivative((3 * k**2 - k + 2).view(1, 7, 1), order=3).abs().max() == 0
    assert channel_derivative(torch.full((2, 6, 3), 4.2), order=1).abs().max() == 0


def test_derivative_acts_on_channels_only():
    features, shuffled = torch.randn(2, 6, 11), torch.randperm(11)
    assert torch.equal(channel_derivative(features[:, :, shuffled], 2), channel_derivative(features, 2)[:, :, shuffled])


def test_absolute_derivative():
    features = torch.tensor([1.0, 4.0, 2.0, 2.0]).view(1, 4, 1)
    assert channel_derivative(features, 1, absolute=True).flatten().tolist() == [3, 2, 0]
    assert channel_derivative(features, 2, absolute=True).flatten().tolist() == [1, 2]


@pytest.mark.parametrize("order", [-1, 4])
def test_derivative_refuses_to_leave_no_channel(order):
    with pytest.raises(ConfigError, match=rf"order must .* got {order}\."):
        channel_derivative(torch.randn(1, 4, 2), order)


def test_second_theorem_bounds_the_higher_maps():
    features = normalise(torch.randn(3, 9, 6, dtype=torch.float64), "cosine")
    sparse = channel_derivative(features, 2).abs().sum(dim=(1, 2))
    for order in range(3, 7):
        derived = channel_derivative(features, order)
        assert (dense_map(derived, derived).abs().sum(dim=(1, 2)) <= 4 ** (order - 2) * sparse**2).all()


# --- maps -------------------------------------------------------------------------------------------------------


def test_worked_propagation():
    left = propagation_factor(TOY, order=1)
    torch.testing.assert_close(dense_map(left, left)[0], torch.eye(2) * 1.284457, atol=1e-6, rtol=0)
    rows = map_rows(left, left, torch.tensor([0, 1]))[0]
    torch.testing.assert_close(rows, torch.tensor([[0.783207, 0.216792], [0.216792, 0.783207]]), atol=2e-6, rtol=0)
    spread = propagate(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), left, left)[0]
    torch.testing.assert_close(spread, torch.tensor([[1.566415, 0.433585], [0.216792, 0.783207]]), atol=2e-6, rtol=0)


def test_worked_softmax_maps():
    for order, expected in ((0, [[0.243497, 0.166927], [0.166927, 0.243497]]), (1, [[0.429056] * 2] * 2)):
        factor = similarity_factor(TOY, order)
        torch.testing.assert_close(dense_map(factor, factor)[0], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("order", "expected"), [(0, 0.250390), (1, 0.353553)])
def test_worked_label_match(order, expected):
    factor = similarity_factor(TOY, order)
    target = label_factor(torch.tensor([[0, 1]]), 2, label_scale(3 - order, "softmax_dot"))
    total, pairs = map_distance(factor, factor, target, target, torch.ones(1, 2, dtype=torch.bool))
    assert pairs == 4
    assert (total / pairs).item() == pytest.approx(expected, abs=1e-6)


def test_worked_cosine_maps_match_the_labels():
    target = label_factor(torch.tensor([[0, 1]]), 2, label_scale(3, "cosine"))
    for order in (0, 1):
        factor = similarity_factor(TOY, order, "cosine")
        torch.testing.assert_close(dense_map(factor, factor)[0], torch.eye(2), atol=1e-6, rtol=0)
        total, _ = map_distance(factor, factor, target, target, torch.ones(1, 2, dtype=torch.bool))
        assert total.item() == pytest.approx(0.0, abs=1e-6)


def test_worked_sparsity():
    sparse = channel_derivative(normalise(TOY, "softmax_dot"), 2).abs().mean()
    assert sparse.item() == pytest.approx(0.364175, abs=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_ranges(order):
    features = 5 * torch.randn(2, 6, 10)
    soft = similarity_factor(features, order, "softmax_dot"), similarity_factor(features.flip(2), order, "softmax_dot")
    entries = dense_map(*soft)
    assert entries.min() > 0
    assert entries.max() <= (6 - order) ** -0.5 + 1e-6
    factor = similarity_factor(features, order, "cosine")
    entries = dense_map(factor, factor)
    assert entries.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(entries.diagonal(dim1=1, dim2=2), torch.ones(2, 10))


def test_propagation_factor_sums_the_orders():
    first, second = random_pair()
    for name in [None, *SIMILARITIES]:
        left, right = (propagation_factor(f, 1, similarity=name, temperature=0.4) for f in (first, second))
        if name is None:
            parts = [
                dense_map(channel_derivative(first, n), channel_derivative(second, n)) / (7 - n) ** 0.5 for n in (0, 1)
            ]
        else:
            parts = [dense_map(similarity_factor(first, n, name), similarity_factor(second, n, name)) for n in (0, 1)]
        torch.testing.assert_close(dense_map(left, right), sum(parts) / 0.4)


def test_cosine_of_zero_features_has_finite_gradient():
    features = torch.zeros(1, 5, 3, requires_grad=True)
    similarity_factor(features, 1, "cosine").sum().backward()
    assert features.grad.isfinite().all()


# --- blocks against the dense form --------------------------------------------------------------------------------


def dense_distance(left, right, target_left, target_right, counted):
    weight = counted.to(left.dtype)
    residual = dense_map(left, right) - dense_map(target_left, target_right)
    return (residual.abs() * weight[:, :, None] * weight[:, None, :]).sum()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_distance_is_the_dense_one(name, dtype):
    counted = torch.rand(2, 13, generator=torch.Generator().manual_seed(3)) > 0.3
    results = []
    for distance in (lambda *a: map_distance(*a)[0], dense_distance):
        first, second = random_pair(dtype=dtype)
        targets = [similarity_factor(f.detach(), 1, name) for f in random_pair(seed=1, dtype=dtype)]
        total = distance(similarity_factor(first, 1, name), similarity_factor(second, 1, name), *targets, counted)
        mean = total / counted.sum(dim=1).square().sum()
        results.append((mean, *torch.autograd.grad(mean, (first, second))))
    for streamed, dense in zip(*results, strict=True):
        assert dense.abs().max() > 1e-4
        torch.testing.assert_close(streamed, dense, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_propagation_is_the_dense_one(dtype):
    logits = torch.randn(2, 4, 13, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 4, 13, dtype=dtype)
    results = []
    for dense in (False, True):
        left, right = random_pair(dtype=dtype)
        spread = logits.detach() @ dense_map(left, right).softmax(dim=2) if dense else propagate(logits, left, right)
        results.append((spread, *torch.autograd.grad((spread * upstream).mean(), (left, right))))
    for streamed, dense in zip(*results, strict=True):
        torch.testing.assert_close(streamed, dense, atol=1e-6, rtol=1e-5)
    assert not torch.autograd.grad(propagate(logits, *random_pair(dtype=dtype)).sum(), logits, allow_unused=True)[0]


@pytest.mark.usefixtures("small_blocks")
def test_gradients_pass_the_numerical_check():
    left, right = random_pair(channels=3)
    targets = [f.detach() for f in random_pair(channels=2, seed=1)]
    counted = torch.ones(2, 13, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda a, b: map_distance(a, b, *targets, counted)[0], (left, right))
    logits = torch.randn(2, 4, 13, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: propagate(logits, a, b), (left, right))


def test_one_factor_on_both_sides_and_two_uses_in_one_graph():
    features, _ = random_pair()
    logits, counted = torch.randn(2, 4, 13, dtype=torch.float64), torch.ones(2, 13, dtype=torch.bool)
    target = label_factor(torch.randint(0, 3, (2, 13)), 3, 1.0).double()
    factor = similarity_factor(features, 0, "cosine")
    streamed = (
        map_distance(factor, factor, target, target, counted)[0] + propagate(logits, factor, factor).square().sum()
    )
    streamed = streamed + 2 * map_distance(factor, factor.flip(2), target, target, counted)[0]
    dense = dense_distance(factor, factor, target, target, counted)
    dense = dense + (logits @ dense_map(factor, factor).softmax(dim=2)).square().sum()
    dense = dense + 2 * dense_distance(factor, factor.flip(2), target, target, counted)
    expected, got = (torch.autograd.grad(x, features, retain_graph=True)[0] for x in (dense, streamed))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(streamed, features)[0], expected)  # a second walk over the graph


def test_autocast_changes_no_digit():
    first, second = random_pair(dtype=torch.float32)
    logits, counted = torch.randn(2, 4, 13), torch.ones(2, 13, dtype=torch.bool)

    def losses():
        left, right = propagation_factor(first, 1), propagation_factor(second, 1)
        total, _ = map_distance(left, right, left.flip(2), right, counted)
        return total, propagate(logits, left, right).square().sum(), map_rows(left, right, torch.tensor([2, 5])).sum()

    plain = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses()
        gradient = torch.autograd.grad(cast[0] + cast[1], first)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    assert torch.equal(gradient, torch.autograd.grad(plain[0] + plain[1], first)[0])
    half = propagation_factor(first.bfloat16(), 1)
    assert half.dtype == torch.float32
    assert torch.autograd.grad(propagate(logits.bfloat16(), half, half).sum(), first)[0].dtype == torch.float32


def test_no_map_is_ever_whole(monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK_CPU", 4096)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    cells = 600
    first, second = random_pair(channels=4, images=1, cells=cells, dtype=torch.float32)
    labels = torch.randint(0, 3, (1, cells))
    with Watch():
        left, right = propagation_factor(first, 1), propagation_factor(second, 1)
        target = label_factor(labels, 3, 1.0)
        total, _ = map_distance(left, right, target, target, labels != 1)
        (total + propagate(torch.randn(1, 3, cells), left, right).square().sum()).backward()
    assert cells < largest < cells**2 / 10


# --- propagation and segments -------------------------------------------------------------------------------------


def test_rows_of_the_map_sum_to_one_and_hand_out_all_mass():
    left, right = (f.detach() for f in random_pair())
    rows = map_rows(left, right, torch.tensor([12, 0, 0]))
    torch.testing.assert_close(rows.sum(dim=2), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(rows, dense_map(left, right).softmax(dim=2)[:, [12, 0, 0]])
    logits = torch.randn(2, 4, 13, dtype=torch.float64)
    torch.testing.assert_close(propagate(logits, left, right).sum(dim=2), logits.sum(dim=2))


def literal_segments(rows, height, width):
    large = F.interpolate(rows, size=(height, width), mode="bilinear", align_corners=True)
    low, high = large.amin(dim=(2, 3), keepdim=True), large.amax(dim=(2, 3), keepdim=True)
    return ((large - low) / (high - low)).nan_to_num(0) > 0.5


@pytest.mark.parametrize(("height", "width"), [(33, 41), (30, 47), (5, 6)])
def test_segments_are_binarised_resized_rows(height, width, monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK_CPU", 2 * 2 * 33 * 41)  # chunks of 2 of the 7 rows
    rows = torch.rand(2, 7, 5, 6, generator=torch.Generator().manual_seed(1))
    shapes = segments(rows, height, width)
    assert shapes.shape == (2, 7, height, width)
    assert torch.equal(shapes, literal_segments(rows, height, width))
    assert shapes.flatten(2).any(dim=2).all()


def test_a_constant_row_gives_an_empty_segment():
    rows = torch.full((1, 2, 5, 6), 1 / 30)
    rows[0, 1, 2, 3] = 0.9
    shapes = segments(rows, 19, 23)
    assert not shapes[0, 0].any()
    assert shapes[0, 1].any()


def test_label_factor_excludes_ignored_labels():
    factor = label_factor(torch.tensor([[2, 255, 2, 0]]), 3, 0.25)
    expected = torch.zeros(4, 4)
    expected[0, 0] = expected[0, 2] = expected[2, 0] = expected[2, 2] = expected[3, 3] = 0.25
    torch.testing.assert_close(dense_map(factor, factor)[0], expected)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_identical_one_hot_features_reach_the_label_scale_of_order_0(name):
    one_hot = 200 * torch.eye(5)[None, :, [0, 0, 3]]
    factor = similarity_factor(one_hot, 0, name)
    assert dense_map(factor, factor)[0, 0, 1].item() == pytest.approx(label_scale(5, name), abs=1e-5)


def test_no_counted_pair_is_exactly_zero():
    left, right = random_pair(dtype=torch.float32)
    total, pairs = map_distance(left, right, left, right.flip(2), torch.zeros(2, 13, dtype=torch.bool))
    assert total == 0
    assert pairs == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(total, (left, right)))
