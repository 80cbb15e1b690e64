"""Mean teacher: all valid pixels, no mixing, a weight that rises."""

from __future__ import annotations

import math

import pytest
import torch
from makers import PixelNet, semi_batch, step_context
from pydantic import ValidationError

from raysemi.methods.base import Average
from raysemi.methods.mean_teacher import MeanTeacher, MeanTeacherConfig

CLASSES = 3


def run(batch, step=100, **settings):
    seen = {}
    method = MeanTeacher(MeanTeacherConfig(**settings), CLASSES)
    context = step_context(PixelNet(), PixelNet(), step=step, steps=400, listener=seen.__setitem__)
    return method.objectives(batch, context), seen


def test_it_is_a_method():
    method = MeanTeacher(MeanTeacherConfig(), CLASSES)
    assert method.average == Average(kind="ema")
    assert method.strong_views == 1
    with pytest.raises(ValidationError, match="must be ema or period"):
        MeanTeacherConfig(average={"kind": "none"})


def test_every_valid_pixel_learns_the_teachers_label_and_nothing_is_mixed():
    batch = semi_batch(CLASSES)
    terms, seen = run(batch)
    label = batch.weak_U3HW.argmax(dim=1)
    surprise = -batch.strong_VU3HW[0].log_softmax(dim=1).gather(1, label[:, None])[:, 0]
    assert terms["consistency"].total.item() == pytest.approx(surprise[batch.valid_UHW].sum().item(), rel=1e-5)
    assert terms["consistency"].normaliser.item() == batch.valid_UHW.sum()
    assert torch.equal(seen["pseudo"], label)
    assert torch.equal(seen["trusted"], batch.valid_UHW)
    assert terms["supervised"].weight == 0.5


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (25, 0.25), (50, 0.5), (100, 1.0), (399, 1.0)])
def test_the_weight_rises_linearly_over_the_first_quarter(step, share):
    assert run(semi_batch(CLASSES), step, unsupervised_weight=3.0)[0]["consistency"].weight == pytest.approx(
        1.5 * share
    )
    assert run(semi_batch(CLASSES), step, ramp=0.0)[0]["consistency"].weight == 0.5


def test_nothing_valid_teaches_nothing():
    batch = semi_batch(CLASSES)
    batch.valid_UHW.fill_(False)
    terms, _ = run(batch)
    assert (terms["consistency"].total.item(), terms["consistency"].normaliser.item()) == (0, 0)
    assert math.isfinite(terms["supervised"].total.item())
