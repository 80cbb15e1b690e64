"""The heads: shapes, published sizes, dropped channels, the shared projection."""

from __future__ import annotations

import torch

from raysemi.models.heads import AuxiliaryHead, CorrelationHead, RepresentationHead


def test_two_projections():
    head = CorrelationHead(5, dim=4, hidden=7)
    first, second = head(torch.randn(2, 5, 3, 6))
    assert first.shape == second.shape == (2, 4, 3, 6)
    assert not torch.equal(first, second)
    assert all(layer.bias is not None for layer in (head.reduce, head.first, head.second))
    assert sum(p.numel() for p in head.parameters()) == (9 * 5 * 7 + 7) + 2 * 7 + 2 * (7 * 4 + 4)


def test_shared_projection_is_one_tensor():
    head = CorrelationHead(5, dim=4, hidden=7, shared=True)
    first, second = head(torch.randn(2, 5, 3, 6))
    assert second is first
    assert sum(p.numel() for p in head.parameters()) == (9 * 5 * 7 + 7) + 2 * 7 + (7 * 4 + 4)


def test_dropped_channels_give_the_bias_alone():
    head, high = CorrelationHead(5, dim=4, hidden=7).eval(), torch.randn(2, 5, 3, 6)
    keep = torch.ones(2, 7)
    keep[1] = 0
    first, second = head(high, keep_BC=keep)
    torch.testing.assert_close(first[0], head(high)[0][0])
    for result, layer in ((first, head.first), (second, head.second)):
        torch.testing.assert_close(result[1], layer.bias[:, None, None].expand(4, 3, 6))


def test_channel_factors_act_after_the_norm():
    head, high = CorrelationHead(5, dim=4, hidden=7), torch.randn(2, 5, 3, 6)
    keep = torch.rand(2, 7) + 0.5
    hidden = torch.relu(head.norm(head.reduce(high))) * keep[:, :, None, None]
    torch.testing.assert_close(head(high, keep_BC=keep)[0], head.first(hidden))


def test_the_published_representation():
    """u2pl.md section 1: 1,836,800 parameters over the published decoder's 512 channels."""
    head = RepresentationHead(512)
    assert sum(p.numel() for p in head.parameters()) == 1_836_800
    assert RepresentationHead(9, hidden=6, dim=4)(torch.randn(2, 9, 3, 5)).shape == (2, 4, 3, 5)


def test_the_published_auxiliary_head():
    """u2pl.md section 1: what ResNet-101 has on Cityscapes beyond the network without it."""
    head = AuxiliaryHead(1024, num_classes=19)
    assert sum(p.numel() for p in head.parameters()) == 66_824_422 - (64_459_989 - 2 * 257)
    assert AuxiliaryHead(9, 5, hidden=6)(torch.randn(2, 9, 3, 4)).shape == (2, 5, 3, 4)


def test_dropped_channels_of_the_other_heads():
    joined, kept, dropped = torch.randn(2, 9, 3, 5), torch.ones(2, 6), torch.zeros(2, 6)
    head, auxiliary = RepresentationHead(9, hidden=6, dim=4).eval(), AuxiliaryHead(9, 5, hidden=6).eval()
    torch.testing.assert_close(head(joined, (kept, kept)), head(joined))
    torch.testing.assert_close(head(joined, (kept, dropped)), head.project.bias[:, None, None].expand(2, 4, 3, 5))
    inner = head.second_norm(head.second.bias.view(1, 6, 1, 1)).relu()
    torch.testing.assert_close(head(joined, (dropped, kept))[0, :, 1, 2], head.project(inner)[0, :, 0, 0])
    torch.testing.assert_close(auxiliary(joined, kept), auxiliary(joined))
    expected = auxiliary.classifier.bias[:, None, None].expand(2, 5, 3, 5)
    torch.testing.assert_close(auxiliary(joined, dropped), expected)
