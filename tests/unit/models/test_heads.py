"""Heads: shapes, published sizes, dropped channels; the correlation head's shared projection."""

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


def test_representation_head_has_the_published_size_and_draws_nothing_itself():
    with torch.device("meta"):
        assert sum(p.numel() for p in RepresentationHead(512).parameters()) == 1_836_800
    head, joined = RepresentationHead(5, dim=4, hidden=7).eval(), torch.randn(2, 5, 3, 6)
    asked = {}

    def run(dropped):
        def keep(name, channels):
            asked[name] = channels
            return torch.full((2, channels), float(name != dropped))

        return head(joined, keep)

    assert head(joined).shape == (2, 4, 3, 6)
    assert torch.equal(run("nothing"), head(joined))
    assert asked == {"representation/first": 7, "representation/second": 7}
    torch.testing.assert_close(run("representation/first"), head.project(head.second(torch.zeros(2, 7, 3, 6))))
    torch.testing.assert_close(run("representation/second"), head.project.bias[:, None, None].expand(2, 4, 3, 6))


def test_auxiliary_head_has_the_published_size_and_draws_nothing_itself():
    with torch.device("meta"):
        assert sum(p.numel() for p in AuxiliaryHead(1024, 19).parameters()) == 66_824_422 - 64_459_475
    head, middle = AuxiliaryHead(5, num_classes=3, hidden=7).eval(), torch.randn(2, 5, 4, 6)
    keep = {"auxiliary": torch.rand(2, 7)}
    hidden = torch.relu(head.reduce[1](head.reduce[0](middle)))
    torch.testing.assert_close(head(middle), head.classifier(hidden))
    dropped = head(middle, lambda name, channels: keep[name])
    torch.testing.assert_close(dropped, head.classifier(hidden * keep["auxiliary"][:, :, None, None]))
