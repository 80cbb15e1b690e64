"""The parts of DeepLabV3+ have the published sizes and wiring."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raysemi.errors import ConfigError
from raysemi.models.decoders import AtrousPyramid, DeepLabV3Plus, resize


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parts_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        decoder = DeepLabV3Plus(256, 2048, 21, 256, 48, (6, 12, 18))
    parts = decoder.pyramid, decoder.reduce, decoder.fuse, decoder.classifier
    assert [count(part) for part in parts] == [15_535_104, 12_384, 1_291_264, 5_397]


def test_low_features_come_first_and_the_penultimate_map_feeds_the_classifier() -> None:
    decoder = DeepLabV3Plus(5, 7, 3, 8, 4, (1, 2, 3)).eval()
    low, high = torch.randn(2, 5, 12, 9), torch.randn(2, 7, 3, 2)
    logits, penultimate, joined = decoder((low, high))
    assert logits.shape == (2, 3, 12, 9)
    assert penultimate.shape == (2, 8, 12, 9)
    assert float(penultimate.detach().min()) == 0.0  # after its ReLU
    torch.testing.assert_close(joined[:, :4], decoder.reduce(low))
    torch.testing.assert_close(joined[:, 4:], resize(decoder.pyramid(high), (12, 9)))
    torch.testing.assert_close(logits, decoder.classifier(penultimate))


def test_corners_are_aligned() -> None:
    wide = resize(torch.tensor([[[[0.0, 1.0]]]]), (1, 5))
    torch.testing.assert_close(wide.flatten(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))


def test_the_pyramid_reaches_as_far_as_its_rates() -> None:
    pyramid = AtrousPyramid(1, 2, (2, 4, 6)).eval()
    for branch, reach in zip(pyramid.branches, (0, 2, 4, 6), strict=True):
        with torch.no_grad():
            branch[0].weight.fill_(1.0)
        impulse = torch.zeros(1, 1, 15, 17)
        impulse[0, 0, 7, 8] = 1.0
        rows, columns = branch(impulse)[0, 0].nonzero().unbind(dim=1)
        assert (int(rows.max()) - 7, int(columns.max()) - 8, 7 - int(rows.min())) == (reach, reach, reach)


def test_training_on_one_image_says_what_to_do() -> None:
    pyramid = AtrousPyramid(3, 4, (1, 2, 3))
    with pytest.raises(ConfigError, match=r"at least 2 images.*model\.batch_norm=frozen"):
        pyramid(torch.randn(1, 3, 5, 6))
    assert pyramid(torch.randn(2, 3, 5, 6)).shape == (2, 4, 5, 6)
    assert pyramid.eval()(torch.randn(1, 3, 5, 6)).shape == (1, 4, 5, 6)
