"""DerProp on a tiny real network: which term teaches what, the edges of a batch, the switches of the papers' tables."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from makers import semi_batch, step_context, tiny_segmentor
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from raysemi.errors import ConfigError
from raysemi.methods.base import Average, Method, SingleRank, StepContext
from raysemi.methods.derprop import PRESETS, DerProp, DerPropConfig, projected_channels
from raysemi.methods.propagation import Targets, mix, rectify, rows_of_step
from raysemi.methods.propagation_config import RegionConfig
from raysemi.ops.cells import at_nodes, outside_box
from raysemi.ops.losses import kl_divergence
from raysemi.ops.mixing import inside
from raysemi.ops.pseudo_label import class_peaks, confidence_and_label, update_threshold

CLASSES = 5
LABELED = {"supervised", "supervised_propagated", "derivative_labeled", "sparsity_labeled"}
UNLABELED = {
    "strong", "kl", "propagated_strong", "propagated_weak", "perturbed", "derivative_unlabeled", "sparsity_strong",
}  # fmt: skip
LOW = {"mode": "fixed", "initial": 0.05}  # every valid pixel is trusted


def build(classes=CLASSES, seed=0, **settings):
    settings = {"region": {"segments": 6}, **settings}
    method = DerProp(DerPropConfig(**settings), classes)
    return method, tiny_segmentor(classes, method.heads, seed)


def run(method, student, batch=None, **context):
    """Objectives, and everything observed."""
    seen = {}
    batch = semi_batch(CLASSES, second_view=method.second_view) if batch is None else batch
    teacher = copy.deepcopy(student).requires_grad_(False).eval() if method.average.kind != "none" else None
    terms = method.objectives(batch, step_context(student, teacher, listener=seen.__setitem__, **context))
    return terms, seen


def published_total(terms):
    return sum(term.weight * term.total / term.normaliser.clamp(min=1) for term in terms.values())


def gradients(term, student):
    named = dict(student.named_parameters())
    values = torch.autograd.grad(term.total, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: 0.0 if g is None else g.abs().max().item() for name, g in zip(named, values, strict=True)}


def strongest(found, prefix):
    return max(value for name, value in found.items() if name.startswith(prefix))


# --- what teaches what -------------------------------------------------------------------------------------------


def test_it_is_a_method():
    method, _ = build()
    assert isinstance(method, Method)
    assert method.average == Average(kind="period", ratio=0.5, at="end")
    assert (method.strong_views, method.second_view) == (1, False)
    assert method.threshold.dtype == torch.float32
    assert method.threshold.shape == ()
    assert set(method.state_dict()) == {"threshold"}


def test_terms_weights_and_sides():
    method, student = build(threshold=LOW)
    terms, _ = run(method, student)
    half = {
        "supervised": 0.25, "supervised_propagated": 0.25, "strong": 0.125, "kl": 0.125, "perturbed": 0.125,
        "propagated_strong": 0.0625, "propagated_weak": 0.0625, "derivative_labeled": 0.25,
        "derivative_unlabeled": 0.25, "sparsity_labeled": 0.125, "sparsity_strong": 0.125,
    }  # fmt: skip
    assert {name: term.weight for name, term in terms.items()} == half
    assert {name for name, term in terms.items() if term.side == "supervised"} == LABELED
    for term in terms.values():
        assert term.total.shape == term.normaliser.shape == ()
        assert term.total.isfinite()
        assert not term.normaliser.requires_grad


@pytest.mark.parametrize(("own", "expected"), [(None, 0.3), (0.1, 0.05), (0.0, 0.0)])
def test_labeled_propagated_logits_may_have_their_own_weight(own, expected):
    terms, _ = run(*build(labeled_weight=0.6, labeled_propagated_weight=own))
    assert terms["supervised"].weight == pytest.approx(0.3)
    assert terms["supervised_propagated"].weight == pytest.approx(expected)


@pytest.mark.parametrize("alpha_step", [0, 70])
def test_each_term_teaches_its_part_of_the_student(alpha_step):
    method, student = build(threshold=LOW)
    terms, _ = run(method, student, step=alpha_step)
    assert set(terms) == LABELED | UNLABELED
    through_logits = {"supervised", "strong", "kl", "perturbed"}
    for name, term in terms.items():
        found = gradients(term, student)
        assert strongest(found, "encoder.") > 0, name
        assert (strongest(found, "decoder.") > 0) == (name in through_logits), name
        # nothing that goes through a map reaches the classifier, nothing else reaches the projections
        assert (strongest(found, "heads.correlation.first") > 0) == (name not in through_logits), name
        assert (strongest(found, "heads.correlation.second") > 0) == (name not in through_logits), name


def test_no_gradient_reaches_the_teacher():
    method, student = build(cutmix={"partner": "momentum_view"}, threshold=LOW)
    teacher = copy.deepcopy(student)  # its parameters could take gradients
    batch = semi_batch(CLASSES, second_view=True)
    published_total(method.objectives(batch, step_context(student, teacher.eval()))).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("step", [0, 70])
def test_the_momentum_network_may_make_the_labels(step):
    method, student = build(threshold=LOW, labeler="momentum", region={"enable": False}, fp={"weight": 0.0})
    teacher = tiny_segmentor(CLASSES, method.heads, seed=5).eval()
    batch, seen = semi_batch(CLASSES), {}
    context = step_context(student, teacher, listener=seen.__setitem__, step=step)
    method.objectives(batch, context)
    with torch.no_grad():
        raw = teacher(batch.weak_U3HW).logits_BKHW
        own = student(batch.weak_U3HW).logits_BKHW
    assert torch.equal(seen["pseudo"], raw.argmax(dim=1))
    assert not torch.equal(seen["pseudo"], own.argmax(dim=1))
    alpha = method.alpha(context.step, context.steps, context.period)
    assert (alpha > 0.0) == (step > 0)
    if step == 0:
        assert torch.equal(seen["propagated"], seen["pseudo"])
        torch.testing.assert_close(seen["confidence"], raw.softmax(dim=1).amax(dim=1))
    else:
        assert not torch.allclose(seen["confidence"], raw.softmax(dim=1).amax(dim=1))


def test_each_unlabeled_term_sees_its_own_view():
    """Frozen BatchNorm: with statistics of the batch every image would reach every term."""
    method = DerProp(DerPropConfig(threshold=LOW, region={"segments": 6}), CLASSES)
    student = tiny_segmentor(CLASSES, method.heads, frozen=True)
    batch = semi_batch(CLASSES)
    views = {"labeled": batch.image_L3HW, "weak": batch.weak_U3HW, "strong": batch.strong_VU3HW}
    for view in views.values():
        view.requires_grad_()
    terms, _ = run(method, student, batch)
    for name, term in terms.items():
        found = torch.autograd.grad(term.total, list(views.values()), retain_graph=True, allow_unused=True)
        reached = {view for view, g in zip(views, found, strict=True) if g is not None and g.abs().max() > 0}
        weak = {"perturbed", "propagated_weak"}
        assert reached == {"labeled" if name in LABELED else "weak" if name in weak else "strong"}, name


def test_with_the_momentum_labeler_the_student_sees_no_weak_view():
    settings = DerPropConfig(threshold=LOW, region={"segments": 6}, labeler="momentum", fp={"weight": 0.0})
    method = DerProp(settings, CLASSES)
    student = tiny_segmentor(CLASSES, method.heads, frozen=True)
    teacher = copy.deepcopy(student)  # its parameters could take gradients
    batch = semi_batch(CLASSES)
    views = {"labeled": batch.image_L3HW, "weak": batch.weak_U3HW, "strong": batch.strong_VU3HW}
    for view in views.values():
        view.requires_grad_()
    terms = method.objectives(batch, step_context(student, teacher.eval(), step=70))
    assert set(terms) == (LABELED | UNLABELED) - {"perturbed", "propagated_weak"}
    for name, term in terms.items():
        found = torch.autograd.grad(term.total, list(views.values()), retain_graph=True, allow_unused=True)
        reached = {view for view, g in zip(views, found, strict=True) if g is not None and g.abs().max() > 0}
        assert reached == {"labeled" if name in LABELED else "strong"}, name
    published_total(terms).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_channels_are_dropped_by_slot(monkeypatch):
    drawn, keep = {}, StepContext.keep

    def record(context, slots_B, name, channels, drop):
        drawn[name] = (slots_B.tolist(), channels, drop)
        return keep(context, slots_B, name, channels, drop)

    monkeypatch.setattr(StepContext, "keep", record)
    batch = replace(semi_batch(CLASSES), slots_L=torch.tensor([4, 5]), slots_U=torch.tensor([6, 7]))
    run(*build(), batch)
    assert drawn == {
        "correlation/labeled": ([4, 5], 256, 0.1),
        "correlation/weak": ([6, 7], 256, 0.1),
        "correlation/strong": ([6, 7], 256, 0.1),
        "fp/low": ([6, 7], 6, 0.5),
        "fp/high": ([6, 7], 10, 0.5),
    }


@pytest.mark.parametrize("heads", ["two", "shared"])
def test_the_weak_side_gets_no_gradient_from_the_view_match(heads):
    method, student = build(threshold=LOW, deriv={"heads": heads})
    batch = semi_batch(CLASSES)
    batch.weak_U3HW.requires_grad_()
    batch.strong_VU3HW.requires_grad_()
    terms, _ = run(method, student, batch)
    weak, strong = torch.autograd.grad(
        terms["derivative_unlabeled"].total, (batch.weak_U3HW, batch.strong_VU3HW), retain_graph=True, allow_unused=True
    )
    assert weak is None
    assert strong.abs().max() > 0
    for name in ("strong", "kl", "propagated_strong"):
        weak = torch.autograd.grad(terms[name].total, batch.weak_U3HW, retain_graph=True, allow_unused=True)[0]
        assert weak is None, name
    for name in ("perturbed", "propagated_weak"):
        assert torch.autograd.grad(terms[name].total, batch.weak_U3HW, retain_graph=True)[0].abs().max() > 0


def test_sparsity_varies_with_the_features():
    values = []
    for seed in range(3):
        terms, _ = run(*build(seed=seed))
        values.append((terms["sparsity_labeled"].total / terms["sparsity_labeled"].normaliser).item())
    assert len({round(value, 6) for value in values}) == 3


# --- edges of a batch ----------------------------------------------------------------------------------------------


def labeled_as(value):
    batch = semi_batch(CLASSES)
    return replace(batch, label_LHW=torch.full_like(batch.label_LHW, value))


@pytest.mark.parametrize("value", [0, 3, 255])
@pytest.mark.parametrize("sim", ["softmax_dot", "cosine", "l1_dot"])
def test_labels_of_one_class_or_of_none(value, sim):
    method, student = build(deriv={"sim": sim})
    terms, _ = run(method, student, labeled_as(value))
    published_total(terms).backward()
    assert all(term.total.isfinite() for term in terms.values())
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)
    if value == 255:
        assert all(terms[name].total == 0 for name in ("supervised", "supervised_propagated", "derivative_labeled"))
    else:
        assert terms["derivative_labeled"].total > 0


def test_ignored_and_padded_pixels_are_not_counted():
    batch = semi_batch(CLASSES)
    method, student = build(threshold=LOW)
    terms, _ = run(method, student, batch)
    cells = (5, 6)
    labels = at_nodes(batch.label_LHW, cells)
    assert terms["derivative_labeled"].normaliser == (labels != 255).sum(dim=1).square().sum()
    counted = at_nodes(batch.valid_UHW, cells) & outside_box(batch.boxes_VU4[0], (33, 41), cells)
    assert terms["derivative_unlabeled"].normaliser == counted.sum(dim=1).square().sum()
    assert terms["perturbed"].normaliser == terms["propagated_weak"].normaliser == batch.valid_UHW.sum()
    mixed = torch.where(inside(batch.boxes_VU4[0], 33, 41), batch.valid_UHW.flip(0), batch.valid_UHW)
    assert mixed.sum() != batch.valid_UHW.sum()
    for name in ("strong", "kl", "propagated_strong"):
        assert terms[name].normaliser == mixed.sum()


def test_a_full_box_leaves_no_pair():
    batch = semi_batch(CLASSES)
    batch.boxes_VU4[...] = torch.tensor([0, 0, 41, 33])
    method, student = build(threshold=LOW)
    terms, _ = run(method, student, batch)
    assert terms["derivative_unlabeled"].total == 0
    assert terms["derivative_unlabeled"].normaliser == 0
    assert strongest(gradients(terms["derivative_unlabeled"], student), "") == 0


def test_an_empty_box_makes_the_targets_equal():
    batch = semi_batch(CLASSES)
    batch.boxes_VU4[...] = 0
    results = [run(*build(threshold=LOW, kl_target=target), batch)[0] for target in ("pasted", "unpasted", "drop_box")]
    for name in ("strong", "kl"):
        assert results[0][name].total == results[1][name].total == results[2][name].total
    boxed = [run(*build(threshold=LOW, kl_target=t))[0] for t in ("pasted", "unpasted", "drop_box")]
    for name in ("strong", "kl"):
        assert len({terms[name].total.item() for terms in boxed}) == 3


def test_nothing_trusted_is_exactly_zero():
    method, student = build(threshold={"mode": "fixed", "initial": 1.0})
    terms, seen = run(method, student)
    assert not seen["trusted"].any()
    for name in ("strong", "kl", "perturbed", "propagated_strong", "propagated_weak"):
        assert terms[name].total == 0
        assert strongest(gradients(terms[name], student), "") == 0


def test_without_unlabeled_images_the_labeled_terms_stay():
    method, student = build()
    terms, seen = run(method, student, semi_batch(CLASSES, unlabeled=0))
    assert set(terms) == LABELED
    assert method.threshold == torch.tensor(0.85)
    assert not seen
    published_total(terms).backward()


def test_a_single_unlabeled_image_has_no_partner():
    method, student = build()
    with pytest.raises(ConfigError, match=r"train\.batch\.unlabeled"):
        run(method, student, semi_batch(CLASSES, unlabeled=1))


# --- blend, threshold, regions ---------------------------------------------------------------------------------------


def weak_logits(method, student, batch):
    """Logits of the weak views as the step sees them: labeled and weak images share the statistics."""
    state = copy.deepcopy(student.state_dict())
    with torch.no_grad():
        images = torch.cat((batch.image_L3HW, batch.weak_U3HW))
        logits = student.decode(student.encode(images), images.shape[-2:]).logits_BKHW[len(batch.image_L3HW) :]
    student.load_state_dict(state)
    return logits


def test_alpha_0_reproduces_the_raw_labels_bitwise():
    batch = semi_batch(CLASSES)
    method, student = build(fp={"weight": 0.0}, region={"enable": False}, threshold={"initial": 0.4})
    logits = weak_logits(method, student, batch)
    confidence, label = confidence_and_label(logits)
    threshold = update_threshold(torch.tensor(0.4), class_peaks(logits, batch.valid_UHW), 0.999)
    _, seen = run(method, student, batch, step=9)  # the first period: alpha is 0
    assert seen["alpha"] == 0
    assert torch.equal(seen["propagated"], label)
    assert torch.equal(seen["pseudo"], label)
    assert torch.equal(seen["confidence"], confidence)
    assert torch.equal(method.threshold, threshold)
    assert threshold != torch.tensor(0.4)
    assert torch.equal(seen["trusted"], (confidence >= threshold) & batch.valid_UHW)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.0, 9: 0.0, 10: 0.1, 19: 0.1, 99: 0.9}),
        ({"ramp": "step", "alpha_max": 0.5}, {0: 0.0, 1: 0.005, 99: 0.495}),
        ({"dlp": False}, {99: 0.0}),
    ],
)
def test_alpha_ramps_up(settings, expected):
    method, _ = build(**settings)
    for step, alpha in expected.items():
        assert method.alpha(step, steps=100, period=10) == pytest.approx(alpha)
    assert 0.0 <= method.alpha(94, steps=95, period=10) < 1.0


def test_the_blend_is_of_logits():
    results = {}
    for step in (0, 60):
        method, student = build(region={"enable": False}, fp={"weight": 0.0})
        results[step] = run(method, student, step=step)[1]
    raw, blended = results[0], results[60]
    assert blended["alpha"] == pytest.approx(0.6)
    for name in ("pseudo", "confidence_raw"):
        assert torch.equal(raw[name], blended[name])
    assert torch.equal(raw["confidence_blended"], raw["confidence_raw"])
    assert not torch.equal(blended["confidence_blended"], blended["confidence_raw"])


def test_the_threshold_moves_only_while_training():
    method, student = build()
    method.eval()
    run(method, student)
    assert method.threshold == torch.tensor(0.85)
    method.train()
    run(method, student)
    assert 0 < (method.threshold - 0.85).abs() <= 0.001
    fixed, student = build(threshold={"mode": "fixed", "initial": 0.6})
    run(fixed, student)
    assert fixed.threshold == torch.tensor(0.6)


def test_the_threshold_takes_the_peaks_of_all_ranks():
    class TwoRanks(SingleRank):
        def max(self, value):
            return value.maximum(torch.tensor([0.0, 0.99, 0.0, 0.0, 0.0]))

    moved = []
    for across in (SingleRank(), TwoRanks()):
        method, student = build()
        run(method, student, across=across)
        moved.append(method.threshold.item())
    assert moved[0] < moved[1]


def test_a_step_without_valid_pixels_leaves_the_threshold():
    batch = semi_batch(CLASSES)
    method, student = build()
    terms, seen = run(method, student, replace(batch, valid_UHW=torch.zeros_like(batch.valid_UHW)))
    assert method.threshold == torch.tensor(0.85)
    assert not seen["trusted"].any()
    assert published_total(terms).isfinite()


def test_non_finite_predictions_leave_the_threshold():
    batch = semi_batch(CLASSES)
    batch.weak_U3HW[0, 0, 0, 0] = float("nan")
    method, student = build()
    run(method, student, batch)
    assert method.threshold == torch.tensor(0.85)


def test_threshold_of_the_mixed_mask():
    batch = semi_batch(CLASSES)
    valid = torch.zeros_like(batch.valid_UHW)
    valid[1, 10, 10] = True  # inside the box of image 0, which image 1 fills
    moved = []
    for ignore in ("base", "pasted"):
        method, student = build(threshold={"ignore": ignore})
        run(method, student, replace(batch, valid_UHW=valid))
        moved.append(method.threshold.item())
    assert moved[0] != moved[1]


def test_regions_enlarge_what_is_trusted_outside_box_and_padding():
    grown = 0
    batch = semi_batch(CLASSES)
    for seed in range(4):
        method, student = build(seed=seed, region={"segments": 24}, threshold={"mode": "fixed", "initial": 0.3})
        _, seen = run(method, student, batch)
        new = seen["trusted"] & ~seen["trusted_before"]
        assert (seen["trusted"] >= seen["trusted_before"]).all()
        assert not (new & inside(batch.boxes_VU4[0], 33, 41)).any()
        assert not (seen["trusted"] & ~batch.valid_UHW).any()
        grown += int(new.sum())
    assert grown > 0
    method, student = build(region={"enable": False}, threshold={"mode": "fixed", "initial": 0.3})
    _, seen = run(method, student, batch)
    assert torch.equal(seen["trusted"], seen["trusted_before"])


@pytest.mark.parametrize(("rows", "reach"), [("random", 30), ("reference", 29), ("uniform", 30)])
def test_rows_are_the_same_on_all_ranks(rows, reach):
    config = RegionConfig(rows=rows, segments=500)
    _, student = build()
    drawn = rows_of_step(config, 30, step_context(student, step=3), torch.device("cpu"))
    assert drawn.shape == (500,)
    assert set(drawn.tolist()) == set(range(reach))
    again = rows_of_step(config, 30, step_context(student, step=4), torch.device("cpu"))
    assert torch.equal(drawn, again) == (rows == "uniform")
    second = SingleRank()
    second.rank, second.world = 1, 2
    elsewhere = rows_of_step(config, 30, step_context(student, step=3, across=second), torch.device("cpu"))
    assert torch.equal(drawn, elsewhere)
    assert rows_of_step(config, 1, step_context(student), torch.device("cpu")).max() == 0


@pytest.mark.parametrize("cells", [1, 30, 4096, 10201])
def test_the_largest_draw_is_the_last_cell(monkeypatch, cells):
    monkeypatch.setattr(StepContext, "uniform", lambda *_: torch.full((1, 3), 1 - 2.0**-24))
    drawn = rows_of_step(RegionConfig(segments=3), cells, step_context(None), torch.device("cpu"))
    assert drawn.tolist() == [cells - 1] * 3


def test_regions_stay_out_of_the_box_and_of_padding():
    batch = semi_batch(CLASSES)
    generator = torch.Generator().manual_seed(2)
    left, right = (3 * torch.randn(2, 4, 30, generator=generator) for _ in range(2))
    logits = torch.zeros(2, CLASSES, 33, 41)
    logits[:, 2] = 4.0
    logits[:, 1, ::3] = 9.0
    targets, threshold = Targets.of(logits, batch.valid_UHW), torch.tensor(0.55)
    trusted = targets.trusted(threshold)
    trusted[:, ::5] = False
    final, expanded = rectify(
        RegionConfig(segments=40), targets, trusted, threshold, (left, right), (5, 6), batch, step_context(None)
    )
    closed = inside(batch.boxes_VU4[0], 33, 41) | ~batch.valid_UHW
    assert torch.equal(final.label_UHW[closed], targets.label_UHW[closed])
    assert torch.equal(expanded[closed], trusted[closed])
    changed = final.label_UHW != targets.label_UHW
    assert changed.any()
    assert (expanded & ~trusted).any()
    assert (expanded >= trusted).all()
    assert expanded[changed].all()


def test_box_and_labels_at_the_cells():
    boxes = torch.tensor([[8, 16, 17, 17], [0, 0, 0, 0], [13, 0, 20, 4]])
    outside = outside_box(boxes, (33, 41), (5, 6)).view(3, 5, 6)
    touched = torch.zeros(5, 6, dtype=torch.bool)
    touched[2, 1:3] = True  # a row of pixels, from centre 8 to centre 16
    assert torch.equal(outside[0], ~touched)
    assert outside[1].all()
    touched[...] = False
    touched[0, 2:3] = True  # 13..19 lies in the cell 12..20 of centre 16; rows 0..3 in that of centre 0
    assert torch.equal(outside[2], ~touched)
    labels = torch.arange(33 * 41).view(1, 33, 41)
    assert torch.equal(at_nodes(labels, (5, 6)), labels[:, ::8, ::8].flatten(1))


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "gone", "average"),
    [
        ({"dlp": False}, {"derivative", "sparsity"}, "none"),
        ({"deriv": {"loss": False}}, {"derivative", "sparsity"}, "none"),
        ({"dlp": False, "momentum": {"enable": True}}, {"derivative", "sparsity"}, "period"),
        ({"momentum": {"enable": False}}, set(), "none"),
        ({"sparsity": 0.0}, {"sparsity"}, "period"),
        ({"fp": {"weight": 0.0}}, {"perturbed"}, "period"),
    ],
)
def test_ablations(settings, gone, average):
    method, student = build(**settings)
    terms, seen = run(method, student, step=50)
    assert set(terms) == {name for name in LABELED | UNLABELED if name.split("_")[0] not in gone}
    assert method.average.kind == average
    rectified = settings.get("dlp", True)
    assert (seen["alpha"] > 0) == rectified


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_run(preset):
    method, student = build(preset=preset, threshold={"initial": 0.2})
    terms, _ = run(method, student, step=20)
    assert set(terms) == LABELED | UNLABELED
    published_total(terms).backward()
    assert all(term.total.isfinite() for term in terms.values())


def test_the_reference_has_terms_that_train_nothing():
    method, student = build(preset="reference")
    assert method.channels == CLASSES
    assert method.average.at == "start"
    assert method.second_view
    terms, _ = run(method, student)
    for name in ("derivative_labeled", "sparsity_labeled", "sparsity_strong"):
        assert not terms[name].total.requires_grad
    sparsity = terms["sparsity_labeled"]
    assert (sparsity.total / sparsity.normaliser).item() == pytest.approx(1 / 30)
    assert terms["derivative_labeled"].normaliser == 2 * 30**2  # every pair counts, ignored or not


def test_a_given_key_wins_over_the_preset():
    config = DerPropConfig(preset="paper", deriv={"sim": "l1_dot"}, strong_target="soft")
    assert config.deriv.sim == "l1_dot"
    assert config.deriv.heads == "shared"
    assert config.strong_target == "soft"
    assert config.prop.temp == 0.1
    assert DerPropConfig(**config.model_dump()) == config
    assert DerPropConfig(**{"preset": "reference", "threshold": {"initial": 0.9}}).threshold.ignore == "pasted"


def test_hard_targets_are_the_rectified_labels():
    batch = semi_batch(CLASSES)
    batch.boxes_VU4[...] = 0
    hard, soft = (run(*build(threshold=LOW, strong_target=t), batch)[0]["strong"].total for t in ("hard", "soft"))
    assert hard != soft


@pytest.mark.parametrize("mode", [True, False])
def test_second_view_leaves_the_students_mode_and_statistics(mode):
    method, student = build(cutmix={"partner": "second_view"}, momentum={"enable": False})
    student.train(mode)
    batch = semi_batch(CLASSES, second_view=True)
    run(method, student, batch)
    assert student.training is mode
    counters = [value for name, value in student.state_dict().items() if name.endswith("num_batches_tracked")]
    assert {int(value) for value in counters} == ({2} if mode else {0})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cutmix": {"partner": "momentum_view"}, "momentum": {"enable": False}}, "cutmix.partner must be pair"),
        ({"labeler": "momentum", "momentum": {"enable": False}}, "labeler must be student"),
        ({"labeler": "momentum"}, "fp.weight must be 0"),
        ({"kernel": [0.0, 0.0]}, "must have a coefficient other than 0"),
        ({"kernel": [1.0]}, "kernel"),
        ({"preset": "rayseni"}, "preset"),
        ({"preset": ["paper"]}, "preset"),
        ({"prop": {"temp": 0.0}}, "prop.temp"),
        ({"deriv": {"simm": "cosine"}}, "deriv.simm"),
    ],
)
def test_config_refuses(settings, text):
    with pytest.raises(ValidationError, match=text):
        DerPropConfig(**settings)


def test_the_order_must_leave_channels():
    assert projected_channels(DerPropConfig(), 2) == 16
    assert projected_channels(DerPropConfig(order=3), 21) == 21
    assert projected_channels(DerPropConfig(deriv={"dim": "classes"}), 3) == 3
    with pytest.raises(ConfigError, match=r"method\.order must .* D = 2 channels; got 1\."):
        projected_channels(DerPropConfig(deriv={"dim": "classes"}), 2)
    with pytest.raises(ConfigError, match=r"method\.order"):
        DerProp(DerPropConfig(order=2, kernel=(-1.0, 0.0, 1.0), deriv={"dim": 6}), 21)


@pytest.mark.parametrize("order", [0, 2, 3])
def test_orders(order):
    method, student = build(order=order, deriv={"abs": order == 2}, kernel=(-1.0, 0.0, 1.0))
    terms, _ = run(method, student)
    published_total(terms).backward()
    assert terms["sparsity_strong"].normaliser == 2 * (16 - 2 * (order + 1)) * 30


# --- the same bits --------------------------------------------------------------------------------------------------


def test_the_same_step_gives_the_same_bits_and_dropout_follows_the_step():
    values = []
    for step in (4, 4, 5):
        terms, _ = run(*build(), step=step)
        values.append([term.total.item() for term in terms.values()])
    assert values[0] == values[1] != values[2]


def test_two_ranks_see_what_one_sees():
    """Frozen BatchNorm: then an image's part of every sum does not depend on its neighbours."""
    method = DerProp(DerPropConfig(threshold={"mode": "fixed", "initial": 0.2}, region={"segments": 6}), CLASSES)
    student = tiny_segmentor(CLASSES, method.heads, frozen=True)
    whole = semi_batch(CLASSES, labeled=4, unlabeled=4)

    def share(rows):
        names = ("image_L3HW", "label_LHW", "slots_L", "weak_U3HW", "valid_UHW", "slots_U")
        cut = {name: getattr(whole, name)[rows] for name in names}
        return replace(whole, **cut, strong_VU3HW=whole.strong_VU3HW[:, rows], boxes_VU4=whole.boxes_VU4[:, rows])

    one = method.objectives(whole, step_context(student, step=30))
    parts = [method.objectives(share(rows), step_context(student, step=30)) for rows in (slice(2), slice(2, 4))]
    for name, term in one.items():
        torch.testing.assert_close(sum(part[name].total for part in parts), term.total, rtol=1e-5, atol=1e-5)
        assert sum(part[name].normaliser for part in parts) == term.normaliser


