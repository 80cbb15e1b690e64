"""Every family of encoders gives the two maps that the decoder needs, and refuses what it cannot give."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from raysemi.errors import ConfigError
from raysemi.models.encoders import DINOV2, DinoV2, build_encoder


@pytest.mark.parametrize(
    ("name", "stem", "parameters"),
    [
        ("resnet101", "deep", 42_623_936),
        ("resnet101", "plain", 42_500_160),
        ("resnet50", "deep", 23_631_808),
        ("xception65", "deep", 37_867_312),
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


@pytest.mark.parametrize("stem", ["deep", "plain"])
@pytest.mark.parametrize(
    ("name", "output_stride", "multi_grid", "third", "fourth"),
    [  # dilations of the 3x3 convolutions; UniMatch, AugSeg, U2PL and AEL
        ("resnet50", 16, None, [1] * 6, [1, 2, 2]),
        ("resnet50", 16, (2, 2, 4), [1] * 6, [2, 4, 8]),
        ("resnet101", 8, (2, 2, 4), [1] + [2] * 22, [4, 8, 16]),
        ("resnet50", 8, None, [1] + [2] * 5, [2, 4, 4]),
    ],
)
def test_multi_grid_multiplies_the_dilations_of_the_last_stage(
    stem: str,
    name: str,
    output_stride: int,
    multi_grid: tuple[int, int, int] | None,
    third: list[int],
    fourth: list[int],
) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, stem, output_stride, multi_grid)
        features = encoder(torch.zeros(2, 3, 65, 97))
    for stage, dilations in ((encoder.net.layer3, third), (encoder.net.layer4, fourth)):
        assert [block.conv2.dilation for block in stage] == [(dilation, dilation) for dilation in dilations]
    cells = tuple(-(-side // output_stride) for side in (65, 97))
    assert features.high_BDhw.shape[-2:] == features.middle_BDhw.shape[-2:] == cells


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        *(("xception65", 16), ("xception65", 8), ("tf_efficientnet_lite0", 16)),
        *(("tf_efficientnet_lite0", 8), ("convnext_atto", 16), ("regnety_002", 8)),
    ],
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


@pytest.mark.parametrize(
    "name",
    ["vgg11", "densenet121", "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"],
)
def test_a_network_without_the_strides_is_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=f"model.encoder must .*got {name}"):
        build_encoder(name, "deep", 16)


def test_lite0_sees_what_its_weights_saw() -> None:
    with torch.device("meta"):
        mean, std = build_encoder("tf_efficientnet_lite0", "deep", 16).statistics
    assert [(200 / 255 - m) / s for m, s in zip(mean, std, strict=True)] == pytest.approx([(200 - 127) / 128] * 3)


@pytest.mark.parametrize("name", ["xception65.no", "vit_small_patch14_dinov2.no"])
def test_an_unknown_tag_is_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=rf"got {name} \(Invalid pretrained tag"):
        build_encoder(name, "deep", 16)


@pytest.mark.parametrize(("output_stride", "dilation"), [(16, 1), (8, 2)])
def test_xception_dilates_all_that_lies_behind_a_stride_that_was_given_up(output_stride: int, dilation: int) -> None:
    with torch.device("meta"):
        net = build_encoder("xception65", "deep", output_stride).net
    depthwise = [m for m in net.blocks.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 21 * 3
    assert {m.dilation for m in depthwise[:9]} == {(1, 1)}
    assert {m.dilation for m in depthwise[9:]} == {(dilation, dilation)}
    assert {m.stride for m in depthwise[11:]} == {(1, 1)}


def test_xceptions_low_map_is_the_input_of_the_third_relu_and_nothing_changes_it() -> None:
    encoder = build_encoder("xception65", "deep", 16).eval()
    block, seen = encoder.net.blocks[1], []
    block.stack.act3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    images = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        features = encoder(images)
        whole = encoder.net.forward_features(images)
    assert torch.equal(features.maps[0], seen[0])
    assert float(features.maps[0].min()) < 0.0
    torch.testing.assert_close(features.high_BDhw, whole)  # timm's own way through the same blocks


def test_xception_begins_as_published() -> None:
    net = build_encoder("xception65", "deep", 16).net
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.0003}
    pointwise, depthwise = net.blocks[10].stack.conv2.conv_pw.weight, net.blocks[10].stack.conv2.conv_dw.weight
    assert float(pointwise.detach().std()) == pytest.approx((2 / 728) ** 0.5, rel=0.01)
    assert float(depthwise.detach().std()) == pytest.approx((2 / (9 * 728)) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vit_small_patch14_dinov2", 22_056_576),
        ("vit_base_patch14_dinov2.lvd142m", 86_580_480),
        ("vit_large_patch14_dinov2", 304_368_640),
    ],
)
def test_transformers_have_the_published_parameters_but_for_the_mask_token(name: str, published: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, "deep", 16)
        features = encoder(torch.zeros(2, 3, 42, 70))
    dim = encoder.channels[0]
    assert encoder.classifier_shapes()["mask_token"].numel() == dim
    assert sum(p.numel() for p in encoder.parameters()) + dim == published
    assert [tuple(map_.shape) for map_ in features.maps] == [(2, dim, 3, 5)] * 4
    assert encoder.channels == (dim,) * 4
    assert encoder.middle_channels is None
    assert features.middle_BDhw is None


@pytest.fixture(scope="module")
def small() -> DinoV2:
    torch.manual_seed(0)
    encoder = build_encoder("vit_small_patch14_dinov2", "deep", 16)
    assert isinstance(encoder, DinoV2)
    return encoder.eval()


def test_a_transformer_gives_the_normalised_outputs_of_its_blocks(small: DinoV2) -> None:
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        ours = small(images).maps
        blocks = DINOV2["vit_small_patch14_dinov2"]
        theirs = small.net.get_intermediate_layers(images, n=blocks, reshape=True, norm=True)
    for mine, map_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, map_, rtol=1e-4, atol=1e-4)


def cubic(length: int, own: int) -> NDArray[np.float64]:
    """Bicubic weights [length, own] from a grid of `own` to one of `length`, by the scale (length + 0.1) / own."""
    weights = np.zeros((length, own))
    for i in range(length):
        x = (i + 0.5) * own / (length + 0.1) - 0.5
        for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - tap)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
            weights[i, min(max(tap, 0), own - 1)] += near if d <= 1 else far
    return weights


@pytest.mark.parametrize("grid", [(23, 41), (57, 57), (1, 3)])
def test_positions_are_interpolated_as_dinov2_does(small: DinoV2, grid: tuple[int, int]) -> None:
    with torch.no_grad():
        found = small.positions(grid)[0].numpy()
        own = small.net.pos_embed[0].numpy()
    assert np.array_equal(found[0], own[0])  # the class token's
    rows, columns = (cubic(length, 37) for length in grid)
    expected = np.einsum("ai,bj,ijd->abd", rows, columns, own[1:].reshape(37, 37, 384))
    np.testing.assert_allclose(found[1:].reshape(*grid, 384), expected, atol=1e-5)
    assert small.positions((37, 37)) is small.net.pos_embed


def test_a_transformer_begins_with_full_layer_scale_and_every_parameter_learns(small: DinoV2) -> None:
    assert float(small.net.blocks[3].ls1.gamma[0].detach()) == 1.0
    encoder = copy.deepcopy(small)
    sum(map_.square().mean() for map_ in encoder(torch.randn(2, 3, 28, 42)).maps).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
