"""The detector: what goes in and out, whose weights are whose, what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from raysemi.errors import ConfigError
from raysemi.models.detector import DetectorConfig, build_detector

SMALL = {"encoder": "test_efficientnet", "weights": "random", "channels": 16, "hidden": 24, "regions": 16}


def detector(seed=0, kinds=3, score=0.0, most=7, **settings):
    config = DetectorConfig(**SMALL | {"anchors": (8, 16, 32, 48, 64)} | settings)
    return build_detector(config, kinds, score, most, seed)


def test_the_seed_decides_the_first_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = detector(), detector(), detector(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = one.state_dict()
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in weights.items())
    assert not torch.equal(
        weights["net.rpn.head.cls_logits.weight"], other.state_dict()["net.rpn.head.cls_logits.weight"]
    )


def test_losses_reach_every_parameter_and_an_empty_image_has_some_too():
    network = detector().train()
    images = torch.rand(2, 3, 64, 80)
    boxes = [torch.tensor([[4.0, 6.0, 30.0, 40.0], [40.0, 8.0, 60.0, 30.0]]), torch.zeros(0, 4)]
    losses = network.losses(images, boxes, [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64)])
    assert set(losses) == {"classifier", "box_reg", "objectness", "rpn_box_reg"}
    sum(losses.values()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not without
    encoder, other = list(network.encoder_parameters()), list(network.other_parameters())
    assert len(encoder) + len(other) == len(list(network.parameters()))
    assert not set(encoder) & set(other)


def test_what_is_found_lies_in_the_image_at_its_own_size():
    """No resize: torchvision would enlarge the image to 800 pixels, and take a minute for it."""
    network, sizes = detector().eval(), []
    network.net.backbone.register_forward_hook(lambda module, seen, maps: sizes.append(seen[0].shape[2:]))
    with torch.no_grad():
        found = network([torch.rand(3, 64, 80), torch.rand(3, 40, 50)])
    assert [tuple(size) for size in sizes] == [(64, 96)]  # joined, and padded to multiples of 32
    for one, (height, width) in zip(found, ((64, 80), (40, 50)), strict=True):
        assert 0 < len(one.boxes_N4) <= 7
        assert one.boxes_N4.min() >= 0
        assert (one.boxes_N4[:, 2].max(), one.boxes_N4[:, 3].max()) <= (width, height)
        assert set(one.labels_N.tolist()) <= {0, 1, 2}
        assert torch.equal(one.scores_N, one.scores_N.sort(descending=True).values)


def test_frozen_statistics_stay():
    network = detector(batch_norm="frozen").train()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    network.losses(torch.rand(2, 3, 64, 64), [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    assert norms
    assert all(torch.equal(norm.running_mean, value) for norm, value in zip(norms, before, strict=True))
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())


@pytest.mark.parametrize("encoder", ["xception65", "vit_small_patch14_dinov2"])
def test_encoders_without_a_pyramid_are_refused(encoder):
    with pytest.raises(ConfigError, match=r"model\.encoder must be"):
        detector(encoder=encoder)


def test_anchors_are_sides():
    with pytest.raises(ValidationError, match="must be at least 1 each"):
        DetectorConfig(anchors=(0, 2, 3, 4, 5))
