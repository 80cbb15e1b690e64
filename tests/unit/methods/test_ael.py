"""AEL, on worked numbers and on what its networks see."""

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
from raysemi.errors import ConfigError
from raysemi.launch.restore import build as build_run
from raysemi.methods.ael import AEL, AELConfig, _Lesson
from raysemi.methods.base import Average, SingleRank
from raysemi.methods.weighting import RankWeightingConfig, build_weighting
from raysemi.models.encoders import Features
from raysemi.models.segmentor import Prediction

CLASSES = 4


def build(seed=0, crop=None, **settings):
    """(method, student, teacher): the teacher is sure of itself, and is not the student."""
    method = AEL(AELConfig(**settings), CLASSES)
    if crop is not None:
        method.reserve(crop)
    student = tiny_segmentor(CLASSES, method.heads, seed)
    teacher = tiny_segmentor(CLASSES, method.heads, seed + 1).eval()
    teacher.decoder.classifier.weight.data.mul_(30.0)
    return method, student, teacher


def said(logits_BKHW):
    return Prediction(logits_BKHW, Features((logits_BKHW,)), logits_BKHW, logits_BKHW)


def mean(pair):
    return (pair[0] / pair[1].clamp(min=1e-12)).item()


def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_is_a_method():
    method = AEL(AELConfig(), 21)
    assert method.average == Average(kind="ema", decay=0.99, buffers="own")
    assert (method.strong_views, method.given, method.config.criterion.name) == (0, 0.5, "ohem")
    assert method.state_dict()["bank_K"].tolist() == [0.5] * 21
    method.reserve(33)
    assert method.state_dict()["cache.crops_T4SS"].shape == (21 * 8 + 1, 4, 33, 33)
    city = AELConfig(preset="cityscapes", paste={"p": 0.3})
    assert (city.threshold, city.paste.classes, city.paste.p) == (0.0, 3, 0.3)
    assert (city.paste.exclude, city.cutmix.object_area) == ((0, 1, 2, 8, 10), 0.005)
    without = AEL(AELConfig(cutmix={"per_class": 0}), 5)
    without.reserve(33)
    assert without.cache is None


def test_what_makes_no_sense_is_refused():
    for average in ({"kind": "period"}, {"buffers": "averaged"}):
        with pytest.raises(ValidationError, match="must be of kind ema with buffers own"):
            AELConfig(average=average)
    for exclude in ((0, 7), (0, 1, 2, 3)):
        with pytest.raises(ConfigError, match=r"method\.paste\.exclude must name some, not all"):
            AEL(AELConfig(paste={"exclude": exclude}), CLASSES)


# --- consistency ----------------------------------------------------------------------------------------------------


def consistency(confidences, losses, sampled, **settings):
    """L_c of an image of 1 x N pixels whose pseudo-label is class 0: kept are the pixels that `sampled` says."""
    p = torch.tensor(losses).neg().exp()
    logits_1K1N = torch.stack((p, *([(1 - p) / (CLASSES - 1)] * (CLASSES - 1)))).log()[None, :, None]
    method = AEL(AELConfig(**settings), CLASSES)
    context = step_context(None)
    method.bank_K.copy_(torch.tensor([0.9, 0.5, 0.7, 0.8]))
    pseudo_1HW = torch.zeros(1, 1, len(losses), dtype=torch.int64)
    lesson = _Lesson(pseudo_1HW, torch.tensor(confidences)[None, None])
    uniform = torch.where(torch.tensor(sampled), 0.0, 1.0)[None]
    object.__setattr__(context, "uniform", lambda slots_B, name, count: uniform)
    return method._consistency(said(logits_1K1N), lesson, None, torch.arange(1), "mixed", context)


def test_the_worked_loss():
    """ael.md section 3: 1.30769; with the third pixel below tau .69231; and .81 / .81 where that one does not count."""
    case = (0.9, 0.8, 0.6), (1.0, 5.0, 2.0), (True, False, True)
    assert mean(consistency(*case, threshold=0.5)) == pytest.approx(1.53 / 1.17, rel=1e-5)
    assert mean(consistency(*case, threshold=0.7)) == pytest.approx(0.81 / 1.17, rel=1e-5)
    assert mean(consistency(*case, threshold=0.7, normaliser="valid")) == pytest.approx(1.0, rel=1e-5)
    assert mean(consistency(*case, threshold=0.5, confidence_power=0)) == pytest.approx(1.5, rel=1e-5)
    every = consistency(*case[:2], (True, True, True), threshold=0.0, confidence_power=0, sampling_power=0)
    assert mean(every) == pytest.approx(8 / 3, rel=1e-5)  # plain mean cross-entropy


