"""Weights of two gradients: worked numbers, what must hold of any two vectors, and the guards.

The oracles work on the vectors themselves, in fp64, and import nothing from raysemi.
"""

from __future__ import annotations

import math

import pytest
import torch

from raysemi.ops import pareto
from raysemi.ops.pareto import Products, inner_products, least_cosine, magnitude, mix, mixed_norm, pareto_weights

INF, NAN = float("inf"), float("nan")
# g_s, g_u, (ss, uu, su), alpha_u, h, |h|, |(g_s + g_u) / 2|, lambda, H, cosines of h with g_s and g_u
WORKED = [
    ((2, 0), (-0.5, 1), (4, 1.25, -1), 0.689655, (0.275862, 0.689655), 0.742781, 0.901388, 1.213530,
     (0.334767, 0.836918), (0.371391, 0.664364)),
    ((3, -1), (-1, 1), (10, 2, -4), 0.7, (0.2, 0.4), 0.447214, 1.0, 2.236068,
     (0.447214, 0.894427), (0.141421, 0.316228)),
    ((1, 2, 2), (-1, 0, 1), (9, 2, 1), 0.888889, (-0.777778, 0.222222, 1.111111), 1.374369, 1.802776, 1.311712,
     (-1.020220, 0.291492, 1.457458), (0.458123, 0.971825)),
    ((4, 1), (1, 0), (17, 1, 4), 1.0, (1, 0), 1.0, 2.549510, 2.549510, (2.549510, 0), (0.970143, 1.0)),
    ((1, 0), (4, 1), (1, 17, 4), 0.0, (1, 0), 1.0, 2.549510, 2.549510, (2.549510, 0), (1.0, 0.970143)),
    ((1, 0), (0, 1), (1, 1, 0), 0.5, (0.5, 0.5), 0.707107, 0.707107, 1.0, (0.5, 0.5), (0.707107, 0.707107)),
    ((3, 4), (3, 4), (25, 25, 25), 0.5, (3, 4), 5.0, 5.0, 1.0, (3, 4), (1.0, 1.0)),
]  # fmt: skip


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def products(g_2P):
    return Products(*inner_products(g_2P))


def step(g_2P, **settings):
    """H, from the vectors."""
    found = mix(products(g_2P), **settings)
    return (found.scale * (found.alpha_s * g_2P[0] + found.alpha_u * g_2P[1])).tolist()


def close(value, expected):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("row", WORKED)
def test_worked_examples(row, swapped):
    g_s, g_u, (ss, uu, su), alpha_u, h, norm, uniform_norm, scale, scaled, (cos_s, cos_u) = row
    if swapped:
        g_s, g_u, ss, uu, alpha_u, cos_s, cos_u = g_u, g_s, uu, ss, 1 - alpha_u, cos_u, cos_s
    pair = vectors(g_s, g_u)
    found = products(pair)
    assert [value.item() for value in found] == [ss, uu, su]
    weight_s, weight_u = pareto_weights(ss, uu, su)
    assert weight_s.dtype == weight_u.dtype == torch.float64
    close(weight_u, alpha_u)
    close(weight_s, 1 - alpha_u)
    direction = weight_s * pair[0] + weight_u * pair[1]
    close(direction, h)
    close(mixed_norm(weight_s, weight_u, found), norm)
    close(mixed_norm(0.5, 0.5, found), uniform_norm)
    close(magnitude(weight_s, weight_u, found), scale)
    close(step(pair), scaled)
    close(step(pair, meo=False), h)
    cosines = pair @ direction / (pair.norm(dim=1) * direction.norm())
    close(cosines, (cos_s, cos_u))
    close(least_cosine(weight_s, weight_u, found), min(cos_s, cos_u))


def test_the_uniform_step_of_a_worked_example_climbs():
    """Row 2: the cosine of (1, 0) with g_u = (-1, 1)."""
    half = torch.tensor(0.5, dtype=torch.float64)
    close(least_cosine(half, half, products(vectors((3, -1), (-1, 1)))), -0.707107)


@pytest.mark.parametrize(("ratio", "cosine", "scale"), [(0.3, 0.0, 1.82), (0.3, -0.3, 1.88), (0.1, 0.0, 5.05)])
def test_magnitude_at_typical_lengths_and_angles(ratio, cosine, scale):
    pair = vectors((1.0, 0.0), (ratio * cosine, ratio * math.sqrt(1 - cosine**2)))
    found = mix(products(pair))
    assert found.scale.item() == pytest.approx(scale, abs=0.005)
    assert not found.fallback
    assert not found.capped


