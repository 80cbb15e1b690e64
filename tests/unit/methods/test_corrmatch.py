"""CorrMatch: the map that spreads logits, who learns through it, and the published weights.

What it shares with DerProp (CutMix, threshold, regions) is tested there.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from makers import semi_batch, step_context, tiny_segmentor
from pydantic import ValidationError

from raysemi.methods.base import Average
from raysemi.methods.corrmatch import PRESETS, CorrMatch, CorrMatchConfig
from raysemi.methods.passes import Projections, View
from raysemi.ops.similarity import collect, propagate

CLASSES = 5
LOW = {"initial": 0.21, "mode": "fixed"}
LABELED = {"supervised", "supervised_propagated"}
UNLABELED = {"strong", "kl", "perturbed", "propagated_strong", "propagated_weak"}


def build(**settings):
    settings = {"threshold": LOW, "region": {"segments": 6}, **settings}
    method = CorrMatch(CorrMatchConfig(**settings), CLASSES)
    return method, tiny_segmentor(CLASSES, method.heads, frozen=True)


def run(method, student, batch=None, **rest):
    seen = {}
    batch = semi_batch(CLASSES, second_view=method.second_view) if batch is None else batch
    return method.objectives(batch, step_context(student, listener=seen.__setitem__, **rest)), seen


def test_it_is_a_method():
    method, _ = build()
    assert method.average == Average()
    assert (method.strong_views, method.second_view, method.unlabeled_optional) == (1, False, True)
    assert set(method.state_dict()) == {"threshold"}
    assert CorrMatchConfig().threshold.initial == 0.85


def test_published_weights_and_the_total_of_terms_that_are_all_one():
    terms, _ = run(*build())
    assert {name: term.weight for name, term in terms.items()} == {
        "supervised": 0.25, "supervised_propagated": 0.25, "strong": 0.125, "kl": 0.125, "perturbed": 0.125,
        "propagated_strong": 0.0625, "propagated_weak": 0.0625,
    }  # fmt: skip
    assert sum(term.weight for term in terms.values()) == 1.0
    assert {name for name, term in terms.items() if term.side == "supervised"} == LABELED
    paper, _ = run(*build(preset="paper"))
    assert "perturbed" not in paper
    assert paper["strong"].weight == 0.25


def test_losses_of_spread_logits_train_the_map_and_the_rest_trains_the_classifier():
    method, student = build()
    terms, _ = run(method, student)
    assert set(terms) == LABELED | UNLABELED
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    for name, term in terms.items():
        grads = torch.autograd.grad(term.total, list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {key for key, g in zip(parameters, grads, strict=True) if g is not None and g.any()}
        spread = "propagated" in name
        assert any(key.startswith("encoder.") for key in reached), name
        assert any(key.startswith("decoder.") for key in reached) == (not spread), name
        for side in ("first", "second"):
            assert any(key.startswith(f"heads.correlation.{side}") for key in reached) == spread, (name, side)


def test_each_term_sees_its_own_view():
    method, student = build()
    batch = semi_batch(CLASSES)
    views = {"labeled": batch.image_L3HW, "weak": batch.weak_U3HW, "strong": batch.strong_VU3HW}
    for view in views.values():
        view.requires_grad_()
    terms, _ = run(method, student, batch)
    weak = {"perturbed", "propagated_weak"}
    for name, term in terms.items():
        found = torch.autograd.grad(term.total, list(views.values()), retain_graph=True, allow_unused=True)
        reached = {view for view, grad in zip(views, found, strict=True) if grad is not None and grad.any()}
        assert reached == {"labeled" if name in LABELED else "weak" if name in weak else "strong"}, name


@pytest.mark.parametrize(
    ("source", "channels", "below"),
    [
        ("encoder", 10, set()),
        ("aspp", 8, {"pyramid"}),
        ("fusion", 8, {"pyramid", "reduce", "fuse"}),
        ("classifier", CLASSES, {"pyramid", "reduce", "fuse", "classifier"}),
    ],
)
@pytest.mark.parametrize("perturbed", [True, False])
def test_the_map_is_made_behind_each_part_of_the_network(source, channels, below, perturbed):
    """A loss of propagated logits reaches what lies below its map, and nothing above."""
    method, student = build(corr={"from": source}, fp={"weight": 0.25 if perturbed else 0.0})
    assert student.heads["correlation"].reduce.in_channels == channels
    terms, _ = run(method, student)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    for name in ("supervised_propagated", "propagated_weak", "propagated_strong"):
        grads = torch.autograd.grad(terms[name].total, list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {key for key, g in zip(parameters, grads, strict=True) if g is not None and g.any()}
        assert {key.split(".")[1] for key in reached if key.startswith("decoder.")} == below
        assert any(key.startswith("encoder.") for key in reached)


# --- the map --------------------------------------------------------------------------------------------------------


def dense(method, student, images):
    """The map as the paper writes it, [B, N, N] whole."""
    high = student.encode(images).high_BDhw
    first, second = (side.flatten(2) for side in student.heads["correlation"](high))
    scores = torch.einsum("bdi,bdj->bij", first, second)
    scale = first.shape[1] ** -0.5
    corr = method.config.corr
    axis = 2 if corr.norm == "source" else 1
    return (scores * scale).softmax(axis) if corr.scale == "inside" else scores.softmax(axis) * scale


@pytest.mark.parametrize("scale", ["inside", "outside"])
@pytest.mark.parametrize("norm", ["source", "target"])
@pytest.mark.parametrize("dim", [None, 7])
def test_logits_spread_along_the_dense_map(scale, norm, dim):
    method, student = build(corr={"scale": scale, "norm": norm, "dim": dim})
    assert student.heads["correlation"].first.out_channels == (dim or CLASSES)
    images = semi_batch(CLASSES).weak_U3HW
    prediction = student(images)
    projections = Projections.of(*student.heads["correlation"](prediction.features.high_BDhw))
    cells = tuple(prediction.features.high_BDhw.shape[2:])
    spread = method._spread(View.of(prediction, projections))

    small = torch.nn.functional.interpolate(prediction.logits_BKHW, size=cells, mode="bilinear", align_corners=True)
    expected = torch.einsum("bki,bij->bkj", small.flatten(2), dense(method, student, images)).unflatten(2, cells)
    expected = torch.nn.functional.interpolate(expected, size=images.shape[2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(spread, expected, rtol=1e-4, atol=1e-5)


def test_a_source_hands_out_one_and_a_target_receives_a_mean():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 4, 9, generator=generator) for _ in range(2))
    constant = torch.tensor([2.0, -1.0, 0.5])[None, :, None].expand(2, 3, 9)
    torch.testing.assert_close(collect(constant, left, right), constant)
    columns = torch.einsum("bdi,bdj->bij", left, right).softmax(2).sum(1)
    torch.testing.assert_close(propagate(constant, left, right), constant * columns[:, None])
    assert not torch.allclose(columns, torch.ones_like(columns), atol=0.05)


def test_collect_gives_the_gradient_of_the_dense_map():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(2, 4, 9, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    logits = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((collect(logits, left, right) * weights).sum(), (left, right))
    whole = torch.einsum("bki,bij->bkj", logits, torch.einsum("bdi,bdj->bij", left, right).softmax(1))
    theirs = torch.autograd.grad((whole * weights).sum(), (left, right))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


# --- what is taught -------------------------------------------------------------------------------------------------


def test_nothing_trusted_is_exactly_zero_with_finite_gradients():
    method, student = build(threshold={"initial": 0.999, "mode": "fixed"})
    terms, seen = run(method, student)
    assert seen["kept_ratio"].item() == 0
    for name in UNLABELED:
        assert terms[name].total.item() == 0
    sum(term.total for term in terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)


def test_the_weak_term_learns_labels_that_no_region_has_changed():
    some = {"initial": 0.3075, "mode": "fixed"}  # some of the pixels
    method, student = build(region={"enable": False}, threshold=some)
    regions, _ = build(region={"segments": 20}, threshold=some)
    regions.load_state_dict(method.state_dict())
    (without, seen_without), (with_, seen_with) = run(method, student), run(regions, copy.deepcopy(student))
    assert without["propagated_weak"].total == with_["propagated_weak"].total
    assert without["perturbed"].total == with_["perturbed"].total
    assert seen_with["trusted"].sum() > seen_without["trusted"].sum()  # regions did something
    assert torch.equal(seen_with["trusted_before"], seen_without["trusted"])
    assert without["kl"].total == with_["kl"].total  # its mask is the one before regions
    expanded, _ = build(region={"segments": 20}, threshold=some, kl_mask="expanded")
    assert run(expanded, copy.deepcopy(student))[0]["kl"].total != with_["kl"].total


def test_the_threshold_moves_with_the_mean_peak_of_present_classes():
    method, student = build(threshold={"initial": 0.85, "momentum": 0.9})
    batch = semi_batch(CLASSES)
    twin = copy.deepcopy(student)
    logits = twin.decode(twin.encode(batch.weak_U3HW), batch.weak_U3HW.shape[2:]).logits_BKHW  # frozen: no batch effect
    confidence, label = logits.softmax(1).max(1)
    peaks = [
        confidence[batch.valid_UHW & (label == k)].max()
        for k in range(CLASSES)
        if (batch.valid_UHW & (label == k)).any()
    ]
    run(method, student, batch)
    expected = 0.9 * 0.85 + 0.1 * torch.stack(peaks).mean().item()
    assert method.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_divergence_inside_the_box_by_target():
    batch = semi_batch(CLASSES)
    values = {}
    for target in ("pasted", "unpasted", "drop_box"):
        method, student = build(kl_target=target)
        values[target] = run(method, student, batch)[0]["kl"].total.item()
    assert len(set(values.values())) == 3
    none = replace(batch, boxes_VU4=torch.zeros_like(batch.boxes_VU4))
    without = {target: run(*build(kl_target=target), none)[0]["kl"].total.item() for target in values}
    assert len(set(without.values())) == 1


def test_without_unlabeled_images_the_labeled_terms_stay():
    method, student = build()
    terms, _ = run(method, student, semi_batch(CLASSES, unlabeled=0))
    assert set(terms) == LABELED
    assert method.threshold.item() == pytest.approx(0.21)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_run(preset):
    method, student = build(preset=preset)
    terms, _ = run(method, student)
    assert all(math.isfinite(term.total.item()) for term in terms.values())


def test_a_momentum_view_is_refused():
    with pytest.raises(ValidationError, match="partner must be pair or second_view"):
        CorrMatchConfig(cutmix={"partner": "momentum_view"})