def test_nothing_kept_is_nothing_lost():
    total, normaliser = consistency((0.9, 0.8), (1.0, 5.0), (False, False))
    assert (total.item(), normaliser.item()) == (0, 0)


def test_the_loss_does_not_feel_a_factor_on_all_weights():
    whole, less = (mean(consistency((c, c), (1.0, 3.0), (True, True), threshold=0.0)) for c in (1.0, 0.3))
    assert whole == pytest.approx(less, rel=1e-5)


def test_pixels_are_kept_by_the_class_that_the_student_gives_them():
    """ael.md section 8: r = .2 over 10^5 pixels, +- .005; of the weakest class every pixel."""
    method = AEL(AELConfig(threshold=0.0, confidence_power=0), CLASSES)
    method.bank_K.copy_(torch.tensor([0.9, 0.5, 0.7, 0.8]))
    for students, rate in ((0, 0.2), (1, 1.0), (2, 0.6), (3, 0.4)):
        logits_1KHW = torch.zeros(1, CLASSES, 250, 400)
        logits_1KHW[:, students] = 5.0
        for teachers in (0, 1):
            lesson = _Lesson(torch.full((1, 250, 400), teachers), torch.full((1, 250, 400), 0.8))
            _, kept = method._consistency(said(logits_1KHW), lesson, None, torch.arange(1), "mixed", step_context(None))
            assert kept.item() / 1e5 == pytest.approx(rate, abs=0.005 if rate < 1 else 0)
    method.bank_K.fill_(0.6)
    _, kept = method._consistency(said(logits_1KHW), lesson, None, torch.arange(1), "mixed", step_context(None))
    assert kept.item() == 1e5


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_rank_weights_stand_in_the_mixed_term_as_the_preset_says(preset):
    """ael.md section 6: sum c^g s R CE over sum c^g s, or over sum c^g s R."""
    method = AEL(AELConfig(threshold=0.0, sampling_power=0), CLASSES)
    method.weighting = build_weighting(RankWeightingConfig(name="rank", preset=preset), CLASSES, 8)
    logits_1K1N = torch.tensor([[2.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]]).T[None, :, None]
    loss_N = -logits_1K1N.log_softmax(dim=1)[0, 0, 0]
    lesson = _Lesson(torch.zeros(1, 1, 3, dtype=torch.int64), torch.tensor([[[0.9, 0.8, 0.6]]]))
    w_N, r_N = torch.tensor([0.81, 0.64, 0.36]), torch.tensor([0.2, 1.0, 0.6])
    got = method._consistency(said(logits_1K1N), lesson, r_N[None, None], torch.arange(1), "mixed", step_context(None))
    below = (w_N if preset == "paper" else w_N * r_N).sum()
    assert mean(got) == pytest.approx(((w_N * r_N * loss_N).sum() / below).item(), rel=1e-5)


# --- copy-paste -----------------------------------------------------------------------------------------------------


def with_given(batch, seed=3):
    generator = torch.Generator().manual_seed(seed)
    given_label_LHW = torch.randint(0, CLASSES, batch.label_LHW.shape, generator=generator)
    given_label_LHW[:, -5:] = 255
    return replace(batch, given_L3HW=1.0 + torch.rand(batch.image_L3HW.shape), given_label_LHW=given_label_LHW)