def random_pairs(count=400):
    """Pairs of all lengths and angles, in 2 to 7 dimensions."""
    generator = torch.Generator().manual_seed(3)
    for i in range(count):
        pair = torch.randn(2, 2 + i % 6, generator=generator, dtype=torch.float64)
        pair[1] += pair[0] * torch.randn((), generator=generator, dtype=torch.float64) * (i % 3)
        pair[1] *= 10 ** (2 * torch.rand((), generator=generator, dtype=torch.float64) - 1)
        yield pair


def test_what_holds_of_any_two_gradients():
    for pair in random_pairs():
        found = products(pair)
        alpha_s, alpha_u = pareto_weights(*found)
        assert 0 <= alpha_u <= 1
        assert alpha_s + alpha_u == 1
        h = alpha_s * pair[0] + alpha_u * pair[1]
        square, middle = h @ h, pair.mean(dim=0).norm()
        assert (pair @ h >= square - 1e-6 * square).all()  # a step along h hurts neither side
        assert h.norm() <= min(pair[0].norm(), pair[1].norm(), middle) * (1 + 1e-9)
        scale = magnitude(alpha_s, alpha_u, found)
        assert scale >= 1 - 1e-9
        torch.testing.assert_close((scale * h).norm(), middle)
        swapped = pareto_weights(found.uu, found.ss, found.su)
        torch.testing.assert_close(swapped, (alpha_u, alpha_s))


def test_no_point_of_a_grid_is_shorter():
    shares = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    for pair in random_pairs(100):
        alpha_s, alpha_u = pareto_weights(*products(pair))
        best = ((1 - shares) * pair[0] + shares * pair[1]).norm(dim=1).min()
        assert (alpha_s * pair[0] + alpha_u * pair[1]).norm() <= best * (1 + 1e-12)


def test_scale_and_orthogonal_maps_change_nothing():
    generator = torch.Generator().manual_seed(1)
    for pair in random_pairs(60):
        before = mix(products(pair), max_scale=None)
        turn, _ = torch.linalg.qr(torch.randn(pair.shape[1], pair.shape[1], generator=generator, dtype=torch.float64))
        for changed in (pair * 1e-6, pair * 65536, pair @ turn):
            after = mix(products(changed), max_scale=None)
            torch.testing.assert_close(after[:3], before[:3], rtol=1e-6, atol=1e-8)


def test_weights_follow_the_length_of_one_gradient_without_jumps():
    pair = vectors((2.0, 1.0, 0.5), (-0.5, 1.0, 3.0))
    factors = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    alphas = torch.stack([pareto_weights(*products(torch.stack((pair[0], f * pair[1]))))[1] for f in factors])
    assert alphas.diff().abs().max() < 0.01
    assert (alphas.diff() <= 1e-12).all()  # the longer it is, the less it counts
    assert alphas[0] > 0.99
    assert alphas[-1] < 0.01


def test_similar_gradients_keep_their_digits(monkeypatch):
    """Two of 300,000 entries that differ by a ten-thousandth: fp32 sums would leave nothing of the difference."""
    monkeypatch.setattr(pareto, "_CHUNK", 1 << 16)
    generator = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 300_000, generator=generator, dtype=torch.float64)
    other -= base * ((base @ other) / (base @ base))
    away = 1e-4 * other - 0.6e-8 * base * ((other @ other) / (base @ base))  # so that alpha_u is near 0.6
    pair = torch.stack((base, base + away)).float()
    wide = pair.double()
    apart = wide[0] - wide[1]
    expected = ((apart @ wide[0]) / (apart @ apart)).clamp(0, 1)
    assert 0.5 < expected < 0.7
    assert pareto_weights(*inner_products(pair))[1].item() == pytest.approx(expected.item(), abs=1e-6)
    rough = [(a * b).sum() for a, b in ((pair[0], pair[0]), (pair[1], pair[1]), (pair[0], pair[1]))]
    assert abs(pareto_weights(*rough)[1].item() - expected.item()) > 1e-3


def test_shards_of_any_layout_add_up():
    pair = vectors((1, 2, 2), (-1, 0, 1))
    parts = [inner_products(part).tolist() for part in pair.split(1, dim=1)]
    assert parts == [[1, 1, -1], [4, 0, 0], [4, 1, 2]]
    assert torch.tensor(parts).sum(dim=0).tolist() == [9, 2, 1]
    wide = torch.randn(2, 29, generator=torch.Generator().manual_seed(5))
    padded = torch.cat((wide, torch.zeros(2, 3)), dim=1)
    for layout in ([29, 0, 3], [1, 7, 13, 11], [8] * 4):
        summed = sum(inner_products(part) for part in padded.split(layout, dim=1))
        torch.testing.assert_close(summed, inner_products(wide))


