"""Supervised, on worked numbers: the mean cross-entropy of the labeled pixels, and nothing else."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from makers import PixelNet, semi_batch, step_context
from torch import nn

from raysemi.methods.base import Average
from raysemi.methods.supervised import Supervised, SupervisedConfig

CLASSES = 3


def run(batch, student=None):
    (term,) = Supervised(SupervisedConfig(), CLASSES).objectives(batch, step_context(student or PixelNet())).values()
    return term


def log_image(*pixels):
    """[1, 3, 1, W]: a `PixelNet` then says these probabilities."""
    return torch.tensor(pixels).log().T.reshape(1, 3, 1, len(pixels))


def test_it_asks_for_nothing_unlabeled_and_keeps_no_copy():
    method = Supervised(SupervisedConfig(), CLASSES)
    assert method.average == Average(kind="none")
    assert (method.strong_views, method.second_view) == (0, False)
    assert not method.state_dict()


def test_worked_numbers():
    batch = replace(
        semi_batch(CLASSES),
        image_L3HW=log_image((0.5, 0.25, 0.25), (0.1, 0.8, 0.1), (0.2, 0.2, 0.6), (0.9, 0.05, 0.05)),
        label_LHW=torch.tensor([[[0, 2, 255, 1]]]),
    )
    term = run(batch)
    assert term.total.item() == pytest.approx(-math.log(0.5 * 0.1 * 0.05))
    assert (term.normaliser.item(), term.weight, term.side) == (3, 1.0, "supervised")


def test_it_is_the_mean_cross_entropy_over_annotated_pixels():
    batch = semi_batch(CLASSES)
    term = run(batch)
    expected = nn.functional.cross_entropy(batch.image_L3HW, batch.label_LHW, ignore_index=255)
    assert (term.total / term.normaliser).item() == pytest.approx(expected.item())


def test_ignored_pixels_give_nothing():
    batch, student = semi_batch(CLASSES), PixelNet()
    batch.image_L3HW.requires_grad_()
    run(batch, student).total.backward()
    reached = batch.image_L3HW.grad.abs().amax(dim=1) > 0
    assert torch.equal(reached, batch.label_LHW != 255)
    nothing = run(replace(batch, label_LHW=torch.full_like(batch.label_LHW, 255)))
    assert (nothing.total.item(), nothing.normaliser.item()) == (0, 0)


def test_unlabeled_images_are_not_touched():
    batch = semi_batch(CLASSES)
    poisoned = copy.deepcopy(batch)
    for name in ("weak_U3HW", "strong_VU3HW"):
        getattr(poisoned, name).fill_(float("nan")).requires_grad_()
    terms = run(batch), run(poisoned)
    assert terms[0].total == terms[1].total
    assert terms[0].normaliser == terms[1].normaliser
    terms[1].total.backward()
    assert poisoned.weak_U3HW.grad is None
    assert poisoned.strong_VU3HW.grad is None
