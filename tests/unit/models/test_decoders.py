"""The two forms of DeepLabV3+ have the published sizes and wiring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raysemi.errors import ConfigError
from raysemi.models.decoders import AtrousPyramid, DeepLabV3Plus, WideDeepLabV3Plus, dropout, resize


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
    logits, penultimate, joined, pyramid = decoder((low, high))
    assert logits.shape == (2, 3, 12, 9)
    assert penultimate.shape == (2, 8, 12, 9)
    assert float(penultimate.detach().min()) == 0.0  # after its ReLU
    torch.testing.assert_close(joined[:, :4], decoder.reduce(low))
    torch.testing.assert_close(pyramid, decoder.pyramid(high))
    torch.testing.assert_close(joined[:, 4:], resize(pyramid, (12, 9)))
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


def test_parts_of_the_wide_decoder_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        decoder = WideDeepLabV3Plus(256, 2048, 21, 256, 256, (12, 24, 36))
    classifier = count(decoder.first) + count(decoder.second) + count(decoder.classifier)
    assert [count(decoder.pyramid), count(decoder.reduce), classifier] == [15_206_912 + 2_949_632, 66_304, 1_776_405]


def wide() -> tuple[WideDeepLabV3Plus, tuple[Tensor, Tensor]]:
    decoder = WideDeepLabV3Plus(5, 7, 3, 8, 6, (1, 2, 3)).eval()
    return decoder, (torch.randn(2, 5, 12, 9), torch.randn(2, 7, 3, 2))


def test_the_wide_decoder_joins_low_and_high_and_keeps_the_map_before_the_last_dropout() -> None:
    decoder, (low, high) = wide()
    logits, penultimate, joined, pyramid = decoder((low, high))
    assert logits.shape == (2, 3, 12, 9)
    assert penultimate.shape == (2, 8, 12, 9)
    torch.testing.assert_close(joined[:, :6], decoder.reduce(low))
    torch.testing.assert_close(pyramid, decoder.pyramid(high))  # before its dropout
    torch.testing.assert_close(joined[:, 6:], resize(pyramid, (12, 9)))
    torch.testing.assert_close(penultimate, decoder.second(decoder.first(joined)))
    torch.testing.assert_close(logits, decoder.classifier(penultimate))
    assert decoder.pyramid.project[0].kernel_size == (3, 3)


def test_the_caller_draws_the_dropout_of_the_wide_decoder() -> None:
    decoder, maps = wide()
    asked = {}

    def factors(dropped: str) -> Tensor:
        def keep(name: str, channels: int) -> Tensor:
            asked[name] = channels
            return torch.full((2, channels), 0.0 if name == dropped else 1.0)

        return decoder(maps, keep)

    plain = decoder(maps)
    for mine, theirs in zip(factors("nothing"), plain, strict=True):
        assert torch.equal(mine, theirs)
    assert asked == {"decoder/high": 8, "decoder/first": 8, "decoder/penultimate": 8}
    logits, penultimate, *_ = factors("decoder/penultimate")
    assert torch.equal(penultimate, plain[1])
    torch.testing.assert_close(logits, decoder.classifier.bias[:, None, None].expand(2, 3, 12, 9))
    logits, penultimate, joined, _ = factors("decoder/first")
    assert torch.equal(joined, plain[2])
    torch.testing.assert_close(penultimate, decoder.second(torch.zeros(2, 8, 12, 9)))
    assert not bool(factors("decoder/high")[2][:, 6:].any())


def test_dropout_multiplies_whole_channels_in_the_type_of_the_map() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    result = dropout(x, lambda name, channels: torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 2.0]]), "any")
    assert result.dtype == torch.bfloat16
    assert torch.equal(result[0], torch.stack((torch.zeros(4, 5), 2 * x[0, 1].float(), x[0, 2].float())).bfloat16())
    assert dropout(x, None, "any") is x


def test_the_plain_decoder_has_no_dropout() -> None:
    decoder = DeepLabV3Plus(5, 7, 3, 8, 4, (1, 2, 3)).eval()
    maps = torch.randn(2, 5, 12, 9), torch.randn(2, 7, 3, 2)

    def keep(name: str, channels: int) -> Tensor:
        raise AssertionError(name)

    assert torch.equal(decoder(maps, keep)[0], decoder(maps)[0])
