"""Checkpoints of a GPU's state: copied by the device while the step's work is still queued."""

from __future__ import annotations

import pytest
import torch

from raysemi.engine import checkpoint
from raysemi.engine.checkpoint import Snapshot
from raysemi.engine.folder import RunFolder
from raysemi.engine.saver import Saver
from raysemi.methods.base import SingleRank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_what_is_written_is_the_state_of_its_step(tmp_path):
    """Weights move on, in place, as soon as `save` has returned: behind the copies, on the same stream."""
    device = torch.device("cuda", 0)
    weights = torch.zeros(64, 3, 512, 512, device=device).to(memory_format=torch.channels_last)
    folder = RunFolder(tmp_path)
    with Saver(folder, SingleRank(), device, keep=3) as saver:
        for step in (1, 2, 3):
            weights += 1
            saver.save(Snapshot(step, {"student": {"weight": weights}}, {}))
            weights += 100
            weights -= 100
    for step in (1, 2, 3):
        assert checkpoint.load(folder, step).tensors["student"]["weight"].unique().tolist() == [step]
