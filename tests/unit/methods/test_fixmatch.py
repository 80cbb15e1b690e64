"""FixMatch, on worked numbers: which pixels are trusted, whose label they take, and who learns."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from makers import PixelNet, semi_batch, step_context, tiny_segmentor
from pydantic import ValidationError

from raysemi.methods.base import Average
from raysemi.methods.fixmatch import FixMatch, FixMatchConfig

CLASSES = 3
SURE, UNSURE = (0.96, 0.03, 0.01), (0.02, 0.9, 0.08)


def run(batch, student=None, teacher=None, **settings):
    """Objectives, and everything observed; both networks say what the images hold unless they are given."""
    seen = {}
    method = FixMatch(FixMatchConfig(**settings), CLASSES)
    context = step_context(student or PixelNet(), teacher or PixelNet(), listener=seen.__setitem__)
    return method.objectives(batch, context), seen


def rows(*images):
    """[U, 3, 1, W]: a `PixelNet` then says these probabilities."""
    return torch.tensor(images).log().permute(0, 2, 1)[:, :, None]


def worked(weak, strong, valid=None, boxes=((0, 0, 0, 0), (0, 0, 0, 0))):
    weak_U3HW = rows(*weak)
    return replace(
        semi_batch(CLASSES),
        image_L3HW=rows([SURE] * 4),
        label_LHW=torch.tensor([[[0, 1, 255, 255]]]),
        weak_U3HW=weak_U3HW,
        strong_VU3HW=rows(*strong)[None],
        valid_UHW=torch.ones(2, 1, 4, dtype=torch.bool) if valid is None else torch.tensor(valid)[:, None],
        boxes_VU4=torch.tensor([boxes]),
    )


def test_it_is_a_method():
    method = FixMatch(FixMatchConfig(), CLASSES)
    assert method.average == Average(kind="ema")
    assert (method.strong_views, method.second_view) == (1, False)
    assert not method.state_dict()
    with pytest.raises(ValidationError, match="must be ema or period"):
        FixMatchConfig(average={"kind": "none"})


def test_the_threshold_chooses_and_all_valid_pixels_count():
    """Of 8 pixels 7 are valid, 3 of them trusted: the mean runs over 7."""
    weak = [[SURE, UNSURE, SURE, SURE], [UNSURE, UNSURE, UNSURE, SURE]]
    strong = [[(0.5, 0.3, 0.2)] * 4, [(0.25, 0.5, 0.25)] * 4]
    valid = [[True, True, False, True], [True, True, True, True]]
    terms, seen = run(worked(weak, strong, valid))
    assert seen["trusted"].squeeze(1).tolist() == [[True, False, False, True], [False, False, False, True]]
    assert seen["kept_ratio"].item() == pytest.approx(3 / 7)
    consistency = terms["consistency"]
    assert consistency.total.item() == pytest.approx(-math.log(0.5 * 0.5 * 0.25), rel=1e-5)
    assert (consistency.normaliser.item(), consistency.weight, consistency.side) == (7, 0.5, "unsupervised")
    labeled = terms["supervised"]
    assert labeled.total.item() == pytest.approx(-math.log(0.96 * 0.03), rel=1e-5)
    assert (labeled.normaliser.item(), labeled.weight, labeled.side) == (2, 0.5, "supervised")
    lower, _ = run(worked(weak, strong, valid), threshold=0.9 - 1e-6)
    assert lower["consistency"].total.item() == pytest.approx(-math.log(0.5 * 0.3 * 0.5 * 0.25 * 0.5**3), rel=1e-5)
    assert lower["consistency"].normaliser.item() == 7


def test_a_pixel_at_the_threshold_is_trusted():
    even = [[(0.5, 0.5, 1e-30)] * 4] * 2
    for threshold, kept in ((0.5, 1.0), (0.5000001, 0.0)):
        assert run(worked(even, even), threshold=threshold)[1]["kept_ratio"].item() == kept


def test_pasted_pixels_take_image_label_trust_and_validity_of_the_partner():
    other = (0.01, 0.03, 0.96)
    weak = [[SURE] * 4, [other, other, UNSURE, other]]
    strong = [[(0.5, 0.25, 0.25)] * 4, [(0.2, 0.3, 0.5)] * 4]
    valid = [[True] * 4, [True, False, True, True]]
    # Image 0 takes pixels 0..2 of image 1: the first is of its class, the second is padding, the third is not trusted.
    terms, seen = run(worked(weak, strong, valid, boxes=((0, 0, 3, 1), (0, 0, 0, 0))))
    kept = [0.5, 0.5, 0.5, 0.5]  # image 0: pasted pixel 0 (class 2) and its own pixel 3; image 1: pixels 0 and 3
    assert terms["consistency"].total.item() == pytest.approx(-math.log(math.prod(kept)), rel=1e-5)
    assert terms["consistency"].normaliser.item() == 3 + 3
    assert seen["pseudo"][0].unique().tolist() == [0]  # what is shown belongs to the image that was not mixed
    wrong, _ = run(worked(weak, strong[::-1], valid, boxes=((0, 0, 3, 1), (0, 0, 0, 0))))
    assert wrong["consistency"].total > terms["consistency"].total


def test_ignored_and_padded_pixels_change_nothing():
    batch = replace(semi_batch(CLASSES), boxes_VU4=torch.zeros(1, 2, 4, dtype=torch.int64))
    views = {"image": batch.image_L3HW, "strong": batch.strong_VU3HW}
    for view in views.values():
        view.requires_grad_()
    terms, _ = run(batch, threshold=0.0)
    grads = [
        torch.autograd.grad(terms[name].total, view, retain_graph=True)[0]
        for name, view in zip(("supervised", "consistency"), views.values(), strict=True)
    ]
    assert torch.equal(grads[0].abs().amax(dim=1) > 0, batch.label_LHW != 255)
    assert torch.equal(grads[1][0].abs().amax(dim=1) > 0, batch.valid_UHW)

    changed = copy.deepcopy(batch)
    padding, ignored = ~changed.valid_UHW[:, None], (changed.label_LHW == 255)[:, None]
    changed.image_L3HW.data.masked_fill_(ignored, 0.3)
    changed.weak_U3HW.masked_fill_(padding, 9.0)
    changed.strong_VU3HW.data.masked_fill_(padding, 0.7)
    for name, term in run(changed, threshold=0.0)[0].items():
        assert term.total == terms[name].total
        assert term.normaliser == terms[name].normaliser


def test_nothing_valid_teaches_nothing():
    batch = semi_batch(CLASSES)
    terms, seen = run(replace(batch, valid_UHW=torch.zeros_like(batch.valid_UHW)))
    assert (terms["consistency"].total.item(), terms["consistency"].normaliser.item()) == (0, 0)
    assert seen["kept_ratio"].item() == 0


def test_no_gradient_reaches_the_teacher_nor_the_weak_view():
    student, teacher = tiny_segmentor(CLASSES), tiny_segmentor(CLASSES, seed=1).eval()
    batch = semi_batch(CLASSES)
    batch.weak_U3HW.requires_grad_()
    terms, _ = run(batch, student, teacher, threshold=0.0)
    sum(term.total for term in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert batch.weak_U3HW.grad is None


def test_the_pseudo_labels_are_the_teachers():
    teacher = PixelNet()
    with torch.no_grad():
        teacher.factor_K3.copy_(torch.eye(3).roll(1, dims=0))  # says one class further than the student
    weak = [[SURE] * 4, [SURE] * 4]
    _, seen = run(worked(weak, weak), teacher=teacher)
    assert seen["pseudo"].unique().tolist() == [1]


def test_the_factor_scales_the_consistency_alone():
    batch = semi_batch(CLASSES)
    (one, _), (three, _) = run(batch, threshold=0.4), run(batch, threshold=0.4, unsupervised_weight=3.0)
    assert {name: term.weight for name, term in one.items()} == {"supervised": 0.5, "consistency": 0.5}
    assert {name: term.weight for name, term in three.items()} == {"supervised": 0.5, "consistency": 1.5}
    assert all(one[name].total == three[name].total for name in one)
    assert one["consistency"].total > 0
