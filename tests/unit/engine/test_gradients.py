"""From objectives to one loss: the ramp weakens what unlabeled images say, and nothing else."""

from __future__ import annotations

import pytest
import torch
from makers import semi_batch, step_context, tiny_segmentor

from raysemi.engine.gradients import uniform_loss
from raysemi.engine.strategy import StepModule
from raysemi.methods.fixmatch import FixMatch, FixMatchConfig
from raysemi.ops.losses import Objective
from raysemi.ops.schedules import rampup


def test_the_factor_touches_the_unsupervised_side_alone():
    one = torch.ones(())
    objectives = {
        "labels": Objective(one, one, 0.5, "supervised"),
        "consistency": Objective(one, one, 0.25, "unsupervised"),
    }
    losses = {"labels": torch.tensor(2.0), "consistency": torch.tensor(8.0)}
    assert uniform_loss(objectives, losses) == 3.0
    assert uniform_loss(objectives, losses, 0.5) == 2.0


@pytest.mark.parametrize("step", [0, 10, 20, 99])
def test_a_step_follows_the_ramp(step):
    method = FixMatch(FixMatchConfig(threshold=0.2), 3)
    student, teacher, batch = tiny_segmentor(3), tiny_segmentor(3).eval(), semi_batch(3)
    context = step_context(student, teacher, step=step, steps=100)
    loss, values = StepModule(student, method, rampup_steps=20)(batch, context)
    assert values["consistency"] > 0
    expected = 0.5 * values["supervised"] + 0.5 * rampup(step, 20) * values["consistency"]
    torch.testing.assert_close(loss.detach(), expected)
