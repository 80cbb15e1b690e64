"""U2PL, on worked numbers and on what its networks see: who is kept, what is mixed, what the teacher does."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from makers import semi_batch, step_context, tiny_run, tiny_segmentor
from pydantic import ValidationError
from torch import nn

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build as build_run
from raysemi.methods.base import Average, SingleRank
from raysemi.methods.u2pl import U2PL, U2PLConfig
from raysemi.models.encoders import Features
from raysemi.models.heads import RepresentationHead
from raysemi.models.segmentor import Prediction

CLASSES = 4
SMALL = {
    "representation": {"hidden": 5, "dim": 7},
    "queue": {"size": 30, "first_size": 40},
    "contrast": {"delta_p": 0.2},
    "warmup_periods": 0,
}


class Says(nn.Module):
    """A network that says given things of labeled and unlabeled images, whatever it sees."""

    def __init__(self, labeled_LKHW, unlabeled_UKHW):
        super().__init__()
        self.labeled_LKHW = labeled_LKHW
        self.unlabeled_UKHW = nn.Parameter(unlabeled_UKHW.clone())
        self.heads = nn.ModuleDict({"representation": RepresentationHead(labeled_LKHW.shape[1], hidden=5, dim=7)})

    def encode(self, images_B3HW):
        return Features((torch.cat((self.labeled_LKHW, self.unlabeled_UKHW))[-len(images_B3HW) :],))

    def decode(self, features, size, keep=None):
        return Prediction(features.high_BDhw, features, features.high_BDhw, features.high_BDhw)

    def forward(self, images_B3HW):
        return self.decode(self.encode(images_B3HW), images_B3HW.shape[-2:])


def with_entropy(wanted):
    """Log-probabilities of three classes, the first the largest, whose entropy is `wanted` nats."""
    low, high = 1.0 / 3, 1.0
    for _ in range(60):
        p = (low + high) / 2
        rest = (1 - p) / 2
        found = -p * math.log(p) - 2 * rest * math.log(rest)
        low, high = (p, high) if found > wanted else (low, p)
    return [math.log(p), math.log(rest), math.log(rest)]


def with_loss(wanted):
    """Logits of three classes by which the first one's cross-entropy is `wanted`."""
    p = math.exp(-wanted)
    return [math.log(p), math.log((1 - p) / 2), math.log((1 - p) / 2)]


def worked(entropies, losses, valid=None, step=0, **settings):
    """Objectives, and everything observed, of one labeled and one unlabeled image of 1 x N pixels."""
    count = len(entropies)
    images = torch.rand(2, 3, 1, count)
    batch = replace(
        semi_batch(3, labeled=1, unlabeled=1),
        image_L3HW=images[:1],
        label_LHW=torch.zeros(1, 1, count, dtype=torch.int64),
        weak_U3HW=images[1:],
        valid_UHW=torch.ones(1, 1, count, dtype=torch.bool) if valid is None else torch.tensor(valid)[None, None],
    )

    def rows(says):
        return torch.tensor(says).T[None, :, None]

    labeled = torch.zeros(1, 3, 1, count)
    student, teacher = (
        Says(labeled, rows([with_loss(x) for x in losses])),
        Says(labeled, rows([with_entropy(x) for x in entropies])),
    )
    seen = {}
    settings = SMALL | {"cutmix": 0.0, "contrast": {"low_rank": 1}} | settings
    method = U2PL(U2PLConfig(**settings), 3)
    context = step_context(student, teacher.eval(), step=step, listener=seen.__setitem__)
    return method.objectives(batch, context), seen


def build(seed=0, **settings):
    """(method, student, teacher): the teacher's weights are not the student's."""
    method = U2PL(U2PLConfig(**SMALL | settings), CLASSES)
    student = tiny_segmentor(CLASSES, method.heads, seed)
    teacher = tiny_segmentor(CLASSES, method.heads, seed + 1).eval()
    teacher.decoder.classifier.weight.data.mul_(30.0)  # entropies from 0 to ln 4, as a trained network's
    return method, student, teacher