def test_pasted_pixels_are_those_of_the_drawn_classes():
    method = AEL(AELConfig(paste={"classes": 2, "exclude": (0, 2)}), CLASSES)
    batch = with_given(semi_batch(CLASSES, labeled=3))
    found = set()
    for step in range(20):
        pasted = method._pasted(batch, step_context(None, step=step))
        for image in range(3):
            changed_HW = (pasted.image_L3HW[image] != batch.image_L3HW[image]).any(dim=0)
            classes = frozenset(batch.given_label_LHW[image][changed_HW].tolist())
            found.add(classes)
            wanted_HW = torch.isin(batch.given_label_LHW[image], torch.tensor(sorted(classes)))
            assert torch.equal(changed_HW, wanted_HW)
            for name, given in (("image_L3HW", "given_L3HW"), ("label_LHW", "given_label_LHW")):
                expected = torch.where(changed_HW, getattr(batch, given)[image], getattr(batch, name)[image])
                assert torch.equal(getattr(pasted, name)[image], expected)
    assert found == {frozenset({1}), frozenset({3}), frozenset({1, 3})}
    bare = semi_batch(CLASSES)
    assert method._pasted(bare, step_context(None)) is bare


def test_weak_classes_are_pasted_more_often():
    method = AEL(AELConfig(paste={"exclude": ()}), CLASSES)
    method.bank_K.copy_(torch.tensor([0.99, 0.01, 0.99, 0.99]))
    label_LHW = torch.arange(CLASSES).view(1, 1, CLASSES).expand(2000, 1, -1)
    image_L3HW = torch.zeros(2000, 3, 1, CLASSES)
    batch = replace(
        semi_batch(CLASSES), image_L3HW=image_L3HW, label_LHW=label_LHW, slots_L=torch.arange(2000),
        given_L3HW=image_L3HW + 1.0, given_label_LHW=label_LHW,
    )  # fmt: skip
    share_K = method._pasted(batch, step_context(None)).image_L3HW[:, 0, 0].mean(dim=0)
    expected_K = (1 - method.bank_K).sqrt().softmax(dim=0)
    torch.testing.assert_close(share_K, expected_K, rtol=0, atol=0.03)


# --- CutMix ---------------------------------------------------------------------------------------------------------


def boxes(class_U, pseudo_UHW, **cutmix):
    method, seen = AEL(AELConfig(cutmix=cutmix), CLASSES), {}
    batch = semi_batch(CLASSES, unlabeled=len(pseudo_UHW), height=40, width=60)
    context = step_context(None, listener=seen.__setitem__)
    found = method._boxes(torch.tensor(class_U), _Lesson(pseudo_UHW, pseudo_UHW.float()), batch, context)
    return found, seen["object_boxes"].item()


def test_a_box_surrounds_a_region_of_the_drawn_class():
    """ael.md section 8: the component's box, or half of the area: class absent, or no region large enough."""
    pseudo_UHW = torch.full((4, 40, 60), 255)
    pseudo_UHW[:, 3:13, 10:30] = 2
    pseudo_UHW[:, 20, 10:12] = 2  # 2 pixels: too few
    boxes_U4, share = boxes([2, 2, 1, 3], pseudo_UHW, object_area=0.03)
    assert boxes_U4[:2].tolist() == [[10, 3, 30, 13]] * 2
    for left, top, right, bottom in boxes_U4[2:].tolist():
        assert (right - left) * (bottom - top) / (40 * 60) == pytest.approx(0.5, abs=0.015)  # whole pixels
    assert share == 0.5
    assert boxes([2, 2], pseudo_UHW[:2], object_area=200 / 2400)[1] == 0.0  # more than, not as many as
    assert boxes([2, 2], pseudo_UHW[:2], object_area=0.03, box="random")[1] == 0.0


