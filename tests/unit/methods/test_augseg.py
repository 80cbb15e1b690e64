"""AugSeg, on worked numbers: who is given labels, what is mixed into whom, and what the consistency is divided by."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from makers import PixelNet, semi_batch, step_context, tiny_segmentor
from pydantic import ValidationError

from raysemi.errors import ConfigError
from raysemi.methods.augseg import AugSeg, AugSegConfig, draw_mix
from raysemi.methods.base import Average
from raysemi.ops import draws
from raysemi.ops.pseudo_label import image_confidence

CLASSES = 3
SURE = (0.98, 0.01, 0.01)


class Spy(PixelNet):
    """A `PixelNet` that keeps the images of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[torch.Tensor] = []

    def forward(self, images_B3HW):
        self.passes.append(images_B3HW)
        return super().forward(images_B3HW)


def run(batch, student=None, teacher=None, step=0, **settings):
    """Objectives, and everything observed; both networks say what the images hold unless they are given."""
    seen = {}
    method = AugSeg(AugSegConfig(**settings), CLASSES)
    context = step_context(student or PixelNet(), teacher or PixelNet(), step=step, listener=seen.__setitem__)
    return method.objectives(batch, context), seen


def rows(*images):
    """[U, 3, 1, W]: a `PixelNet` then says these probabilities."""
    return torch.tensor(images).log().permute(0, 2, 1)[:, :, None]


