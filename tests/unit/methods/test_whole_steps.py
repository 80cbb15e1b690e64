"""CorrMatch and DerProp, every term of a whole step against the specification's formulas, written out in NumPy.

What the networks say (scores and projections of both passes) is taken from the real step; all that follows from it,
from pseudo-labels to sums and their counts, is computed here once more, from dense maps, with nothing that is tested.
Axes: B images, K classes, D channels, N cells, H x W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import semi_batch, step_context, tiny_segmentor

from raysemi.methods import METHODS

CLASSES, HEIGHT, WIDTH, LABELED = 4, 33, 41, 2
CELLS = 5, 6
STEP, STEPS, PERIOD = 57, 100, 10
TAU, MOMENTUM = 0.5, 0.95
SCALE = 200.0
BOX = 7, 5, 36, 22  # of the first unlabeled image; left, top, right, bottom


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def interpolation(rows, columns):
    """Weights [rows, columns] that resize an axis of `columns` linearly to `rows`, corners on corners."""
    place = np.arange(rows)[:, None] * (columns - 1) / (rows - 1)
    return np.maximum(0.0, 1.0 - np.abs(place - np.arange(columns)))


def resized(x_BKHW, height, width):
    rows, columns = interpolation(height, x_BKHW.shape[2]), interpolation(width, x_BKHW.shape[3])
    return np.einsum("yh,bkhw,xw->bkyx", rows, x_BKHW, columns)


def literal_regions(label_HW, trusted_HW, shapes_SHW, threshold):
    """The sequential rule, a region after the other."""
    label_HW, expanded_HW, threshold = label_HW.copy(), trusted_HW.copy(), np.float32(threshold)
    for shape_HW in shapes_SHW:
        counted_HW = shape_HW & trusted_HW
        if not counted_HW.any() or np.float32(counted_HW.sum() / shape_HW.sum()) < threshold:
            continue
        counts_K = np.bincount(label_HW[counted_HW], minlength=CLASSES)
        if np.float32(counts_K.max() / counts_K.sum()) > threshold:
            label_HW[shape_HW] = counts_K.argmax()
            expanded_HW |= shape_HW
    return label_HW, expanded_HW


class Expected:
    """The terms, by name: (sum, count)."""

    def __init__(self, name, config, batch, heard, rows_S, order):
        self.order, self.config = order, config
        logits_BKHW, perturbed_UKHW, (first_BDN, second_BDN), strong_UKHW, (strong_first, strong_second) = heard
        label_LHW, valid_UHW = batch.label_LHW.numpy(), batch.valid_UHW.numpy()
        labeled, weak = slice(None, LABELED), slice(LABELED, None)
        spread_BKHW = self.spread(logits_BKHW, self.map(first_BDN, second_BDN))

        alpha = STEP // PERIOD * PERIOD / STEPS if name == "derprop" else 0.0
        blended_UKHW = (1 - alpha) * logits_BKHW[weak] + alpha * spread_BKHW[weak]
        probability_UKHW = softmax(blended_UKHW, 1)
        confidence_UHW, pseudo_UHW = probability_UKHW.max(1), probability_UKHW.argmax(1)
        peaks = [confidence_UHW[(pseudo_UHW == k) & valid_UHW] for k in range(CLASSES)]
        self.tau = MOMENTUM * TAU + (1 - MOMENTUM) * np.mean([peak.max() for peak in peaks if peak.size])
        taught_UHW = (confidence_UHW >= self.tau) & valid_UHW

        box_UHW = np.zeros_like(valid_UHW)
        left, top, right, bottom = BOX
        box_UHW[0, top:bottom, left:right] = True

        def mixed(x):
            inside = box_UHW if x.ndim == 3 else box_UHW[:, None]
            return np.where(inside, x[[1, 0]], x)

        label_UHW, confidence_UHW, target_UKHW = mixed(pseudo_UHW), mixed(confidence_UHW), mixed(probability_UKHW)
        valid_mixed_UHW = mixed(valid_UHW)
        base_UHW = (confidence_UHW >= self.tau) & valid_mixed_UHW
        shapes_USHW = self.shapes(self.map(first_BDN, second_BDN)[weak][:, rows_S])
        shapes_USHW &= (valid_mixed_UHW & ~box_UHW)[:, None]
        rectified = [literal_regions(*each, self.tau) for each in zip(label_UHW, base_UHW, shapes_USHW, strict=True)]
        label_UHW, kept_UHW = (np.stack(part) for part in zip(*rectified, strict=True))
        self.enlarged = (kept_UHW & ~base_UHW).sum()

        strong_spread_UKHW = self.spread(strong_UKHW, self.map(strong_first, strong_second))
        log_strong_UKHW = np.log(softmax(strong_UKHW, 1))
        annotated, valid, valid_mixed = (label_LHW != 255).sum(), valid_UHW.sum(), valid_mixed_UHW.sum()
        hard = self.cross_entropy(strong_UKHW, label_UHW, kept_UHW)
        soft = -(target_UKHW * log_strong_UKHW).sum(1)[kept_UHW].sum()
        divergence_UHW = (target_UKHW * (np.log(target_UKHW) - log_strong_UKHW)).sum(1)
        self.terms = {
            "supervised": (self.cross_entropy(logits_BKHW[labeled], label_LHW, label_LHW != 255), annotated),
            "supervised_propagated": (
                self.cross_entropy(spread_BKHW[labeled], label_LHW, label_LHW != 255), annotated,
            ),
            "strong": (soft if name == "derprop" else hard, valid_mixed),
            "kl": (divergence_UHW[base_UHW].sum(), valid_mixed),
            "perturbed": (self.cross_entropy(perturbed_UKHW, pseudo_UHW, taught_UHW), valid),
            "propagated_strong": (self.cross_entropy(strong_spread_UKHW, label_UHW, kept_UHW), valid_mixed),
            "propagated_weak": (self.cross_entropy(spread_BKHW[weak], pseudo_UHW, taught_UHW), valid),
        }  # fmt: skip
        if name == "derprop":
            sides = first_BDN, second_BDN
            self.maps([side[labeled] for side in sides], label_LHW)
            self.match([strong_first, strong_second], [side[weak] for side in sides], valid_UHW)

    @staticmethod
    def cross_entropy(logits_BKHW, label_BHW, kept_BHW):
        log_BKHW = np.log(softmax(logits_BKHW, 1))
        known_BHW = np.where(kept_BHW, label_BHW, 0)
        return -np.take_along_axis(log_BKHW, known_BHW[:, None], 1)[:, 0][kept_BHW].sum()

    def map(self, first_BDN, second_BDN):
        """[B, N, N]: row i hands out mass 1."""
        scores_BNN = 0.0
        for n in range(self.order + 1):
            one, two = np.diff(first_BDN, n, axis=1), np.diff(second_BDN, n, axis=1)
            scores_BNN = scores_BNN + np.einsum("bdi,bdj->bij", one, two) / np.sqrt(one.shape[1])
        return softmax(scores_BNN, 2)

    @staticmethod
    def spread(logits_BKHW, map_BNN):
        small_BKN = resized(logits_BKHW, *CELLS).reshape(*logits_BKHW.shape[:2], -1)
        spread_BKN = np.einsum("bki,bij->bkj", small_BKN, map_BNN)
        return resized(spread_BKN.reshape(*spread_BKN.shape[:2], *CELLS), HEIGHT, WIDTH)

    @staticmethod
    def shapes(rows_USN):
        large_USHW = resized(rows_USN.reshape(*rows_USN.shape[:2], *CELLS), HEIGHT, WIDTH)
        low, high = large_USHW.min((2, 3), keepdims=True), large_USHW.max((2, 3), keepdims=True)
        return (large_USHW - low) / (high - low) > 0.5

    @staticmethod
    def similarity(first_BDN, second_BDN, n):
        one, two = (softmax(np.diff(side, n, axis=1), 1) for side in (first_BDN, second_BDN))
        return np.einsum("bdi,bdj->bij", one, two) / np.sqrt(one.shape[1])

    @staticmethod
    def sparse(sides, order):
        means = [np.abs(np.diff(softmax(side, 1), order, axis=1)) for side in sides]
        return sum(each.sum() for each in means) / 2, means[0].size

    def maps(self, sides, label_LHW):
        """L_der_l and L_sp of the labeled images: labels at every eighth pixel, targets 1 / sqrt(D_n)."""
        node_LN = label_LHW[:, ::8, ::8].reshape(LABELED, -1)
        pairs_LNN = (node_LN[:, :, None] != 255) & (node_LN[:, None] != 255)
        same_LNN = node_LN[:, :, None] == node_LN[:, None]
        total, channels = 0.0, sides[0].shape[1]
        for n in range(2):
            target_LNN = same_LNN / np.sqrt(channels - n)
            total += np.abs(self.similarity(*sides, n) - target_LNN)[pairs_LNN].sum() / 2
        self.terms["derivative_labeled"] = total, pairs_LNN.sum()
        self.terms["sparsity_labeled"] = self.sparse(sides, 2)

    def match(self, strong, weak, valid_UHW):
        """L_der_u: cells outside of the box, whose reach is half way to the next one's centre, and not padded."""
        y_h, x_w = 8 * np.arange(CELLS[0]), 8 * np.arange(CELLS[1])
        left, top, right, bottom = BOX
        touched_hw = ((y_h + 4 >= top) & (y_h - 4 <= bottom - 1))[:, None] & ((x_w + 4 >= left) & (x_w - 4 < right))
        outside_Uhw = np.stack((~touched_hw, np.ones_like(touched_hw)))
        node_UN = (valid_UHW[:, ::8, ::8] & outside_Uhw).reshape(2, -1)
        pairs_UNN = node_UN[:, :, None] & node_UN[:, None]
        total = sum(
            np.abs(self.similarity(*strong, n) - self.similarity(*weak, n))[pairs_UNN].sum() / 2 for n in range(2)
        )
        self.terms["derivative_unlabeled"] = total, pairs_UNN.sum()
        self.terms["sparsity_strong"] = self.sparse(strong, 2)


