"""Shared strongest channels: the worked numbers, what must not matter, and a loop that says the same."""

from __future__ import annotations

import pytest
import torch

from raysemi.errors import ConfigError
from raysemi.ops.cells import nearest_cell
from raysemi.ops.rank_weight import rank_weights, similarity_weights

Z = (0.10, 0.90, 0.00, 0.40, 0.70, 0.20, 0.30, 0.05)
A = (0.2, 0.8, 0.1, 0.1, 0.9, 0.0, 0.6, 0.3)
B = (0.7, 0.1, 0.6, 0.5, 0.0, 0.2, 0.1, 0.4)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def looped(features_BDhw, labels_BHW, prototypes_KD, k):
    """Pixel by pixel, sets of Python integers; features as large as the labels."""
    weights = torch.zeros(labels_BHW.shape)
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in labels_BHW.shape)).tolist():
        if (label := int(labels_BHW[b, y, x])) == 255:
            continue
        own, of_class = (
            {i for _, i in sorted((-abs(v), i) for i, v in enumerate(vector))[:k]}
            for vector in (features_BDhw[b, :, y, x].tolist(), prototypes_KD[label].tolist())
        )
        weights[b, y, x] = len(own & of_class) / k
    return weights


def test_worked_shares():
    features = torch.tensor(Z)[None, :, None, None].expand(1, 8, 1, 3)
    labels = torch.tensor([[[0, 1, 255]]])
    weights = rank_weights(features, labels, torch.tensor([A, B]), k=3)
    torch.testing.assert_close(weights, torch.tensor([[[2 / 3, 1 / 3, 0.0]]]))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_equals_a_loop_over_pixels(k):
    features, prototypes = drawn(2, 7, 4, 5), drawn(3, 7, seed=1)
    labels = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 0] = 255
    torch.testing.assert_close(rank_weights(features, labels, prototypes, k), looped(features, labels, prototypes, k))


def test_ties_go_to_the_lower_channel():
    """After a ReLU many channels are 0: some of them complete the k."""
    features = torch.relu(drawn(2, 9, 3, 4) - 0.8)
    prototypes = torch.relu(drawn(3, 9, seed=1) - 0.8)
    labels = torch.randint(0, 3, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(rank_weights(features, labels, prototypes), looped(features, labels, prototypes, 5))


def test_what_must_not_matter():
    features, prototypes = drawn(2, 16, 4, 5), drawn(3, 16, seed=1)
    labels = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    weights = rank_weights(features, labels, prototypes)
    assert torch.equal(rank_weights(3.7 * features, labels, 0.2 * prototypes), weights)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(rank_weights(features[:, order], labels, prototypes[:, order]), weights)
    own = prototypes[labels].permute(0, 3, 1, 2)
    assert torch.equal(rank_weights(own, labels, prototypes), torch.ones_like(weights))
    assert set((weights * 5).round().unique().tolist()) <= {0, 1, 2, 3, 4, 5}


def test_it_is_the_set_that_counts_not_the_order():
    prototype = torch.tensor([[5.0, 4.0, 3.0, 0.1, 0.2, 0.0]])
    reversed_order = torch.tensor([3.0, 4.0, 5.0, 0.0, 0.1, 0.2])[None, :, None, None]
    assert rank_weights(reversed_order, torch.zeros(1, 1, 1, dtype=torch.int64), prototype, k=3).item() == 1.0


def test_random_features_share_k_of_d():
    features, prototypes = drawn(4, 256, 60, 60), drawn(5, 256, seed=1)
    labels = torch.randint(0, 5, (4, 60, 60), generator=torch.Generator().manual_seed(2))
    assert rank_weights(features, labels, prototypes).mean().item() == pytest.approx(5 / 256, abs=0.001)


def test_the_pseudo_class_chooses_the_prototype():
    features, prototypes = drawn(1, 8, 2, 2), drawn(2, 8, seed=1)
    zeros, ones = torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(1, 2, 2, dtype=torch.int64)
    assert torch.equal(rank_weights(features, zeros, prototypes), rank_weights(features, ones, prototypes.flip(0)))
    assert not torch.equal(rank_weights(features, zeros, prototypes), rank_weights(features, ones, prototypes))


def test_smaller_features_are_read_at_the_nearest_cell():
    """At every fourth pixel a cell lies; between them the nearer one, corners aligned."""
    features, prototypes = drawn(2, 6, 4, 6), drawn(3, 6, seed=1)
    labels = torch.randint(0, 3, (2, 13, 21), generator=torch.Generator().manual_seed(2))
    small = rank_weights(features, labels, prototypes, k=3)
    full = torch.nn.functional.interpolate(features, size=(13, 21), mode="bilinear", align_corners=True)
    exact = looped(full, labels, prototypes, 3)
    assert torch.equal(small[:, ::4, ::4], exact[:, ::4, ::4])
    assert nearest_cell(13, 4, torch.device("cpu")).tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_the_other_similarities():
    features, prototypes = drawn(2, 7, 3, 4), drawn(3, 7, seed=1)
    labels = torch.randint(0, 3, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    of_label = prototypes[labels].permute(0, 3, 1, 2)
    cosine = torch.nn.functional.cosine_similarity(features, of_label, dim=1).clamp(min=0)
    torch.testing.assert_close(similarity_weights(features, labels, prototypes, "cosine"), cosine)
    euclidean = (-(features - of_label).square().sum(1) / 7).exp()
    torch.testing.assert_close(similarity_weights(features, labels, prototypes, "euclidean"), euclidean)
    signed = similarity_weights(-features.abs(), labels, prototypes, "rank", 3, by_magnitude=False)
    assert not torch.equal(signed, rank_weights(-features.abs(), labels, prototypes, 3))


@pytest.mark.parametrize("k", [0, 9])
def test_k_must_be_among_the_channels(k):
    with pytest.raises(ConfigError, match=r"k must lie in 1\.\.8"):
        rank_weights(drawn(1, 8, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), drawn(2, 8), k)


def test_half_precision_and_no_gradient():
    features = drawn(1, 8, 2, 2).bfloat16().requires_grad_()
    weights = rank_weights(features, torch.zeros(1, 2, 2, dtype=torch.int64), drawn(2, 8))
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
