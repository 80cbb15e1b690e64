"""The whole network: published sizes, first weights that depend on the seed alone, frozen BatchNorm, odd sizes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from raysemi.errors import ConfigError
from raysemi.models.encoders import Features
from raysemi.models.heads import AuxiliaryHead, RepresentationHead
from raysemi.models.segmentor import Channels, ModelConfig, Segmentor, build_segmentor

DINO = "vit_small_patch14_dinov2"
SMALL_DPT = ModelConfig(name="dpt", encoder=DINO, weights="random")
NARROW = ModelConfig(weights="random", channels=16, low_channels=8)


def heads(channels: Channels) -> dict[str, nn.Module]:
    low, high = channels.maps
    read = nn.Conv2d(channels.joined, 2, 1), nn.Conv2d(channels.penultimate, 2, 1)
    return {
        "extra": nn.Sequential(nn.Conv2d(high, 3, 1), nn.BatchNorm2d(3)),
        "low": nn.Conv2d(low, 2, 1),
        "middle": nn.Conv2d(channels.middle, 2, 1),
        "read": nn.ModuleList(read),
    }


@pytest.mark.parametrize(
    ("encoder", "classes", "parameters"),
    [
        *(("resnet101", 21, 59_468_085), ("resnet101", 19, 59_467_571), ("resnet50", 21, 40_475_957)),
        ("xception65", 81, 54_726_881),
    ],
)
def test_paper_networks_have_the_published_number_of_parameters(encoder: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        network = build_segmentor(ModelConfig(encoder=encoder, weights="random"), classes, None, 0)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert (
        sum(p.numel() for p in network.encoder_parameters()) + sum(p.numel() for p in network.other_parameters())
        == parameters
    )


@pytest.mark.parametrize(
    ("classes", "representation", "auxiliary", "parameters"),
    [(21, True, False, 64_459_989), (19, True, True, 66_824_422), (19, False, True, 64_987_622)],
    ids=["U2PL Pascal", "U2PL Cityscapes", "AEL Cityscapes"],
)
def test_wide_networks_have_the_published_number_of_parameters(
    classes: int, representation: bool, auxiliary: bool, parameters: int
) -> None:
    config = ModelConfig(
        name="deeplabv3plus_wide", encoder="resnet101", weights="random", output_stride=8, multi_grid=(2, 2, 4)
    )

    def asked(channels: Channels) -> dict[str, nn.Module]:
        assert (channels.middle, channels.joined, channels.penultimate) == (1024, 512, 256)
        own = {"representation": RepresentationHead(channels.joined)} if representation else {}
        return own | ({"auxiliary": AuxiliaryHead(channels.middle, classes)} if auxiliary else {})

    with torch.device("meta"):
        network = build_segmentor(config, classes, asked, 0)
        prediction = network(torch.zeros(2, 3, 129, 161))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for p in network.encoder_parameters()) == 42_623_936
    assert prediction.penultimate_BDhw.shape == (2, 256, 33, 41)
    assert prediction.features.middle_BDhw.shape == (2, 1024, 17, 21)
    if representation:
        assert network.heads["representation"](prediction.joined_BDhw).shape == (2, 256, 33, 41)


@pytest.mark.parametrize(("size", "published"), [("small", 24_795_637), ("base", 97_528_789)])
def test_dpt_networks_have_the_published_parameters_but_for_the_unused_ones(size: str, published: int) -> None:
    config = ModelConfig(name="dpt", encoder=f"vit_{size}_patch14_dinov2.lvd142m", weights="random")
    with torch.device("meta"):
        network = build_segmentor(config, 21, None, 0)
    mask_token = network.encoder.channels[0]
    residual_unit = sum(p.numel() for p in network.decoder.fusions[0].lateral.parameters())
    assert sum(p.numel() for p in network.parameters()) == published - mask_token - residual_unit


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_the_width_of_a_network_is_known_before_it_is_made(size: str) -> None:
    for config in (
        ModelConfig(name="dpt", encoder=f"vit_{size}_patch14_dinov2", weights="random"),
        ModelConfig(encoder="test_efficientnet", weights="random", channels=24),
    ):
        with torch.device("meta"):
            network = build_segmentor(config, 5, None, 0)
        assert config.penultimate_channels == network.penultimate_channels
        assert (network.encoder.middle_channels is None) == (config.name == "dpt")


def test_images_go_through_dpt_at_the_nearest_multiple_of_a_patch() -> None:
    with torch.device("meta"):
        network = build_segmentor(SMALL_DPT, 5, None, 0)
    sides = {375: 378, 500: 504, 333: 336, 1024: 1022, 640: 644, 427: 434, 518: 518, 798: 798, 5: 14, 20: 14, 21: 28}
    assert {side: network.seen_size((side,))[0] for side in sides} == sides


@pytest.fixture(scope="module")
def dpt() -> Segmentor:
    return build_segmentor(SMALL_DPT, 5, heads_of_transformer, 1)


def heads_of_transformer(channels: Channels) -> dict[str, nn.Module]:
    assert channels == Channels((384,) * 4, None, 64, 64, None)
    return {"extra": nn.Conv2d(channels.maps[-1], 3, 1)}


def test_dpt_resizes_what_goes_in_and_comes_out_in_two_steps(dpt: Segmentor) -> None:
    network, images = dpt.eval(), torch.rand(2, 3, 30, 51)
    with torch.no_grad():
        prediction = network(images)
        normalised = (images - network.mean) / network.std
        seen = nn.functional.interpolate(normalised, (28, 56), mode="bilinear", align_corners=True)
        logits = network.decoder(network.encoder(seen).maps)[0]
        assert logits.shape == (2, 5, 16, 32)
        for size in ((28, 56), (30, 51)):
            logits = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(prediction.logits_BKHW, logits)
    assert prediction.penultimate_BDhw.shape == prediction.joined_BDhw.shape == (2, 64, 16, 32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_parameter_of_dpt_learns_at_the_rate_of_its_part(dpt: Segmentor, layout: torch.memory_format) -> None:
    network = copy.deepcopy(dpt).train().to(memory_format=layout)
    prediction = network(torch.rand(2, 3, 28, 42).contiguous(memory_format=layout))
    (prediction.logits_BKHW.square().mean() + network.heads["extra"](prediction.features.high_BDhw).mean()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    encoder = {id(p) for p in network.encoder_parameters()}
    assert encoder == {id(p) for p in network.encoder.parameters()}
    others = {id(p) for p in network.other_parameters()}
    assert others == {id(p) for p in network.parameters()} - encoder


def test_layouts_and_copies_of_dpt_agree(dpt: Segmentor) -> None:
    images = torch.rand(1, 3, 28, 42)
    other = copy.deepcopy(dpt).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = dpt.eval()(images).logits_BKHW
        last = other(images.to(memory_format=torch.channels_last)).logits_BKHW
        other.encoder.net.cls_token.add_(1.0)
        assert torch.equal(dpt(images).logits_BKHW, plain)
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-5)


def test_a_copy_of_xception_is_its_own() -> None:
    network = build_segmentor(NARROW.model_copy(update={"encoder": "xception65"}), 5, None, 1).eval()
    images, other = torch.rand(1, 3, 33, 49), copy.deepcopy(network)
    with torch.no_grad():
        before = network(images).logits_BKHW
        assert torch.equal(other(images).logits_BKHW, before)
        other.encoder.net.blocks[1].stack.conv2.bn_pw.bias.add_(1.0)
        assert torch.equal(network(images).logits_BKHW, before)
        assert not torch.equal(other(images).logits_BKHW, before)


def test_the_wide_decoder_drops_what_the_caller_says_and_nothing_by_itself() -> None:
    network = build_segmentor(NARROW.model_copy(update={"name": "deeplabv3plus_wide"}), 5, None, 1)
    images = torch.rand(2, 3, 33, 48)
    network.train()
    first, again = network(images).logits_BKHW, network(images).logits_BKHW
    torch.testing.assert_close(first, again)  # train mode draws nothing
    features = network.encode(images)
    kept = network.decode(features, (33, 48), keep=lambda name, channels: torch.ones(2, channels))
    torch.testing.assert_close(kept.logits_BKHW, first)
    dropped = network.decode(features, (33, 48), keep=lambda name, channels: torch.zeros(2, channels))
    assert dropped.joined_BDhw[:, :8].any()
    assert not dropped.joined_BDhw[:, 8:].any()
    bias = network.decoder.classifier.bias[:, None, None].expand(2, 5, 33, 48)
    torch.testing.assert_close(dropped.logits_BKHW, bias)


def test_the_width_of_the_low_map_follows_the_decoder() -> None:
    with torch.device("meta"):
        for name, low in (("deeplabv3plus", 48), ("deeplabv3plus_wide", 16)):
            config = ModelConfig(name=name, weights="random", channels=16)
            network = build_segmentor(config, 4, None, 0)
            assert network.decoder.reduce[0].out_channels == low


@pytest.mark.parametrize("stem", ["deep", "plain"])
@pytest.mark.parametrize(("side", "low", "high"), [(321, 81, 21), (513, 129, 33), (801, 201, 51)])
def test_maps_have_the_published_sizes(stem: str, side: int, low: int, high: int) -> None:
    with torch.device("meta"):
        network = build_segmentor(ModelConfig(encoder="resnet50", weights="random", stem=stem), 21, None, 0)
        prediction = network(torch.zeros(2, 3, side, side))
    assert prediction.features.maps[0].shape == (2, 256, low, low)
    assert prediction.features.high_BDhw.shape == (2, 2048, high, high)
    assert prediction.penultimate_BDhw.shape == (2, 256, low, low)
    assert prediction.logits_BKHW.shape == (2, 21, side, side)


@pytest.mark.parametrize(("output_stride", "rates"), [(16, (6, 12, 18)), (8, (12, 24, 36))])
def test_rates_follow_the_output_stride(output_stride: int, rates: tuple[int, ...]) -> None:
    config = ModelConfig(weights="random", output_stride=output_stride)
    with torch.device("meta"):
        network = build_segmentor(config, 4, None, 0)
        given = build_segmentor(config.model_copy(update={"atrous_rates": (1, 2, 5)}), 4, None, 0)
    assert tuple(branch[0].dilation[0] for branch in network.decoder.pyramid.branches) == (1, *rates)
    assert tuple(branch[0].dilation[0] for branch in given.decoder.pyramid.branches) == (1, 1, 2, 5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_size_goes_in_and_comes_out_and_every_parameter_learns(layout: torch.memory_format) -> None:
    network = build_segmentor(NARROW, 5, None, 1).to(memory_format=layout)
    images = torch.rand(2, 3, 97, 131).contiguous(memory_format=layout)
    prediction = network(images)
    assert prediction.logits_BKHW.shape == (2, 5, 97, 131)
    prediction.logits_BKHW.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_layouts_agree() -> None:
    network = build_segmentor(NARROW, 5, None, 1).eval()
    images = torch.rand(2, 3, 49, 66)
    with torch.no_grad():
        plain = network(images).logits_BKHW
        last = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)).logits_BKHW
    torch.testing.assert_close(plain, last, rtol=1e-4, atol=1e-5)


def test_forward_is_encode_then_decode_and_images_are_normalised_by_its_own_buffers() -> None:
    network = build_segmentor(NARROW, 5, heads, 1).eval()
    images = torch.rand(2, 3, 33, 48)
    prediction = network(images)
    features = network.encoder((images * 255 - 127) / 128)
    torch.testing.assert_close(prediction.features.high_BDhw, features.high_BDhw, rtol=1e-4, atol=1e-4)
    again = network.decode(Features(features.maps), (33, 48))
    torch.testing.assert_close(again.logits_BKHW, prediction.logits_BKHW, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.penultimate_BDhw, prediction.penultimate_BDhw, rtol=1e-4, atol=1e-4)
    read = network.heads["read"]
    assert read[0](prediction.joined_BDhw).shape[1:] == read[1](prediction.penultimate_BDhw).shape[1:] == (2, 9, 12)
    assert {"mean", "std"} <= set(network.state_dict())


def test_first_weights_depend_on_the_seed_alone_and_disturb_no_generator() -> None:
    torch.manual_seed(3)
    first = build_segmentor(NARROW, 5, None, 7).state_dict()
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    torch.manual_seed(99)
    again = build_segmentor(NARROW, 5, heads, 7).state_dict()
    other = build_segmentor(NARROW, 5, None, 8).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["encoder.net.conv_stem.weight"], other["encoder.net.conv_stem.weight"])
    assert not torch.equal(first["decoder.classifier.weight"], other["decoder.classifier.weight"])


def test_given_weights_leave_the_decoder_as_it_was() -> None:
    auto = build_segmentor(NARROW.model_copy(update={"weights": "auto"}), 5, None, 7).state_dict()
    random = build_segmentor(NARROW, 5, None, 7).state_dict()
    assert all(torch.equal(value, random[name]) for name, value in auto.items() if name.startswith("decoder."))
    assert not torch.equal(auto["encoder.net.conv_stem.weight"], random["encoder.net.conv_stem.weight"])


def test_heads_are_built_for_the_encoders_channels_and_train_with_the_decoder() -> None:
    network = build_segmentor(NARROW, 5, heads, 0)
    assert network.encoder.channels == (24, 320)
    assert network.heads["extra"][0].in_channels == 320
    assert network.heads["low"].in_channels == 24
    assert network.heads["middle"].in_channels == network.encoder.middle_channels == 112
    assert [head.in_channels for head in network.heads["read"]] == [8 + 16, 16]
    others = {id(p) for p in network.other_parameters()}
    assert {id(p) for p in network.heads.parameters()} <= others
    assert not others & {id(p) for p in network.encoder_parameters()}


@pytest.mark.parametrize("copied", [False, True])
def test_frozen_batchnorm_keeps_statistics_and_factors(copied: bool) -> None:
    network = build_segmentor(NARROW.model_copy(update={"batch_norm": "frozen"}), 5, heads, 0)
    network = copy.deepcopy(network) if copied else network
    network.eval().train()
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert norms["heads.extra.1"].training is False
    assert not any(norm.training for norm in norms.values())
    assert network.decoder.training
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network(torch.rand(1, 3, 40, 56)).logits_BKHW.mean().backward()  # one image is enough when nothing is normalised
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    frozen = {f"{n}.{p}" for n in norms for p in ("weight", "bias")}
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert not frozen & learning
    assert not frozen & {n for n, p in network.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in network.named_parameters()} - frozen


def test_batchnorm_trains_unless_frozen() -> None:
    network = build_segmentor(NARROW, 5, None, 0)
    before = network.decoder.reduce[1].running_mean.clone()
    network(torch.rand(2, 3, 40, 56))
    assert not torch.equal(before, network.decoder.reduce[1].running_mean)


def test_logits_keep_the_type_of_the_pass() -> None:
    network = build_segmentor(NARROW, 5, None, 0).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.rand(1, 3, 32, 48)).logits_BKHW
    assert logits.dtype == torch.bfloat16


def test_state_goes_into_another_network() -> None:
    network, other = build_segmentor(NARROW, 5, heads, 0), build_segmentor(NARROW, 5, heads, 1)
    other.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 32, 48)
    assert torch.equal(network.eval()(images).logits_BKHW, other.eval()(images).logits_BKHW)
    assert isinstance(other, Segmentor)


def test_a_stem_for_another_encoder_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"stem must be deep .* unless encoder is resnet50 or resnet101"):
        ModelConfig(stem="plain")
    with pytest.raises(ValidationError, match="atrous_rates must be at least 1"):
        ModelConfig(atrous_rates=(0, 1, 2))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"multi_grid": (2, 2, 4)},
            r"multi_grid must be null .* unless encoder is resnet50 or .*; got \[2, 2, 4",
        ),
        ({"multi_grid": (2, 0, 4), "encoder": "resnet50"}, "multi_grid must be at least 1"),
        ({"name": "dpt"}, "name must be dpt for .*; got dpt with tf_efficientnet_lite0. Set model.name=deeplabv3plus"),
        ({"encoder": DINO}, f"name must be dpt for .*; got deeplabv3plus with {DINO}. Set model.name=dpt"),
        (
            {"name": "dpt", "encoder": DINO, "channels": 64, "low_channels": 24},
            "channels and low_channels must .* with dpt.*; got 64, 24. Set model.channels=256 model.low_channels=null",
        ),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ModelConfig.model_validate(settings)


def test_auto_weights_of_the_paper_networks_are_refused() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=r"must be a file, timm or random for resnet50"):
        build_segmentor(ModelConfig(encoder="resnet50"), 3, None, 0)


def test_importing_the_network_does_not_import_timm() -> None:
    code = "import sys, raysemi.models.segmentor; print({'timm', 'torchvision', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