WEIGHTS = {
    "supervised": 0.25, "supervised_propagated": 0.25, "strong": 0.125, "kl": 0.125, "perturbed": 0.125,
    "propagated_strong": 0.0625, "propagated_weak": 0.0625, "derivative_labeled": 0.25, "derivative_unlabeled": 0.25,
    "sparsity_labeled": 0.125, "sparsity_strong": 0.125,
}  # fmt: skip


@pytest.mark.parametrize(("name", "order"), [("corrmatch", 0), ("derprop", 1)])
def test_every_term_of_a_step(name, order):
    config, kind = METHODS[name]
    settings = {"threshold": {"initial": TAU, "momentum": MOMENTUM}, "region": {"segments": 9, "rows": "uniform"}}
    method = kind(config(**settings), CLASSES).double()
    student = tiny_segmentor(CLASSES, method.heads, frozen=True).double()
    head = student.heads["correlation"]
    for projection in (head.first, head.second):
        projection.weight.data.mul_(8.0)  # maps that differ from cell to cell, as a trained network's,
    student.decoder.classifier.weight.data.mul_(SCALE)  # and surer of some pixels than of others
    student.decoder.classifier.bias.data.zero_()
    batch = semi_batch(CLASSES, labeled=LABELED)
    doubled = {
        name: value.double() for name, value in vars(batch).items() if name.endswith("3HW") and value is not None
    }
    batch = replace(batch, **doubled)
    assert batch.boxes_VU4[0].tolist() == [list(BOX), [0, 0, 0, 0]]

    heard, seen = {"images": [], "scores": [], "projections": []}, {}
    student.encoder.register_forward_hook(lambda _, given, __: heard["images"].append(given[0]))
    student.decoder.register_forward_hook(lambda _, __, said: heard["scores"].append(said[0].detach().numpy()))
    head.register_forward_hook(
        lambda _, __, said: heard["projections"].append([x.detach().flatten(2).numpy() for x in said])
    )
    context = step_context(student, student, step=STEP, steps=STEPS, period=PERIOD, listener=seen.__setitem__)
    terms = method.objectives(batch, context)

    strong_U3HW = batch.strong_VU3HW[0].clone()
    left, top, right, bottom = BOX
    strong_U3HW[0, :, top:bottom, left:right] = batch.strong_VU3HW[0, 1, :, top:bottom, left:right]
    torch.testing.assert_close(heard["images"][1], (strong_U3HW - student.mean) / student.std)

    first, strong = (resized(scores, HEIGHT, WIDTH) for scores in heard["scores"])
    clean = LABELED + 2
    rows_S = np.arange(9) * (CELLS[0] * CELLS[1]) // 9
    networks = first[:clean], first[clean:], heard["projections"][0], strong, heard["projections"][1]
    expected = Expected(name, method.config, batch, networks, rows_S, order)
    assert method.threshold.item() == pytest.approx(expected.tau, rel=1e-6)
    assert expected.enlarged > 0  # else regions prove nothing
    assert terms.keys() == expected.terms.keys()
    for title, (total, count) in expected.terms.items():
        assert terms[title].normaliser.item() == count, title
        assert terms[title].total.item() == pytest.approx(total, rel=2e-5), title
        assert total > 0, title
        assert terms[title].weight == pytest.approx(WEIGHTS[title]), title