class NoHostRead(TorchDispatchMode):
    """Fails on every operation that would wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITS), f"{name} reads the device"
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
            assert all(i.dtype != torch.bool for i in indices), "boolean indexing reads the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_step_reads_nothing_back(preset):
    method, student = build(preset=preset, region={"segments": 6, "impl": "loop"}, criterion={"name": "ohem"})
    teacher = copy.deepcopy(student).eval()
    batch = semi_batch(CLASSES, second_view=method.second_view)
    with NoHostRead():
        terms = method.objectives(batch, step_context(student, teacher, step=50, listener=lambda name, value: None))
        published_total(terms).backward()


def test_the_divergence_vanishes_when_the_strong_view_says_the_pasted_target():
    batch = semi_batch(CLASSES)
    logits, valid = torch.randn(2, CLASSES, 33, 41), torch.ones(2, 33, 41, dtype=torch.bool)
    method, student = build(kl_target="pasted")
    _, mixed = mix(method.config.cutmix, batch, Targets.of(logits, valid), step_context(student))
    pasted = torch.where(inside(batch.boxes_VU4[0], 33, 41)[:, None], logits.flip(0), logits)
    kept = mixed.trusted(torch.tensor(0.0))
    assert kl_divergence(pasted, mixed.distribution_UKHW, kept).item() == pytest.approx(0.0, abs=1e-3)
    assert kl_divergence(pasted, logits.softmax(dim=1), kept) > 100


def test_autocast_and_nobody_listening():
    method, student = build()
    batch = semi_batch(CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method.objectives(batch, step_context(student, step=50))
    published_total(terms).backward()
    assert all(term.total.dtype == torch.float32 for term in terms.values())
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
