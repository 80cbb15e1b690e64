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
from raysemi.models.segmentor import Channels, ModelConfig, Segmentor, build_segmentor

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
    [("resnet101", 21, 59_468_085), ("resnet101", 19, 59_467_571), ("resnet50", 21, 40_475_957)],
)
def test_paper_networks_have_the_published_number_of_parameters(encoder: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        network = build_segmentor(ModelConfig(encoder=encoder, weights="random"), classes, None, 0)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert (
        sum(p.numel() for p in network.encoder_parameters()) + sum(p.numel() for p in network.other_parameters())
        == parameters
    )


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


def test_auto_weights_of_the_paper_networks_are_refused() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=r"must be a file or random for resnet50"):
        build_segmentor(ModelConfig(encoder="resnet50"), 3, None, 0)


def test_importing_the_network_does_not_import_timm() -> None:
    code = "import sys, raysemi.models.segmentor; print({'timm', 'torchvision', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
