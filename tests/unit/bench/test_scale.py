"""`raysemi bench scale`: two real ranks against one."""

from __future__ import annotations

import pytest
import torch

from raysemi.bench.scale import measure_scale
from raysemi.bench.step import StepBench, StepSettings
from raysemi.errors import ConfigError

SMALL = ("model.channels=16", "model.low_channels=8")
SETTINGS = StepSettings(
    "fixmatch", "test_efficientnet", 33, 2, weighting="rank", gradients="pareto", threads=1, overrides=SMALL
)


@pytest.mark.slow
def test_two_ranks_are_timed_and_their_words_counted():
    turns: list[tuple[int, int]] = []
    found = measure_scale(SETTINGS, 2, 2, lambda *done: turns.append(done))
    assert turns == [(1, 2), (2, 2)]
    assert (found.ranks, found.turns, found.batch, found.threads) == (2, 2, 2, 1)
    assert found.floor_s > 0
    assert 0.02 < found.efficiency < 50
    assert 0.02 < found.apart_efficiency < 50
    student = StepBench(SETTINGS.config()).trainer.student
    assert found.gradient_bytes == 2 * 4 * sum(p.numel() for p in student.parameters())  # a gradient for each side
    running = sum(b.numel() for name, b in student.named_buffers() if name.endswith(("running_mean", "running_var")))
    assert found.statistics_bytes == 4 * (1 + running)
    # normalisers, products of both gradients, and the rank memories' fixed buffer
    assert found.told_bytes > 3 * 8
    assert str(torch.__version__) == found.torch


def test_a_method_that_is_for_no_such_number_of_ranks_is_refused():
    with pytest.raises(ConfigError, match="divisible by"):
        measure_scale(StepSettings("fixmatch", "test_efficientnet", 33, 1, overrides=SMALL), 2, 1)