def mean(term):
    return (term.total / term.normaliser).item()


def test_it_is_a_method():
    method = U2PL(U2PLConfig(), 21)
    assert method.average == Average(kind="ema", decay=0.99, start=1, copied=1, buffers="own")
    assert (method.strong_views, method.uses_unlabeled) == (0, True)
    assert method.state_dict()["contrast.queues.keys_TD"].shape == (650_001, 256)
    assert method.state_dict()["contrast.queues.keys_TD"].dtype == torch.float16
    longer = U2PL(U2PLConfig(warmup_periods=3, queue=SMALL["queue"]), 21)
    assert longer.average.start == 3


@pytest.mark.parametrize(
    ("average", "text"),
    [
        ({"kind": "period"}, "must be of kind ema"),
        ({"buffers": "averaged"}, "with buffers own"),
        ({"start": 2}, "start 0"),
    ],
)
def test_another_teacher_is_refused(average, text):
    with pytest.raises(ValidationError, match=text):
        U2PLConfig(average=average)
    assert U2PLConfig(average={"decay": 0.9}).average.buffers == "own"


def test_the_percentiles_follow_the_periods():
    """u2pl.md section 9: 80 epochs, e = 0, 20, 40, 79."""
    method, steps, period = build()[0], 80 * 13, 13
    for epoch, p, a in ((0, 80, 20), (20, 85, 15), (40, 90, 10), (79, 99.75, 0.25)):
        for within in (0, 12):
            found = method.percents(epoch * period + within, steps, period)
            assert found == (pytest.approx(p), pytest.approx(a))
    assert method.percents(40, 41, 13) == (100.0, 0.0)  # what is left after the last whole period
    assert method.percents(3, 5, 13) == (80.0, 20.0)  # a period longer than the run


def test_the_worked_loss():
    """u2pl.md section 2: H (.1, .2, .3, .4, .9), CE (1 ... 5), p = 80 -> 4 are kept, L_u = 5/4 * 2.5 = 3.125."""
    terms, seen = worked((0.1, 0.2, 0.3, 0.4, 0.9), (1.0, 2.0, 3.0, 4.0, 5.0))
    assert mean(terms["consistency"]) == pytest.approx(3.125, rel=1e-5)
    assert (terms["consistency"].normaliser.item(), terms["consistency"].side) == (4, "unsupervised")
    assert seen["entropy_limit"].item() == pytest.approx(0.5, abs=math.log(3) / 2048)
    assert seen["kept_ratio"].item() == pytest.approx(0.8)
    assert seen["trusted"].tolist() == [[[True, True, True, True, False]]]
    assert {name: (term.weight, term.side) for name, term in terms.items()} == {
        "supervised": (1.0, "supervised"),
        "consistency": (1.0, "unsupervised"),
        "contrastive": (0.1, "unsupervised"),
    }


def test_padding_is_neither_ranked_nor_taught():
    """The fifth of six pixels is padding: the others are the worked ones, and all six stand above the fraction."""
    valid = [True, True, True, True, False, True]
    terms, seen = worked((0.1, 0.2, 0.3, 0.4, 0.01, 0.9), (1.0, 2.0, 3.0, 4.0, 9.0, 5.0), valid)
    assert mean(terms["consistency"]) == pytest.approx(6 / 4 * 2.5, rel=1e-5)
    assert seen["trusted"].tolist() == [[[True, True, True, True, False, False]]]
    nothing, seen = worked((0.1, 0.2), (1.0, 2.0), [False, False])
    assert (nothing["consistency"].total.item(), nothing["consistency"].normaliser.item()) == (0, 0)
    assert seen["kept_ratio"].item() == 0


def test_nearly_all_pixels_are_kept_at_the_end():
    entropies, losses = tuple(0.1 + 0.008 * i for i in range(100)), (1.0,) * 100
    kept = [worked(entropies, losses, step=step)[1]["kept_ratio"].item() for step in (0, 50, 99)]
    assert kept == [pytest.approx(0.8), pytest.approx(0.9), pytest.approx(0.98)]  # period 10 of 100 steps