# --- guards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meo", [True, False])
@pytest.mark.parametrize("min_ratio", [0.0, 1e-3])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gradient_that_vanishes_leaves_the_uniform_step(swapped, min_ratio, meo):
    """The closed form gives 0 the whole weight: training would stand still."""
    pair = vectors((3, 4), (0, 0))
    assert [weight.item() for weight in pareto_weights(25, 0, 0)] == [0, 1]
    pair = pair.flip(0) if swapped else pair
    found = mix(products(pair), meo=meo, min_ratio=min_ratio)
    assert [value.item() for value in found] == [0.5, 0.5, 1.0, True, False]
    assert step(pair, meo=meo, min_ratio=min_ratio) == [1.5, 2.0]
    assert step(torch.zeros(2, 3), meo=meo, min_ratio=min_ratio) == [0, 0, 0]


def test_the_ratio_decides_what_has_vanished():
    pair = vectors((1, 0), (0, 0.01))
    assert mix(products(pair), min_ratio=0.02).fallback
    assert not mix(products(pair), min_ratio=0.005).fallback
    assert mix(products(vectors((1, 2), (3, -1))), min_ratio=1.0)[:3] == (0.5, 0.5, 1.0)


def test_opposite_gradients_give_no_step():
    """h is 0 up to rounding; its direction, blown up, would be noise."""
    for meo in (True, False):
        for max_scale in (10.0, None):
            found = mix(products(vectors((2, 0), (-1, 0))), meo=meo, max_scale=max_scale)
            assert found.scale == 0
            assert found.capped
            assert not found.fallback


def test_the_factor_is_capped_and_the_step_stays_continuous():
    angles = [math.pi - 10.0**-power for power in (0, 1, 2, 3, 4, 5)]
    pairs = [vectors((1, 0), (0.5 * math.cos(angle), 0.5 * math.sin(angle))) for angle in angles]
    capped = [mix(products(pair)) for pair in pairs]
    free = [mix(products(pair), max_scale=None) for pair in pairs]
    assert [bool(found.capped) for found in capped] == [False, False, True, True, True, True]
    assert all(found.scale <= 10 for found in capped)
    assert free[4].scale > 1000
    lengths = [math.hypot(*step(pair)) for pair in pairs]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 1e-4


def test_a_short_gradient_is_no_rounding():
    """Ratio 1e-7, all limits off: the paper's literal form follows it at the uniform step's length, and goes on."""
    found = mix(products(vectors((1, 0), (0, 1e-7))), min_ratio=0.0, max_scale=None)
    assert found.scale.item() == pytest.approx(5e6, rel=1e-6)
    assert not found.capped


def test_the_weights_may_be_of_another_metric():
    """Learning rates 1 and 10: in the plain metric the step would climb g_s once each coordinate has its own rate."""
    pair, rates = vectors((3, -1), (-1, 1)), torch.tensor([1.0, 10.0], dtype=torch.float64)
    rated = Products(
        *torch.stack(((rates * pair[0]) @ pair[0], (rates * pair[1]) @ pair[1], (rates * pair[0]) @ pair[1]))
    )
    assert [value.item() for value in rated] == [19, 11, -13]
    plain = torch.tensor(step(pair, meo=False), dtype=torch.float64)
    close(pair[0] @ (rates * plain), -3.4)
    direction = torch.tensor(step(pair, metric=rated, meo=False), dtype=torch.float64)
    close(direction, (0.714286, 0.142857))
    close(pair @ (rates * direction), (0.714286, 0.714286))
    scaled = torch.tensor(step(pair, metric=rated), dtype=torch.float64)
    close(scaled.norm(), 1.0)  # the uniform step's Euclidean length


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("meo", [True, False])
def test_what_is_not_finite_stays_so(bad, side, meo):
    """Not one of the guards may turn it into a step that looks sound."""
    pair = vectors((1.0, 2.0), (-1.0, 3.0))
    pair[side, 1] = bad
    assert not all(math.isfinite(value) for value in step(pair, meo=meo))


def test_products_of_shards_add_up():
    """pareto.md section 4: three shards of one coordinate each, in the order (ss, uu, su)."""
    both_2P = torch.tensor([[1.0, 2.0, 2.0], [-1.0, 0.0, 1.0]])
    parts = [inner_products(part_2P) for part_2P in both_2P.split(1, dim=1)]
    assert [part.tolist() for part in parts] == [[1, 1, -1], [4, 0, 0], [4, 1, 2]]
    assert torch.stack(parts).sum(dim=0).tolist() == [9, 2, 1]
    padded_2P = torch.cat((both_2P, torch.zeros(2, 2)), dim=1)
    assert inner_products(padded_2P).tolist() == [9, 2, 1]
