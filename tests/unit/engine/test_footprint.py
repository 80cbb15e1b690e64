"""What is said of a step's memory before it is made, against the bytes of the tensors of a real one."""

from __future__ import annotations

import copy

import pytest
import torch
from makers import tiny_run

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine.footprint import _Live, footprint
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build
from raysemi.methods.base import SingleRank

CASES = {
    "fixmatch": ["fixmatch"],
    "fixmatch-parts": ["fixmatch", "train.micro_batch=2"],
    "unimatch_v2-pareto": ["unimatch_v2", "gradients=pareto", "optim.name=adamw"],
    "derprop": ["derprop"],
    "ael": ["ael", "method.group=2", "method.cutmix.per_class=2"],
    "supervised": ["supervised"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_of_a_step_are_all_there(scenes, tmp_path, case):
    config = tiny_run(
        scenes, tmp_path / "run", *CASES[case], "data.crop=97", "train.batch.labeled=4", "train.batch.unlabeled=4"
    )
    student, method = build(config, 7)
    before = copy.deepcopy([*student.state_dict().values(), *method.state_dict().values()])
    unlabeled = 4 if method.uses_unlabeled else 0
    found = footprint(
        student, method, optim=config.optim, gradients=config.gradients, share=(4, unlabeled),
        parts=config.train.parts(4, unlabeled), crop=97,
    )  # fmt: skip
    after = [*student.state_dict().values(), *method.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))

    trainer = Trainer(
        student, method, config.train, config.optim,
        across=SingleRank(), device=torch.device("cpu"), period=5, seed=0, gradients=config.gradients,
    )  # fmt: skip
    read = ("labeled", "unlabeled") if method.uses_unlabeled else ("labeled",)
    pools = {name: Pool.open(scenes / name) for name in read}
    stream = Stream(
        config.data, pools, 0, 4, 4, 0, 1, method.strong_views, method.second_view, 30, 32,
        strong=method.strong, given=method.given,
    )  # fmt: skip
    trainer.step = 30
    for host in stream:
        with _Live() as live:
            trainer.train_step(host)

    def size(tensors):
        return sum(tensor.nbytes for tensor in tensors)

    assert found.parameters == size(student.state_dict().values())
    assert found.teacher == (0 if trainer.average is None else found.parameters)
    assert found.method == size(method.buffers())
    moments = [value for value in trainer.optimizer.tensors().values() if value.ndim]
    assert found.optimizer == size(moments)
    trained = size(p for p in student.parameters() if p.requires_grad)
    assert found.gradients == (2 if "pareto" in case else 1) * trained
    made = found.total - found.parameters - found.teacher - found.method - found.optimizer
    made -= found.gradients if "pareto" in case else 0  # a buffer that the first step made, and the second one keeps
    assert made == pytest.approx(live.most, rel=0.1)
    half = found.with_passes(0.5)
    assert found.total - found.passes < half < found.total
    assert str(found).startswith("about 0.0")