def test_what_each_network_sees():
    """Teacher in eval mode on the weak views, then in train mode on what the student sees."""
    method, student, teacher = build(cutmix=1.0)
    batch, passes = semi_batch(CLASSES, unlabeled=4), []
    for name, network in (("student", student), ("teacher", teacher)):
        network.encoder.register_forward_pre_hook(
            lambda module, images, name=name, network=network: passes.append(
                (name, module.training, images[0] * network.std + network.mean, state(network))
            )
        )
    before = state(teacher)
    method.objectives(batch, step_context(student, teacher))
    (weak, own, again) = passes
    assert [(name, mode) for name, mode, *_ in passes] == [("teacher", False), ("student", True), ("teacher", True)]
    assert torch.allclose(weak[2], batch.weak_U3HW, atol=1e-6)
    assert torch.equal(own[2], again[2])
    assert torch.allclose(own[2][:2], batch.image_L3HW, atol=1e-6)
    assert not torch.allclose(own[2][2:], batch.weak_U3HW, atol=1e-2)
    assert same(again[3], before)  # the pass on weak views has left its statistics
    assert not same(state(teacher), before)
    assert not teacher.training


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_boxes_take_image_and_label_of_the_next_of_the_group():
    method, student, teacher = build(cutmix=1.0, group=3)
    batch = semi_batch(CLASSES, unlabeled=6)
    batch = replace(batch, valid_UHW=torch.rand(6, 33, 41) < 0.9)
    context = step_context(student, teacher)
    label_UHW = torch.arange(6)[:, None, None].expand(6, 33, 41)
    image_U3HW, mixed_UHW, valid_UHW = method._mix(batch, context, batch.weak_U3HW, label_UHW, batch.valid_UHW)
    for u, source in enumerate((1, 2, 0, 4, 5, 3)):
        inside_HW = mixed_UHW[u] != u
        assert mixed_UHW[u][inside_HW].unique().tolist() == [source]
        assert inside_HW.float().mean() == pytest.approx(0.5, abs=0.02)
        assert torch.equal(image_U3HW[u], torch.where(inside_HW, batch.weak_U3HW[source], batch.weak_U3HW[u]))
        assert torch.equal(valid_UHW[u], torch.where(inside_HW, batch.valid_UHW[source], batch.valid_UHW[u]))


def test_groups_are_mixed_as_a_whole_and_half_of_them():
    method, student, teacher = build(group=2)
    batch = semi_batch(CLASSES, unlabeled=4)
    mixed = []
    for step in range(400):
        label_UHW = torch.arange(4)[:, None, None].expand(4, 33, 41)
        result_UHW = method._mix(batch, step_context(student, teacher, step=step), label_UHW, batch.valid_UHW)[0]
        mixed.append((result_UHW != label_UHW).flatten(1).any(dim=1).view(2, 2))
    mixed_SG2 = torch.stack(mixed)
    assert torch.equal(mixed_SG2[:, :, 0], mixed_SG2[:, :, 1])
    first, second = mixed_SG2[:, :, 0].float().unbind(dim=1)
    assert first.mean().item() == pytest.approx(0.5, abs=0.08)
    assert (first * second).mean().item() == pytest.approx(0.25, abs=0.08)  # each group for itself


def test_what_is_shown_belongs_to_the_image_that_was_not_mixed():
    shown = []
    for cutmix in (0.0, 1.0):
        method, student, teacher = build(cutmix=cutmix)
        seen = {}
        batch = semi_batch(CLASSES)
        method.objectives(batch, step_context(student, teacher, listener=seen.__setitem__))
        shown.append(seen)
        assert not (seen["trusted"] & ~batch.valid_UHW).any()
    for name in ("pseudo", "confidence"):
        assert torch.equal(shown[0][name], shown[1][name])
        with torch.no_grad():
            logits_UKHW = build()[2](batch.weak_U3HW).logits_BKHW
        assert torch.equal(seen["pseudo"], logits_UKHW.argmax(dim=1))
        entropy_UHW = torch.distributions.Categorical(logits=logits_UKHW.permute(0, 2, 3, 1)).entropy()
        least, most = (entropy_UHW[batch.valid_UHW & kept].aminmax() for kept in (~seen["trusted"], seen["trusted"]))
        assert most.max <= least.min + 1e-6
        assert (seen["trusted"].sum() / batch.valid_UHW.sum()).item() == pytest.approx(0.8, abs=0.01)


