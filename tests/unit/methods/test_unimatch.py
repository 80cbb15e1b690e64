"""UniMatch V1 and V2: which pixels are counted, what is mixed with what, and whose gradient it is."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from makers import PixelNet, semi_batch, step_context, tiny_segmentor

from raysemi.errors import ConfigError
from raysemi.methods.base import Average, in_eval_mode
from raysemi.methods.unimatch import UniMatch, UniMatchConfig
from raysemi.methods.unimatch_v2 import UniMatchV2, UniMatchV2Config
from raysemi.ops.losses import pixel_cross_entropy

CLASSES = 3


class Decoding(PixelNet):
    """A `PixelNet` in the two halves that a perturbation of features comes between."""

    def encode(self, images_B3HW):
        return self(images_B3HW).features

    def decode(self, features, size):
        return replace(self(features.maps[0]), features=features)


def build(version=1, frozen=True, **settings):
    """Method, student and teacher; frozen BatchNorm, else every image would reach every term."""
    method = (
        UniMatch(UniMatchConfig(**{"threshold": 0.0, **settings}), CLASSES)
        if version == 1
        else UniMatchV2(UniMatchV2Config(**{"threshold": 0.0, **settings}), CLASSES)
    )
    student = tiny_segmentor(CLASSES, frozen=frozen)
    return method, student, None if version == 1 else copy.deepcopy(student).eval()


def run(method, student, teacher, batch, **rest):
    seen = {}
    return method.objectives(batch, step_context(student, teacher, listener=seen.__setitem__, **rest)), seen


def total(terms):
    return sum(term.weight * term.total / term.normaliser.clamp(min=1) for term in terms.values())


def test_worked_loss_counts_all_real_pixels():
    """CE (2, 1, .5, 4, 9), confidence (.99, .97, .96, .50, .99), the last pixel padded, tau .95: 0.875."""
    surprise = torch.tensor([2.0, 1.0, 0.5, 4.0, 9.0])
    logits = torch.stack((-surprise, (-(-surprise).exp()).log1p()))[None, :, None]  # cross-entropy of class 0
    confidence = torch.tensor([0.99, 0.97, 0.96, 0.50, 0.99])[None, None]
    valid = torch.tensor([True, True, True, True, False])[None, None]
    labels = torch.zeros(1, 1, 5, dtype=torch.int64)
    value, count = pixel_cross_entropy(logits, labels, counted_BHW=valid, weight_BHW=(confidence >= 0.95) & valid)
    assert (value / count).item() == pytest.approx(0.875, rel=1e-6)


@pytest.mark.parametrize(
    ("version", "values", "expected"),
    [
        (1, {"supervised": 1, "strong_1": 2, "strong_2": 4, "perturbed": 8}, 3.25),
        (2, {"supervised": 1, "strong_1": 2, "strong_2": 4}, 2.0),
    ],
)
def test_worked_totals(version, values, expected):
    terms, _ = run(*build(version), semi_batch(CLASSES, views=2))
    assert sum(terms[name].weight * value for name, value in values.items()) == expected
    assert set(terms) == set(values)
    assert {name for name, term in terms.items() if term.side == "supervised"} == {"supervised"}


def test_they_are_methods():
    v1, v2 = build(1)[0], build(2)[0]
    assert (v1.strong_views, v2.strong_views) == (2, 2)
    assert (v1.average, v2.average) == (Average(), Average(kind="ema"))
    assert not v1.state_dict()
    assert not v2.state_dict()


@pytest.mark.parametrize("version", [1, 2])
def test_threshold_0_trusts_every_real_pixel_and_1_none(version):
    batch = semi_batch(CLASSES, views=2)
    terms, seen = run(*build(version), batch)
    assert seen["kept_ratio"].item() == 1.0
    assert torch.equal(seen["trusted"], batch.valid_UHW)
    method, student, teacher = build(version, threshold=0.9999)
    terms, seen = run(method, student, teacher, batch)
    assert seen["kept_ratio"].item() == 0.0
    unsupervised = [term.total for name, term in terms.items() if name != "supervised"]
    assert all(value.item() == 0.0 for value in unsupervised)
    grads = torch.autograd.grad(
        sum(unsupervised), [p for p in student.parameters() if p.requires_grad], allow_unused=True
    )
    assert all(grad is None or not grad.any() for grad in grads)  # zero, not NaN


def constant_batch():
    """Every view of an image is one colour, its weak view another of its own; boxes of both views differ."""
    batch = semi_batch(CLASSES, views=2)
    strong_VU3HW = torch.stack(
        [
            torch.stack([torch.full((3, 33, 41), 0.1 * (1 + 2 * view + image)) for image in range(2)])
            for view in range(2)
        ]
    )
    weak_U3HW = torch.zeros_like(batch.weak_U3HW)
    weak_U3HW[0, 1], weak_U3HW[1, 2] = 9.0, 9.0  # a PixelNet says class 1 of image 0, class 2 of image 1
    boxes_VU4 = torch.tensor([[[7, 5, 36, 22], [0, 0, 0, 0]], [[2, 9, 11, 30], [4, 4, 30, 10]]])
    return replace(batch, strong_VU3HW=strong_VU3HW, weak_U3HW=weak_U3HW, boxes_VU4=boxes_VU4)


@pytest.mark.parametrize("version", [1, 2])
def test_inside_the_box_everything_is_the_partners(version, monkeypatch):
    batch, taught = constant_batch(), []
    module = f"raysemi.methods.unimatch{'' if version == 1 else '_v2'}"

    def record(logits, labels, *, counted_BHW=None, weight_BHW=None):
        taught.append((labels, counted_BHW, weight_BHW))
        return pixel_cross_entropy(logits, labels, counted_BHW=counted_BHW, weight_BHW=weight_BHW)

    passes = []

    class Watched(Decoding):
        def encode(self, images):
            passes.append(images)
            return super().encode(images)

        def forward(self, images):
            passes.append(images)
            return super().forward(images)

    monkeypatch.setattr("raysemi.methods.weighting.pixel_cross_entropy", record)
    method = build(version)[0]
    if version == 2:  # a PixelNet has three channels, which no dropout may take
        monkeypatch.setattr(f"{module}.with_complementary", lambda features, *rest: features)
    else:
        monkeypatch.setattr(
            f"{module}.with_perturbed",
            lambda features, rows, *rest: replace(
                features, maps=tuple(torch.cat((values, values[rows])) for values in features.maps)
            ),
        )
    teacher = None if version == 1 else PixelNet()
    method.objectives(batch, step_context(Watched(), teacher))
    strong = passes[-1] if version == 1 else passes[0]  # V2 sees labeled and strong images in one pass
    strong_VU3HW = strong[-4:].view(2, 2, 3, 33, 41)
    for view in range(2):
        labels, valid, kept = taught[view]
        for image in range(2):
            left, top, right, bottom = batch.boxes_VU4[view, image].tolist()
            box = torch.zeros(33, 41, dtype=torch.bool)
            box[top:bottom, left:right] = True
            own, other = batch.strong_VU3HW[view, image], batch.strong_VU3HW[view, 1 - image]
            assert torch.equal(strong_VU3HW[view, image], torch.where(box, other, own))
            assert torch.equal(labels[image], torch.where(box, 2 - image, 1 + image))
            assert torch.equal(valid[image], torch.where(box, batch.valid_UHW[1 - image], batch.valid_UHW[image]))
            assert torch.equal(kept[image] > 0, valid[image])
    if version == 1:  # the perturbed term learns un-mixed labels
        labels, valid, _ = taught[2]
        assert torch.equal(labels, torch.tensor([1, 2])[:, None, None].expand_as(labels))
        assert torch.equal(valid, batch.valid_UHW)


@pytest.mark.parametrize("version", [1, 2])
def test_each_term_sees_its_own_view(version):
    method, student, teacher = build(version)
    batch = semi_batch(CLASSES, views=2)
    views = {"labeled": batch.image_L3HW, "weak": batch.weak_U3HW, "strong": batch.strong_VU3HW}
    for view in views.values():
        view.requires_grad_()
    terms, _ = run(method, student, teacher, batch)
    for name, term in terms.items():
        found = torch.autograd.grad(term.total, list(views.values()), retain_graph=True, allow_unused=True)
        reached = {view for view, grad in zip(views, found, strict=True) if grad is not None and grad.any()}
        assert reached == {{"supervised": "labeled", "perturbed": "weak"}.get(name, "strong")}, name
        if name.startswith("strong"):
            other = {"strong_1": 1, "strong_2": 0}[name]
            assert not found[2][other].any()
    if version == 2:
        total(terms).backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_without_its_term_no_perturbed_features_are_made():
    method, student, _ = build(1, fp={"weight": 0.0})
    batch = semi_batch(CLASSES, views=2)
    batch.weak_U3HW.requires_grad_()
    terms, _ = run(method, student, None, batch)
    assert set(terms) == {"supervised", "strong_1", "strong_2"}
    total(terms).backward()
    assert batch.weak_U3HW.grad is None or not batch.weak_U3HW.grad.any()


def test_padding_never_changes_the_loss():
    batch = semi_batch(CLASSES, views=2)
    for version in (1, 2):
        student, method = Decoding(), build(version)[0]
        first = run(method, student, PixelNet(), batch)[0]
        changed = copy.deepcopy(batch)
        changed.weak_U3HW.masked_fill_(~changed.valid_UHW[:, None], 9.0)
        changed.strong_VU3HW.masked_fill_(~changed.valid_UHW[None, :, None], 0.7)
        for name, term in run(method, student, PixelNet(), changed)[0].items():
            assert term.total.item() == pytest.approx(first[name].total.item(), rel=1e-6), (version, name)
            assert term.normaliser == first[name].normaliser


@pytest.mark.parametrize("version", [1, 2])
def test_a_single_image_has_no_partner(version):
    with pytest.raises(ConfigError, match="at least 2 images to mix"):
        run(*build(version), semi_batch(CLASSES, unlabeled=1, views=2))


def test_compat_labels_the_partner_in_eval_mode_and_leaves_no_trace():
    batch = semi_batch(CLASSES, views=2)
    method, student, _ = build(1, frozen=False, compat={"partner_eval": True})
    plain = UniMatch(UniMatchConfig(threshold=0.0), CLASSES)
    twin = copy.deepcopy(student)
    terms, _ = run(method, student, None, batch)
    ours, _ = run(plain, twin, None, batch)
    assert student.training
    for name, buffer in student.named_buffers():
        torch.testing.assert_close(buffer, dict(twin.named_buffers())[name])
    assert terms["perturbed"].total == ours["perturbed"].total
    assert terms["strong_1"].total != ours["strong_1"].total  # other labels inside the box


def test_a_second_view_fills_the_box_with_what_the_student_says_of_it_in_eval_mode(monkeypatch):
    class Recording(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.seen = network, []

        def forward(self, images):
            self.seen.append((self.network.training, images.detach().clone()))
            return self.network(images)

        def encode(self, images):
            return self.network.encode(images)

        def decode(self, features, size):
            return self.network.decode(features, size)

    method, student, _ = build(1, cutmix={"partner": "second_view"}, threshold=0.0)
    assert method.second_view
    batch = semi_batch(CLASSES, views=2, second_view=True)
    box_U4 = torch.tensor([2, 3, 20, 18]).repeat(len(batch.slots_U), 1)
    batch = replace(batch, boxes_VU4=box_U4.expand(2, -1, -1))
    said_UHW = in_eval_mode(student, batch.second_weak_U3HW).argmax(dim=1)
    student, taught, loss = Recording(student.train()), [], method.weighting.cross_entropy

    def record(logits, labels, *rest):
        taught.append(labels)
        return loss(logits, labels, *rest)

    monkeypatch.setattr(method.weighting, "cross_entropy", record)
    run(method, student, None, batch)
    assert all(torch.equal(labels[:, 3:18, 2:20], said_UHW[:, 3:18, 2:20]) for labels in taught[:2])
    (mode, weak_U3HW), (_, strong_B3HW) = student.seen
    assert not mode
    assert torch.equal(weak_U3HW, batch.second_weak_U3HW)
    for own_U3HW, mixed_U3HW in zip(batch.strong_VU3HW, strong_B3HW.chunk(2), strict=True):
        assert torch.equal(mixed_U3HW[..., 3:18, 2:20], batch.second_strong_U3HW[..., 3:18, 2:20])
        assert torch.equal(mixed_U3HW[..., 18:, :], own_U3HW[..., 18:, :])
        assert not torch.equal(mixed_U3HW, own_U3HW)


def test_compat_perturbs_the_labeled_half_too():
    batch = semi_batch(CLASSES, views=2)
    method, student, _ = build(1, frozen=False, compat={"fp_labeled": True})
    shapes = []
    student.decoder.register_forward_hook(lambda module, inputs, output: shapes.append(len(output[0])))
    terms, _ = run(method, student, None, batch)
    assert shapes == [8, 4]  # 4 clean and 4 perturbed; then both strong views
    shapes.clear()
    run(UniMatch(UniMatchConfig(threshold=0.0), CLASSES), student, None, batch)
    assert shapes == [6, 4]
    assert math.isfinite(total(terms).item())


def test_the_teacher_labels_in_v2_and_the_student_in_v1():
    batch = semi_batch(CLASSES, views=2)
    other = PixelNet()
    with torch.no_grad():
        other.factor_K3.copy_(torch.eye(3).roll(1, dims=0))
    student = Decoding()
    own, shifted = batch.weak_U3HW.argmax(dim=1), (batch.weak_U3HW.argmax(dim=1) + 1) % 3
    for version, expected in ((1, own), (2, shifted)):
        _, seen = run(build(version)[0], student, other, batch)
        assert torch.equal(seen["pseudo"], expected)