def test_it_is_a_method():
    method = AugSeg(AugSegConfig(), CLASSES)
    assert method.average == Average(kind="ema", decay=0.999, copied=1)
    assert (method.strong_views, method.strong, method.second_view) == (1, "intensity", False)
    assert not method.state_dict()
    assert AugSegConfig(average={"decay": 0.9}).average == Average(kind="ema", decay=0.9, copied=1)
    for wrong, rule in (
        ({"average": {"kind": "none"}}, "must be ema or period"),
        ({"group": 1}, "greater than or equal to 2"),
        ({"labeled_beta": (0, 2)}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=rule):
            AugSegConfig(**wrong)


# --- the consistency ------------------------------------------------------------------------------------------------


def five_pixels():
    """Two equal images of 5 pixels, so that no mixing shows: CE (2, 1, .5, 4, 9), c (.99, .97, .96, .5, .99)."""
    weak = [(c, (1 - c) * 0.6, (1 - c) * 0.4) for c in (0.99, 0.97, 0.96, 0.5, 0.99)]
    strong = [(p, (1 - p) / 2, (1 - p) / 2) for p in (math.exp(-ce) for ce in (2.0, 1.0, 0.5, 4.0, 9.0))]
    return replace(
        semi_batch(CLASSES),
        image_L3HW=rows([SURE] * 5, [SURE] * 5),
        label_LHW=torch.tensor([[[0, 1, 255, 255, 255]]] * 2),
        weak_U3HW=rows(weak, weak),
        strong_VU3HW=rows(strong, strong)[None],
        valid_UHW=torch.tensor([[[True] * 4 + [False]]] * 2),
    )


def test_the_worked_loss():
    """augseg.md section 7.6: 3.5 / 5 = 0.70; over the pixels with a label 3.5 / 4 = 0.875."""
    for normaliser, wanted in (("all", 0.70), ("valid", 0.875)):
        terms, seen = run(five_pixels(), injection="never", normaliser=normaliser)
        consistency, labeled = terms["consistency"], terms["supervised"]
        assert (consistency.total / consistency.normaliser).item() == pytest.approx(wanted, rel=1e-5)
        assert (consistency.weight, consistency.side) == (1.0, "unsupervised")
        assert labeled.total.item() == pytest.approx(-2 * math.log(0.98 * 0.01), rel=1e-5)
        assert (labeled.normaliser.item(), labeled.weight, labeled.side) == (4, 1.0, "supervised")
    assert consistency.normaliser.item() == 8
    assert seen["trusted"].squeeze(1).tolist() == [[True, True, True, False, False]] * 2
    assert seen["kept_ratio"].item() == pytest.approx(6 / 8)
    assert run(five_pixels(), unsupervised_weight=2.5)[0]["consistency"].weight == 2.5


def test_without_a_threshold_every_valid_pixel_is_taught():
    terms, seen = run(five_pixels(), injection="never", threshold=0.0)
    assert terms["consistency"].total.item() == pytest.approx(2 * 7.5, rel=1e-5)
    assert seen["kept_ratio"].item() == 1.0


def test_padding_changes_nothing():
    batch = semi_batch(CLASSES)
    batch.strong_VU3HW.requires_grad_()
    changed = copy.deepcopy(batch)
    changed.weak_U3HW.masked_fill_(~changed.valid_UHW[:, None], 9.0)
    for step in range(4):  # boxes of four steps
        (terms, seen), (other, others) = (run(one, threshold=0.0, step=step) for one in (batch, changed))
        assert terms["consistency"].total == other["consistency"].total
        assert seen["image_confidence"] == others["image_confidence"]
    grad = torch.autograd.grad(run(batch, threshold=0.0, injection="never", step=1)[0]["consistency"].total,
                               batch.strong_VU3HW)[0]  # fmt: skip
    assert torch.equal(grad[0].abs().amax(dim=1).sum(0) > 0, torch.ones(33, 41).bool())  # image 0 has no padding
    assert (grad[0, 1].abs().amax(dim=0) == 0)[~batch.valid_UHW[1]].all()


def test_no_gradient_reaches_the_teacher_nor_the_weak_view():
    student, teacher = tiny_segmentor(CLASSES), tiny_segmentor(CLASSES, seed=1).eval()
    batch = semi_batch(CLASSES)
    batch.weak_U3HW.requires_grad_()
    terms, _ = run(batch, student, teacher, threshold=0.0)
    sum(term.total for term in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert batch.weak_U3HW.grad is None


def test_extra_weak_views_feed_batch_norm_alone():
    plain, extra = Spy(), Spy()
    batch = semi_batch(CLASSES, labeled=3, unlabeled=2)
    without, _ = run(batch, plain, threshold=0.0)
    with_weak, _ = run(batch, extra, threshold=0.0, extra_weak=True)
    assert [len(images) for images in (*plain.passes, *extra.passes)] == [5, 7]  # one pass a step
    assert torch.equal(extra.passes[0][3:5], batch.weak_U3HW)
    assert torch.equal(extra.passes[0][[0, 1, 2, 5, 6]], plain.passes[0])
    for name, term in without.items():
        assert term.total == with_weak[name].total


# --- adaptive CutMix ------------------------------------------------------------------------------------------------

SLOTS = torch.arange(12, 18)  # 6 unlabeled images of a rank: groups 4 and 5 of 3, 6 to 8 of 2
UNLABELED, LABELED, HEIGHT, WIDTH = 6, 3, 24, 40


def drawn(step, sure=0.3, slots=SLOTS, size=(HEIGHT, WIDTH), **settings):
    sure_U = torch.full((len(slots),), sure)
    return draw_mix(AugSegConfig(**settings), sure_U, slots, size, step_context(None, step=step))


def constant_maps():
    """Maps of images of one colour each, 0..5 and, labeled, 100..102; labels 7 + colour; a strip without a label."""

    def of(first, count):
        colour_B = first + torch.arange(count)
        plane_BHW = colour_B[:, None, None].expand(-1, HEIGHT, WIDTH)
        return plane_BHW[:, None].expand(-1, 3, -1, -1).float(), (7 + plane_BHW).clone(), 0.01 * plane_BHW

    own, labeled = of(0, UNLABELED), of(100, LABELED)
    labeled[1][:, :, :9] = 255
    return own, (labeled[0], labeled[1], torch.ones_like(labeled[2]))


def inside_HW(box):
    left, top, right, bottom = box.tolist()
    mask_HW = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask_HW[top:bottom, left:right] = True
    return mask_HW


def test_labels_lie_in_the_box_of_the_image_and_in_the_labeled_box_of_its_partner():
    """augseg.md section 7.4: only there, with confidence 1 and the true label."""
    own, labeled = constant_maps()
    mixes = [drawn(step, group=3) for step in range(30)]
    seen = 0
    for mix in mixes:
        image_U3HW, pseudo_UHW, confidence_UHW = mix.apply(own, labeled)
        for u, partner in enumerate(mix.partner_U.tolist()):
            box_HW, labeled_HW = inside_HW(mix.boxes_U4[u]), inside_HW(mix.labeled_boxes_U4[partner])
            given = int(mix.partner_U[partner]) * LABELED // UNLABELED  # the labeled image of the partner's partner
            from_label_HW = box_HW & labeled_HW
            assert torch.equal(image_U3HW[u, 1] >= 100, from_label_HW)
            assert (image_U3HW[u, :, from_label_HW] == 100 + given).all()
            assert torch.equal(pseudo_UHW[u][from_label_HW], labeled[1][given][from_label_HW])
            assert (confidence_UHW[u][from_label_HW] == 1.0).all()
            for source, region_HW in ((u, ~box_HW), (partner, box_HW & ~labeled_HW)):
                assert (image_U3HW[u, :, region_HW] == source).all()
                assert (pseudo_UHW[u][region_HW] == 7 + source).all()
                assert torch.equal(confidence_UHW[u][region_HW], own[2][source][region_HW])
            seen += int(from_label_HW.any())
    assert seen > 50
    assert {bool((mix.partner_U == torch.arange(6)).any()) for mix in mixes} == {True, False}


def test_images_are_mixed_as_they_were():
    """augseg.md section 7.5: mixing one image after the other in place gives another result."""
    own, labeled = constant_maps()
    differs = 0
    for step in range(10):
        mix = drawn(step, injection="never", group=3)
        before = own[0].clone()
        image_U3HW = mix.apply(own, labeled)[0]
        assert torch.equal(own[0], before)
        in_place = own[0].clone()
        for u, partner in enumerate(mix.partner_U.tolist()):
            box_HW = inside_HW(mix.boxes_U4[u])
            assert torch.equal(image_U3HW[u], torch.where(box_HW, own[0][partner], own[0][u]))
            in_place[u] = torch.where(box_HW, in_place[partner], in_place[u])
        differs += int(not torch.equal(in_place, image_U3HW))
    assert differs > 5


@pytest.mark.parametrize(("injection", "share"), [("adaptive", 0.7), ("always", 1.0), ("never", 0.0)])
def test_how_often_labels_are_injected(injection, share):
    """augseg.md section 7.3: over 10,000 images with a_b = .3, in .70 of them."""
    boxes = drawn(5, slots=torch.arange(10_000), size=(513, 513), injection=injection).labeled_boxes_U4
    injected = (boxes != 0).any(dim=1).float().mean().item()
    assert injected == pytest.approx(share, abs=0.015 if injection == "adaptive" else 0)


def test_an_image_of_which_the_teacher_is_sure_gets_no_labels():
    mix = draw_mix(AugSegConfig(), torch.tensor([1.0, 0.0] * 500), torch.arange(1000), (65, 65), step_context(None))
    injected_U = (mix.labeled_boxes_U4 != 0).any(dim=1)
    assert not injected_U[::2].any()
    assert injected_U[1::2].float().mean() > 0.99  # u > 0; a box may be too small to hold a pixel


def test_boxes_have_the_published_sizes():
    """20 % and 50 % of the area on average before they are cut off; one size a group, a centre an image."""
    mix = drawn(0, slots=torch.arange(40_000), size=(512, 512), injection="always", group=2)
    for name, boxes_U4, alpha, numbers, area in (
        ("labeled", mix.labeled_boxes_U4, 8, 9, 0.2),
        ("unlabeled", mix.boxes_U4, 4, 7, 0.5),
    ):
        area_G = 1 - draws.beta(step_context(None).uniform(torch.arange(20_000), f"{name} area", numbers), alpha)
        assert area_G.mean().item() == pytest.approx(area, abs=0.003)
        side_U = (2 * ((512 * area_G.sqrt()).long() // 2)).repeat_interleave(2)
        left, top, right, bottom = boxes_U4.unbind(1)
        for low, high in ((left, right), (top, bottom)):
            whole_U = (low > 0) & (high < 512)
            assert torch.equal((high - low)[whole_U], side_U[whole_U])
            assert ((high - low) <= side_U).all()
            assert whole_U.sum() > 10_000
        assert (left[::2] != left[1::2]).float().mean() > 0.5


def test_partners_stay_in_their_group_and_are_a_permutation():
    for group in (2, 3, 6):
        orders = set()
        for step in range(60):
            partner_U = drawn(step, group=group).partner_U
            assert partner_U.sort().values.tolist() == list(range(UNLABELED))
            assert torch.equal(partner_U // group, torch.arange(UNLABELED) // group)
            orders.add(tuple(partner_U[:group].tolist()))
        assert len(orders) >= {2: 2, 3: 6, 6: 50}[group]


def test_a_mix_does_not_depend_on_the_number_of_ranks():
    sure_U = torch.linspace(0, 1, 12)
    config = AugSegConfig(group=3, injection="adaptive")

    def mix(rows):
        return draw_mix(config, sure_U[rows], torch.arange(12)[rows], (33, 47), step_context(None, step=4))

    whole, halves = mix(slice(None)), [mix(slice(0, 6)), mix(slice(6, 12))]
    assert torch.equal(whole.partner_U, torch.cat((halves[0].partner_U, halves[1].partner_U + 6)))
    for name in ("labeled_boxes_U4", "boxes_U4"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    for labeled in (2, 4, 8, 24):  # fewer and more labeled images than unlabeled ones: who gives a label stays the same
        given = whole.partner_U * labeled // 12
        parts = [half.partner_U * (labeled // 2) // 6 + labeled // 2 * rank for rank, half in enumerate(halves)]
        assert torch.equal(given, torch.cat(parts))


def test_groups_that_do_not_divide_the_images_are_refused():
    with pytest.raises(ConfigError, match=r"method\.group must divide the unlabeled images of each rank; got 4 for 6"):
        drawn(0)
    assert len(drawn(0, slots=torch.arange(2)).partner_U) == 2  # null: as many as there are, below 4


def test_no_host_wait():
    sure_U, slots_U = torch.empty(4, device="meta"), torch.empty(4, device="meta", dtype=torch.int64)
    mix = draw_mix(AugSegConfig(), sure_U, slots_U, (5, 7), step_context(None))  # a meta tensor has nothing to read
    image_U3HW, label_UHW = torch.empty(4, 3, 5, 7, device="meta"), torch.empty(4, 5, 7, device="meta")
    mixed, _ = mix.apply((image_U3HW, label_UHW), (image_U3HW[:2], label_UHW[:2]))
    assert mixed.shape == (4, 3, 5, 7)


def test_the_student_learns_the_mixed_images_from_the_mixed_labels():
    """The whole method against its parts: what `Mix.apply` gives, and cross-entropy by hand."""
    batch = semi_batch(CLASSES, labeled=3, unlabeled=4)
    student, teacher = Spy(), PixelNet()
    teacher.factor_K3.data = 5.0 * torch.eye(3).roll(1, dims=0)
    kept = 0
    for step in range(6):
        terms, seen = run(batch, student, teacher, step=step, threshold=0.6, group=2)
        probability_UKHW = teacher(batch.weak_U3HW).logits_BKHW.softmax(dim=1)
        confidence_UHW, pseudo_UHW = probability_UKHW.max(dim=1)
        assert torch.equal(seen["pseudo"], pseudo_UHW)  # of the images that were not mixed
        pseudo_UHW = pseudo_UHW.masked_fill(~batch.valid_UHW, 255)
        sure_U = image_confidence(teacher(batch.weak_U3HW).logits_BKHW, batch.valid_UHW)
        mix = draw_mix(AugSegConfig(group=2), sure_U, batch.slots_U, (33, 41), step_context(None, step=step))
        certain_LHW = torch.ones(3, 33, 41)
        image_U3HW, label_UHW, confidence_UHW = mix.apply(
            (batch.strong_VU3HW[0], pseudo_UHW, confidence_UHW), (batch.image_L3HW, batch.label_LHW, certain_LHW)
        )
        assert torch.equal(student.passes[-1], torch.cat((batch.image_L3HW, image_U3HW)))
        log_UKHW = image_U3HW.log_softmax(dim=1)
        keep_UHW = (confidence_UHW >= 0.6) & (label_UHW != 255)
        chosen_UHW = log_UKHW.gather(1, label_UHW.clamp(max=2)[:, None])[:, 0]
        expected = -(chosen_UHW * keep_UHW).sum().item()
        assert terms["consistency"].total.item() == pytest.approx(expected, rel=1e-5)
        assert terms["consistency"].normaliser.item() == 4 * 33 * 41
        kept += int(keep_UHW.sum())
    assert kept > 1000
