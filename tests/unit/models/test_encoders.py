"""Every family of encoders gives the two maps that the decoder needs, and refuses what it cannot give."""

from __future__ import annotations

import pytest
import torch

from raysemi.errors import ConfigError
from raysemi.models.encoders import build_encoder


@pytest.mark.parametrize(
    ("name", "stem", "parameters"),
    [
        ("resnet101", "deep", 42_623_936),
        ("resnet101", "plain", 42_500_160),
        ("resnet50", "deep", 23_631_808),
    ],
)
def test_paper_backbones_have_the_published_number_of_parameters(name: str, stem: str, parameters: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, stem, 16)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert (encoder.channels, encoder.middle_channels) == ((256, 2048), 1024)


@pytest.mark.parametrize("stem", ["deep", "plain"])
@pytest.mark.parametrize(("output_stride", "dilations"), [(16, (1, 1, 2)), (8, (1, 2, 4))])
def test_a_dilated_stage_begins_with_the_dilation_before_the_increase(
    stem: str, output_stride: int, dilations: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        net = build_encoder("resnet50", stem, output_stride).net
    stages = (net.layer2, net.layer3, net.layer4)
    assert tuple(stage[-1].conv2.dilation[0] for stage in stages) == dilations
    assert tuple(stage[0].conv2.dilation[0] for stage in stages) == (1, *dilations[:2])


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [("tf_efficientnet_lite0", 16), ("tf_efficientnet_lite0", 8), ("convnext_atto", 16), ("regnety_002", 8)],
)
def test_timm_encoders_give_stride_4_and_the_output_stride(name: str, output_stride: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, "deep", output_stride)
        features = encoder(torch.zeros(2, 3, 64, 96))
    low, high = features.maps
    assert low.shape == (2, encoder.channels[0], 16, 24)
    assert high.shape == (2, encoder.channels[1], 64 // output_stride, 96 // output_stride)
    assert features.middle_BDhw.shape[1] == encoder.middle_channels


def test_random_residual_blocks_are_not_the_identity() -> None:
    for stem in ("deep", "plain"):
        assert float(build_encoder("resnet50", stem, 16).net.layer1[0].bn3.weight.detach().min()) == 1.0


def test_an_unknown_encoder_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"model\.encoder must .*; got resnet11\. Nearest: .*resnet"):
        build_encoder("resnet11", "deep", 16)


@pytest.mark.parametrize("name", ["vgg11", "densenet121", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_without_the_strides_is_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=f"model.encoder must .*got {name}"):
        build_encoder(name, "deep", 16)


def test_lite0_sees_what_its_weights_saw() -> None:
    with torch.device("meta"):
        mean, std = build_encoder("tf_efficientnet_lite0", "deep", 16).statistics
    assert [(200 / 255 - m) / s for m, s in zip(mean, std, strict=True)] == pytest.approx([(200 - 127) / 128] * 3)