def test_images_are_mixed_with_crops_of_earlier_steps():
    """The student sees, inside of a box, an earlier step's crop; the teacher sees it whole, in train mode."""
    method, student, teacher = build(crop=33, group=2, threshold=0.0)
    batches = [semi_batch(CLASSES, unlabeled=4, width=33, seed=seed) for seed in (1, 2)]
    passes = []
    for name, network in (("student", student), ("teacher", teacher)):
        network.encoder.register_forward_pre_hook(
            lambda module, images, name=name, network=network: passes.append(
                (name, module.training, images[0] * network.std + network.mean)
            )
        )
    for step, batch in enumerate(batches):
        method.objectives(batch, step_context(student, teacher, step=step))
    assert [(name, mode) for name, mode, _ in passes] == [("teacher", True), ("student", True)] * 2
    assert not teacher.training
    (_, _, taught), _, (_, _, taught_later), (_, _, mixed_later) = passes
    neighbours = batches[0].weak_U3HW[[1, 0, 3, 2]]
    assert torch.allclose(taught, torch.cat((batches[0].image_L3HW, batches[0].weak_U3HW, neighbours)), atol=1e-5)
    earlier = batches[0].weak_U3HW[[0, 2]]  # at step 0 of each group the first
    for u in range(4):
        source = taught_later[6 + u]
        assert min((source - crop).abs().max() for crop in earlier) < 0.5 / 255 + 1e-5
        inside_HW = (mixed_later[2 + u] - source).abs().amax(dim=0) < 1e-5
        outside_HW = (mixed_later[2 + u] - batches[1].weak_U3HW[u]).abs().amax(dim=0) < 1e-5
        assert (inside_HW | outside_HW).all()
        assert 0 < inside_HW.float().mean() < 1
        rows, columns = inside_HW.nonzero().unbind(1)
        assert inside_HW[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float().mean() > 0.99


def test_the_mixed_lesson_is_the_mix_of_both():
    """Against an implementation by hand, of the passes that were made."""
    method, student, teacher = build(crop=33, group=2, threshold=0.4, sampling_power=0.0, confidence_power=1.0)
    said_by = {}
    for name, network in (("student", student), ("teacher", teacher)):
        decode = network.decode
        network.decode = lambda *a, decode=decode, name=name: (
            said_by.setdefault(name, []).append(decode(*a)) or (said_by[name][-1])
        )
    for step in range(2):
        batch = semi_batch(CLASSES, unlabeled=4, width=33, seed=step)
        images = []
        hook = student.encoder.register_forward_pre_hook(lambda _, given, images=images: images.append(given[0]))
        before = [copy.deepcopy(method.cache), method.bank_K.clone()]
        terms = method.objectives(batch, step_context(student, teacher, step=step))
        hook.remove()
    logits_BKHW, own = said_by["teacher"][1].logits_BKHW, said_by["student"][1].logits_BKHW
    confidence_BHW, pseudo_BHW = logits_BKHW.softmax(dim=1).max(dim=1)
    mixed_U3HW = (images[0] * student.std + student.mean)[2:]
    after, total, weights = method.bank_K, 0.0, 0.0
    uniform_U2 = step_context(None, step=1).uniform(batch.slots_U, "cutmix/source", 2)
    row_U = before[0].draw(
        (uniform_U2[:, :1] >= (1 - before[1]).softmax(dim=0).cumsum(dim=0)).sum(dim=1), uniform_U2[:, 1]
    )
    crop_U3HW, crop_valid_UHW, _ = before[0].read(row_U)
    for u in range(4):
        inside_HW = (mixed_U3HW[u] - crop_U3HW[u]).abs().amax(dim=0) < 1e-5
        chosen = torch.where(inside_HW, confidence_BHW[6 + u], confidence_BHW[2 + u])
        label_HW = torch.where(inside_HW, pseudo_BHW[6 + u], pseudo_BHW[2 + u])
        valid_HW = torch.where(inside_HW, crop_valid_UHW[u], batch.valid_UHW[u])
        loss_HW = nn.functional.cross_entropy(own[2 + u][None], label_HW[None], reduction="none")[0]
        total += (chosen * loss_HW * (chosen >= 0.4) * valid_HW).sum().item()
        weights += (chosen * valid_HW).sum().item()
    assert terms["consistency"].total.item() == pytest.approx(total, rel=1e-4)
    assert terms["consistency"].normaliser.item() == pytest.approx(weights, rel=1e-5)
    assert not torch.equal(after, before[1])


def test_padding_and_pixels_without_label_are_not_taught():
    method, student, teacher = build(threshold=0.0, sampling_power=0.0, confidence_power=0.0)
    batch = semi_batch(CLASSES)
    terms = method.objectives(batch, step_context(student, teacher))
    assert terms["consistency_labeled"].normaliser == (batch.label_LHW != 255).sum()
    assert terms["consistency"].normaliser < 2 * 33 * 41
    nothing = replace(batch, valid_UHW=torch.zeros_like(batch.valid_UHW))
    empty = method.objectives(nothing, step_context(student, teacher))["consistency"]
    assert (empty.total.item(), empty.normaliser.item()) == (0, 0)


# --- bank, teacher, terms -------------------------------------------------------------------------------------------


def test_terms_and_what_is_observed():
    names = []
    for step in (0, 1):
        method, student, teacher = build(crop=41, auxiliary_weight=0.4, unsupervised_weight=0.7)
        batch, seen = semi_batch(CLASSES, height=41), {}
        terms = method.objectives(batch, step_context(student, teacher, step=step, listener=seen.__setitem__))
        assert {name: (term.weight, term.side) for name, term in terms.items()} == {
            "supervised": (1.0, "supervised"),
            "auxiliary": (0.4, "supervised"),
            "consistency_labeled": (0.7, "unsupervised"),
            "consistency": (0.7, "unsupervised"),
        }
        names.append([name for name, value in seen.items() if value.ndim == 0])
        assert not (seen["trusted"] & ~batch.valid_UHW).any()
    assert names[0] == names[1] == ["kept_ratio", "object_boxes", "bank_least"]
    assert list(build(auxiliary_weight=0.0)[1].heads) == []


def test_the_bank_follows_the_students_confidence_in_labels():
    for absent_zero in (False, True):
        method, student, teacher = build(momentum=0.5, compat={"absent_zero": absent_zero})
        batch = semi_batch(CLASSES)
        batch.label_LHW[batch.label_LHW == 3] = 1
        before = copy.deepcopy(student)
        method.objectives(batch, step_context(student, teacher))
        logits_LKHW = before(torch.cat((batch.image_L3HW, batch.weak_U3HW))).logits_BKHW[:2]  # statistics of this batch
        for k in range(3):
            chosen_LHW = batch.label_LHW == k
            value = logits_LKHW.softmax(dim=1)[:, k][chosen_LHW].mean().item()
            assert method.bank_K[k].item() == pytest.approx(0.25 + 0.5 * value, abs=0.05)
        assert method.bank_K[3].item() == (0.25 if absent_zero else 0.5)


def test_no_gradient_reaches_teacher_or_images():
    method, student, teacher = build(crop=33)
    batch = with_given(semi_batch(CLASSES, width=33))
    terms = method.objectives(batch, step_context(student, teacher))
    sum(term.total for term in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert not any(buffer.requires_grad for buffer in method.buffers())


def test_it_runs_in_half_precision():
    results = []
    for half in (False, True):
        method, student, teacher = build(crop=33, threshold=0.0)
        method.weighting = build_weighting(RankWeightingConfig(name="rank", confidence=0.3), CLASSES, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            terms = method.objectives(with_given(semi_batch(CLASSES, width=33)), step_context(student, teacher))
        results.append({name: mean((term.total, term.normaliser)) for name, term in terms.items()})
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=0.15), name


def test_the_teacher_keeps_its_own_statistics(scenes, tmp_path):
    """ael.md section 8, with the real trainer; and after some steps what is mixed in comes from the cache."""
    config = tiny_run(
        scenes, tmp_path / "run", "ael", "train.steps=20", "model.name=deeplabv3plus_wide", "method.threshold=0.0"
    )
    student, learner = build_run(config, 7)
    trainer = Trainer(
        student, learner, config.train, config.optim, across=SingleRank(), device=torch.device("cpu"), period=2, seed=0
    )
    pools = {name: Pool.open(scenes / name) for name in ("labeled", "unlabeled")}
    stream = Stream(config.data, pools, 0, 2, 2, 0, 1, 0, False, 0, 5, given=learner.given)
    assert trainer.average is not None
    weights = {name for name, _ in student.named_parameters()}
    for host in stream:
        before = state(trainer.average.model)
        values = trainer.train_step(host)
        assert math.isfinite(values["loss/consistency"])
        teacher, own = state(trainer.average.model), state(student)
        decay = min(1 - 1 / trainer.step, 0.99)
        for name in weights:
            assert torch.allclose(teacher[name], decay * before[name] + (1 - decay) * own[name], atol=1e-6), name
        moved = [name for name in before if name.endswith("running_mean")]
        assert any(not torch.equal(teacher[name], before[name]) for name in moved)
        assert any(not torch.equal(teacher[name], own[name]) for name in moved)
    assert trainer.method.cache.inserted_K.sum() == 5