def test_clean_entropies_decide_as_shown():
    """Without CutMix the pixels that are shown are then the very ones that are taught."""
    method, student, teacher = build(entropy_source="clean", cutmix=0.0)
    seen = {}
    batch = semi_batch(CLASSES)
    terms = method.objectives(batch, step_context(student, teacher, listener=seen.__setitem__))
    assert terms["consistency"].normaliser.item() == seen["trusted"].sum().item()
    assert seen["kept_ratio"].item() == pytest.approx(0.8, abs=0.01)


def test_the_labeled_images_come_first():
    """Warm-up: neither unlabeled images nor the teacher matter, and every parameter has a gradient all the same."""
    method, student, teacher = build(warmup_periods=2)
    before, batch, seen = state(teacher), semi_batch(CLASSES), {}
    poisoned = replace(batch, weak_U3HW=torch.full_like(batch.weak_U3HW, torch.nan))
    terms = method.objectives(poisoned, step_context(student, teacher, step=19, listener=seen.__setitem__))
    semi = method.objectives(batch, step_context(copy.deepcopy(student), teacher, step=20, listener=seen.__setitem__))
    assert list(terms) == list(semi) == ["supervised", "consistency", "contrastive"]
    assert [(terms[name].total.item(), terms[name].normaliser.item()) for name in list(terms)[1:]] == [(0, 0), (0, 0)]
    assert semi["consistency"].total.item() > 0
    assert terms["supervised"].total.item() > 0
    sum(term.total for term in terms.values()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all((p.grad == 0).all() for p in student.heads["representation"].parameters())
    assert not same(state(teacher), before)  # by the second call alone
    method, student, teacher = build(warmup_periods=2)
    method.objectives(batch, step_context(student, teacher, step=19))
    assert same(state(teacher), before)
    assert method.contrast.queues.filled_K.sum() == 0


def test_scalars_are_the_same_at_every_step():
    """The meter adds them up by name."""
    names = []
    for step in (0, 10):
        method, student, teacher = build(warmup_periods=1)
        seen = {}
        method.objectives(semi_batch(CLASSES), step_context(student, teacher, step=step, listener=seen.__setitem__))
        names.append([name for name, value in seen.items() if value.ndim == 0])
    assert names[0] == names[1] == ["kept_ratio", "entropy_limit"]


def test_no_gradient_reaches_teacher_or_weak_views():
    method, student, teacher = build()
    batch = semi_batch(CLASSES)
    terms = method.objectives(batch, step_context(student, teacher))
    sum(term.total for term in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert method.contrast.queues.filled_K.sum() > 0


def test_it_runs_in_half_precision():
    method, student, teacher = build(auxiliary_weight=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.objectives(semi_batch(CLASSES), step_context(student, teacher))
    exact = build(auxiliary_weight=0.4)
    expected = exact[0].objectives(semi_batch(CLASSES), step_context(*exact[1:]))
    for name, term in terms.items():
        assert mean(term) == pytest.approx(mean(expected[name]), rel=0.1)
    assert method.contrast.queues.filled_K.sum() > 0


def test_padded_and_ignored_pixels_change_nothing():
    """Whatever both networks say there."""
    results = []
    for poison in (False, True):
        batch = semi_batch(3)
        label_LHW, valid_UHW = batch.label_LHW[..., :20], batch.valid_UHW[..., -20:]
        logits = torch.randn(2, 2, 3, 33, 20, generator=torch.Generator().manual_seed(0))
        if poison:
            logits[0].masked_fill_((label_LHW == 255)[:, None], 7.0)
            logits[1].masked_fill_(~valid_UHW[:, None], -3.0)
            logits[1, 1, 0].masked_fill_(~valid_UHW[1], 5.0)
        batch = replace(
            batch, image_L3HW=batch.image_L3HW[..., :20], label_LHW=label_LHW, weak_U3HW=batch.weak_U3HW[..., -20:],
            valid_UHW=valid_UHW,
        )  # fmt: skip
        student, teacher = Says(logits[0], logits[1]), Says(logits[0], logits[1]).eval()
        method = U2PL(U2PLConfig(**SMALL | {"cutmix": 0.0, "contrast": {"weight": 0.0, "low_rank": 1}}), 3)
        terms = method.objectives(batch, step_context(student, teacher))
        results.append({name: mean(terms[name]) for name in ("supervised", "consistency")})
    assert results[0] == results[1]


def test_the_auxiliary_classifier_learns_from_labels():
    method, student, teacher = build(auxiliary_weight=0.4)
    batch = semi_batch(CLASSES)
    terms = method.objectives(batch, step_context(student, teacher))
    auxiliary = terms["auxiliary"]
    assert (auxiliary.weight, auxiliary.side) == (0.4, "supervised")
    assert auxiliary.normaliser == terms["supervised"].normaliser == (batch.label_LHW != 255).sum()
    grads = torch.autograd.grad(auxiliary.total, list(student.parameters()), allow_unused=True)
    reached = [name for (name, _), grad in zip(student.named_parameters(), grads, strict=True) if grad is not None]
    assert {name.split(".")[0] for name in reached} == {"encoder", "heads"}
    assert {name.split(".")[1] for name in reached if name.startswith("heads")} == {"auxiliary"}
    assert list(build()[1].heads) == ["representation"]


def test_the_teacher_is_the_student_in_the_first_semi_supervised_period(scenes, tmp_path):
    """u2pl.md section 9, with the real trainer: 2 steps of warm-up, 2 copied, then an average of weights alone."""
    config = tiny_run(
        scenes, tmp_path / "run", "u2pl", "train.steps=20", "model.name=deeplabv3plus_wide",
        "method.representation.hidden=6", "method.representation.dim=8", "method.queue.size=50",
        "method.queue.first_size=60",
    )  # fmt: skip
    student, learner = build_run(config, 7)
    trainer = Trainer(
        student, learner, config.train, config.optim, across=SingleRank(), device=torch.device("cpu"), period=2, seed=0
    )
    pools = {name: Pool.open(scenes / name) for name in ("labeled", "unlabeled")}
    stream = Stream(config.data, pools, 0, 2, 2, 0, 1, learner.strong_views, learner.second_view, 0, 7)
    assert trainer.average is not None
    weights = {name for name, _ in student.named_parameters()}
    for host in stream:
        before = state(trainer.average.model)
        trainer.train_step(host)
        teacher, own = state(trainer.average.model), state(student)
        if trainer.step <= 2:
            assert same(teacher, own)
            continue
        moved = [name for name in before if name.endswith("running_mean")]
        if trainer.step <= 4:  # the student's parameters, and statistics of its own pass, with its own dropout
            assert all(torch.equal(teacher[name], own[name]) for name in weights)
            assert any(not torch.equal(teacher[name], before[name]) for name in moved)
            assert any(not torch.equal(teacher[name], own[name]) for name in moved)
            continue
        decay = 1 - 1 / (trainer.step - 2)  # j = steps since step 2, before this one
        for name in weights:
            expected = decay * before[name] + (1 - decay) * own[name]
            assert torch.allclose(teacher[name], expected, atol=1e-6), name
        assert any(not torch.equal(teacher[name], before[name]) for name in moved)
        averaged = [decay * before[name] + (1 - decay) * own[name] for name in moved]
        assert any(
            not torch.allclose(teacher[name], value, atol=1e-5) for name, value in zip(moved, averaged, strict=True)
        )
