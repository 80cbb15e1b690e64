"""A step that does not count leaves memories as they were, and costs no copy of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from makers import tiny_run
from torch.utils._python_dispatch import TorchDispatchMode

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build
from raysemi.methods.base import SingleRank
from raysemi.methods.queues import Rings

MEMORIES = {
    "u2pl": [
        "method.warmup_periods=0", "method.contrast.delta_p=0.1", "method.representation.hidden=6",
        "method.representation.dim=8", "method.queue.first_size=110", "method.queue.size=90",
    ],
    "fixmatch": [
        "method.threshold=0.145", "weighting=rank", "weighting.confidence=0.145", "weighting.memory=7",
        "weighting.unlabeled=true",
    ],
    "ael": ["method.threshold=0", "method.cutmix.per_class=1"],
}  # fmt: skip


LARGE = ("keys_TD", "crops_T4SS")


def trainer_of(scenes, folder, method, *overrides):
    """A trainer and its first six batches."""
    config = tiny_run(scenes, folder / "run", method, "train.steps=20", *MEMORIES[method], *overrides)
    student, learner = build(config, 7)
    trainer = Trainer(
        student, learner, config.train, config.optim, across=SingleRank(), device=torch.device("cpu"), period=2, seed=0
    )
    pools = {name: Pool.open(scenes / name) for name in ("labeled", "unlabeled")}
    stream = Stream(
        config.data,
        pools,
        0,
        2,
        2,
        0,
        1,
        learner.strong_views,
        learner.second_view,
        0,
        6,
        strong=learner.strong,
        given=learner.given,
    )
    return trainer, list(stream)


@pytest.mark.parametrize("method", MEMORIES)
def test_a_step_that_is_not_finite_leaves_every_memory_to_the_last_bit(scenes, tmp_path, method):
    """The labels' loss is no number, all else is: memories are written in the step, more than they hold."""
    trainer, hosts = trainer_of(scenes, tmp_path, method)
    for host in hosts[:5]:
        trainer.train_step(host)
    before = copy.deepcopy(trainer.method.state_dict())
    rings = [part for part in trainer.method.modules() if isinstance(part, Rings)]
    assert rings
    assert all((ring.inserted_K > 0).any() for ring in rings)
    assert any((ring.inserted_K > ring.filled_K).any() for ring in rings)  # the oldest have been overwritten

    whole, objectives = [], trainer.method.objectives

    def broken(batch, context):
        terms = objectives(batch, context)
        whole.append(copy.deepcopy(trainer.method.state_dict()))
        terms["supervised"].total.data.fill_(math.nan)
        return terms

    trainer.method.objectives = broken
    trainer.train_step(hosts[5])
    assert float(trainer.skipped) == 1
    after = trainer.method.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in whole[0].items() if name.endswith(LARGE))
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    trainer.method.objectives = objectives
    trainer.train_step(hosts[5])
    assert float(trainer.skipped) == 1
    assert any(not torch.equal(value, before[name]) for name, value in after.items() if name.endswith(LARGE))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, and was not there before."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


def test_the_memory_of_a_step_does_not_grow_with_its_queues(scenes, tmp_path):
    largest = []
    for name, size in (("small", 200_000), ("large", 500_000)):
        (tmp_path / name).mkdir()
        sizes = [f"method.queue.first_size={size}", f"method.queue.size={size}"]
        trainer, hosts = trainer_of(scenes, tmp_path / name, "u2pl", *sizes)
        trainer.train_step(hosts[0])
        with Largest(trainer.method.buffers()) as made:
            trainer.train_step(hosts[1])
        largest.append(made.bytes)
        (rings,) = [part for part in trainer.method.modules() if isinstance(part, Rings)]
        assert made.bytes < rings.rows_TX.nbytes / 4
    assert largest[0] == largest[1]
