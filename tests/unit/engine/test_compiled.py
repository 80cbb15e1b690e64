"""train.compile changes how a step is computed and nothing else: same numbers, same names, same checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from makers import tiny_run, tiny_segmentor
from torch._dynamo.utils import counters

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine.compiled import BACKEND_VARIABLE, as_written
from raysemi.engine.trainer import Hooks, Trainer
from raysemi.launch.restore import build
from raysemi.methods import METHODS
from raysemi.methods.base import SingleRank

SETTINGS = {
    "fixmatch": ["method.threshold=0.145"],
    "derprop": ["method.threshold.initial=0.145", "method.cutmix.partner=momentum_view"],
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def trainer_of(scenes, tmp_path, method, compiled, small=True):
    """Around a tiny network, or timm's smallest, which takes three times as long to trace."""
    config = tiny_run(
        scenes, tmp_path / f"run-{compiled}", method, *SETTINGS.get(method, []),
        f"train.compile={str(compiled).lower()}", "train.steps=20",
    )  # fmt: skip
    student, learner = build(config, 7)
    student = tiny_segmentor(7, learner.heads) if small else student
    trainer = Trainer(
        student, learner, config.train, config.optim,
        across=SingleRank(), device=torch.device("cpu"), period=2, seed=0,
    )  # fmt: skip
    pools = {name: Pool.open(scenes / name) for name in ("labeled", "unlabeled")}
    views = learner.strong_views, learner.second_view
    asked = {"strong": learner.strong, "given": learner.given}
    return trainer, lambda start, stop: Stream(config.data, pools, 0, 2, 2, 0, 1, *views, start, stop, **asked)


def graphs():
    return counters["stats"]["unique_graphs"]


def numbers(scenes, tmp_path, method, compiled, small=True):
    """Losses of two steps, and the state after them."""
    trainer, stream = trainer_of(scenes, tmp_path, method, compiled, small)
    assert graphs() == 0
    values = [trainer.train_step(host) for host in stream(0, 2)]
    losses = {f"{step} {name}": float(value) for step, of_step in enumerate(values) for name, value in of_step.items()}
    state = trainer.snapshot().tensors
    return losses, {f"{stem}/{name}": value for stem, tensors in state.items() for name, value in tensors.items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_numbers(scenes, tmp_path, method):
    losses, state = numbers(scenes, tmp_path, method, False)
    compiled_losses, compiled_state = numbers(scenes, tmp_path, method, True)
    assert graphs() >= 2  # at least an encoder and a decoder have been compiled
    assert not counters["graph_break"]
    assert compiled_losses == pytest.approx(losses, rel=1e-4, abs=1e-6)  # aot_eager interpolates in another order
    assert compiled_state.keys() == state.keys()
    assert all(torch.allclose(compiled_state[name], value, rtol=1e-3, atol=1e-4) for name, value in state.items())


def test_without_another_arithmetic_all_bits_are_the_same(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "eager")
    losses, state = numbers(scenes, tmp_path, "derprop", False, small=False)
    compiled_losses, compiled_state = numbers(scenes, tmp_path, "derprop", True, small=False)
    assert graphs() >= 3
    assert not counters["graph_break"]  # of a whole encoder of timm's
    assert compiled_losses == losses
    assert all(torch.equal(compiled_state[name], value) for name, value in state.items())


def test_a_checkpoint_goes_on_compiled_or_not(scenes, tmp_path):
    compiled, stream = trainer_of(scenes, tmp_path, "fixmatch", True)
    for host in stream(0, 2):
        compiled.train_step(host)
    plain, _ = trainer_of(scenes, tmp_path, "fixmatch", False)
    plain.restore(compiled.snapshot())
    (host,) = stream(2, 3)
    losses = [float(trainer.train_step(host)["loss/total"]) for trainer in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_copies_are_not_compiled_and_equal(scenes, tmp_path):
    trainer, _ = trainer_of(scenes, tmp_path, "fixmatch", True)
    twin = copy.deepcopy(trainer.student).eval()
    images_B3HW = torch.rand(2, 3, 33, 41)
    with torch.no_grad():
        logits_BKHW = twin(images_B3HW).logits_BKHW
    assert graphs() == 0
    with torch.no_grad():
        assert torch.allclose(trainer.student.eval()(images_B3HW).logits_BKHW, logits_BKHW, atol=1e-6)
    assert graphs() == 2


def test_evaluation_compiles_nothing(scenes, tmp_path):
    """Validation images have many sizes; a program for each would take longer than it saves."""
    trainer, stream = trainer_of(scenes, tmp_path, "fixmatch", True)
    made = []

    def evaluate(step):
        before = graphs()
        for width in (33, 41, 57):
            with torch.no_grad():
                trainer.evaluated(torch.rand(1, 3, 35, width))
        made.append(graphs() - before)
        return False

    hooks = Hooks(lambda *_: None, evaluate, lambda _: None, lambda: False)
    assert trainer.fit(stream(0, 2), hooks, eval_every=1)
    assert made == [0, 0]
    assert graphs() == 4  # encoder and decoder of student and teacher: the second step needed no new program


def test_as_written_ends():
    module = torch.nn.Linear(3, 5)
    module.compile(backend="aot_eager")
    with as_written():
        module(torch.rand(2, 3))
    assert graphs() == 0
    module(torch.rand(2, 3))
    assert graphs() == 1
