"""What a floor runs is what the methods' documents count, and the floor does run it."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from raysemi.bench.passes import Floor, record
from raysemi.bench.step import StepBench, StepSettings
from raysemi.methods import METHODS

L = U = 2
SMALL = ("model.channels=16", "model.low_channels=8")


def bench(method, *overrides, crop=49):
    return StepBench(StepSettings(method, "test_efficientnet", crop, L, overrides=(*SMALL, *overrides)).config())


def counted(one):
    return one.network, one.part, one.images, one.mode, one.num_backwards, one.perturbed


def recorded(made):
    return record(made.trainer, lambda: made.step(0))


DOCUMENTED = {
    # methods/supervised.py: the labeled images alone
    ("supervised",): [("student", "encoder", L, "train", 1, 0), ("student", "decoder", L, "train", 1, 0)],
    # unimatch.md section 2: averaged teacher in eval mode on the weak view, one student pass on labeled and strong ones
    ("fixmatch",): [
        ("teacher", "encoder", U, "eval", 0, 0),
        ("teacher", "decoder", U, "eval", 0, 0),
        ("student", "encoder", L + U, "train", 1, 0),
        ("student", "decoder", L + U, "train", 1, 0),
    ],
    # derprop.md sections 3 and 13: encoder 3B, decoder 4B, both projections of every image, no teacher
    ("derprop",): [
        ("student", "encoder", L + U, "train", 1, 0),
        ("student", "decoder", L + U + U, "train", 1, U),
        ("student", "correlation", L + U, "train", 1, 0),
        ("student", "encoder", U, "train", 1, 0),
        ("student", "decoder", U, "train", 1, 0),
        ("student", "correlation", U, "train", 1, 0),
    ],
    ("derprop", "method.fp.weight=0", "method.labeler=momentum"): [
        ("teacher", "encoder", U, "eval", 0, 0),
        ("teacher", "decoder", U, "eval", 0, 0),
        ("teacher", "correlation", U, "eval", 0, 0),
        ("student", "encoder", L + U, "train", 1, 0),
        ("student", "decoder", L + U, "train", 1, 0),
        ("student", "correlation", L + U, "train", 1, 0),
    ],
}


@pytest.mark.parametrize("settings", DOCUMENTED, ids=" ".join)
def test_the_recorded_passes_are_the_documented_ones(settings):
    passes = recorded(bench(*settings))
    assert [counted(one) for one in passes] == DOCUMENTED[settings]
    assert all(one.shapes[0] == (one.images, 3, 49, 49) for one in passes if one.part == "encoder")
    assert all(one.size == (49, 49) for one in passes if one.part == "decoder")


@pytest.mark.parametrize("method", METHODS)
def test_the_floor_makes_the_same_passes_and_changes_the_same_things(method):
    made = bench(method)
    passes = recorded(made)
    assert pickle.dumps(passes)  # they go to a process of its own, where memory is measured
    floor = Floor(made.trainer, passes)
    before = {name: value.clone() for name, value in made.trainer.student.state_dict().items()}
    assert [replace(one, perturbed=0) for one in record(made.trainer, floor)] == [
        replace(one, perturbed=0)
        for one in passes  # its features are random: none is an encoder's
    ]
    after = made.trainer.student.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in after.items() if name.endswith("running_mean"))
    assert any(not torch.equal(before[name], value) for name, value in after.items() if name.endswith(".weight"))
    assert all(value.isfinite().all() for value in after.values())
    assert all(parameter.grad is None for parameter in made.trainer.student.parameters())
    assert made.trainer.student.training
    assert made.trainer.average is None or not made.trainer.average.model.training


def test_every_backward_pass_counts():
    """As a gradient rule with a backward pass a side: the first pass is of both sides, the second of one."""
    made = bench("fixmatch")
    student, images_B3HW = made.trainer.student, torch.rand(3, 3, 33, 41)

    def two_sides():
        both, one = student(images_B3HW).logits_BKHW.mean(), student(images_B3HW[:2]).logits_BKHW.mean()
        both.backward(retain_graph=True)
        (both + one).backward()
        with torch.no_grad():
            student(images_B3HW)

    expected = [
        ("student", "encoder", 3, "train", 2, 0),
        ("student", "decoder", 3, "train", 2, 0),
        ("student", "encoder", 2, "train", 1, 0),
        ("student", "decoder", 2, "train", 1, 0),
        ("student", "encoder", 3, "train", 0, 0),
        ("student", "decoder", 3, "train", 0, 0),
    ]
    passes = record(made.trainer, two_sides)
    assert [counted(one) for one in passes] == expected
    again = record(made.trainer, Floor(made.trainer, passes))
    assert [replace(one, perturbed=0) for one in again] == passes


def test_outputs_that_nobody_uses_get_no_gradient():
    (_, decoder) = recorded(bench("supervised"))
    assert decoder.backwards == (1, 0, 0)  # logits, penultimate, joined


def test_recording_leaves_the_networks_as_they_were():
    made = bench("fixmatch")
    recorded(made)
    for network in (made.trainer.student, made.trainer.average.model):
        assert not {"encode", "decode"} & vars(network).keys()
        assert not any(head._forward_hooks for head in network.heads.values())
