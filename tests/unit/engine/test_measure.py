"""Quality of pseudo-labels, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import semi_batch

from raysemi.engine.measure import LARGEST_WIDTH, Look, PseudoQuality, colour, encode, grey, unlabeled_panels

CLASSES = ("sky", "road", "car")
TRUTH = [[0, 0, 0, 0, 1, 1, 1, 2, 255, 0]]
VALID = [[1, 1, 1, 1, 1, 1, 1, 1, 1, 0]]  # the last pixel is padding, the last but one not annotated: 8 pixels count
PSEUDO = [[0, 0, 1, 2, 1, 1, 0, 1, 0, 0]]  # right: 2 of 4 sky, 2 of 3 road, no car
KEPT_BEFORE = [[1, 0, 1, 0, 1, 0, 0, 0, 1, 1]]  # sky: 1 right and 1 wrong; road: 1 right; car: none
PROPAGATED = [[0, 0, 0, 2, 1, 1, 0, 2, 0, 0]]  # right: 3 of 4 sky, 2 of 3 road, the car
KEPT = [[1, 1, 1, 0, 1, 1, 1, 0, 1, 1]]  # sky: 3 right; road: 2 right and 1 wrong; car: none


def look(**maps):
    """A batch of one image of 1 x 10 pixels."""
    tensors = {name: torch.tensor(rows)[None] for name, rows in maps.items()}
    for name in ("trusted", "trusted_before"):
        if name in tensors:
            tensors[name] = tensors[name].bool()
    batch = replace(semi_batch(3), valid_UHW=torch.tensor(VALID, dtype=torch.bool)[None])
    truth_UHW = torch.tensor(TRUTH, dtype=torch.uint8)[None]
    return Look(batch, ("key",), truth_UHW, tensors, truth_UHW)


def metrics(*looks):
    quality = PseudoQuality(len(CLASSES))
    for one in looks:
        quality.add(one)
    return {name.removeprefix("pseudo/"): value for name, value in quality.metrics(CLASSES).items()}


BEFORE = {
    "accuracy_before": 4 / 8, "accuracy_before/sky": 2 / 4, "accuracy_before/road": 2 / 3, "accuracy_before/car": 0,
    "kept_accuracy_before": 2 / 3, "kept_accuracy_before/sky": 1 / 2, "kept_accuracy_before/road": 1,
    "mining_before": 2 / 4, "mining_before/sky": 1 / 2, "mining_before/road": 1 / 2,
    "effective_before": 2 / 8, "effective_before/sky": 1 / 4, "effective_before/road": 1 / 3,
    "effective_before/car": 0,
}  # fmt: skip
AFTER = {
    "accuracy_after": 6 / 8, "accuracy_after/sky": 3 / 4, "accuracy_after/road": 2 / 3, "accuracy_after/car": 1,
    "kept_accuracy_after": 5 / 6, "kept_accuracy_after/sky": 1, "kept_accuracy_after/road": 2 / 3,
    "mining_after": 5 / 6, "mining_after/sky": 1, "mining_after/road": 1, "mining_after/car": 0,
    "effective_after": 5 / 8, "effective_after/sky": 3 / 4, "effective_after/road": 2 / 3, "effective_after/car": 0,
}  # fmt: skip
WHOLE = {"pseudo": PSEUDO, "trusted_before": KEPT_BEFORE, "propagated": PROPAGATED, "trusted": KEPT}


def test_worked_numbers_before_and_after_propagation():
    """A share of nothing (no car was right before, none was kept) is left out, not 0."""
    expected = {name: 100 * share for name, share in (BEFORE | AFTER).items()}
    assert metrics(look(**WHOLE)) == pytest.approx(expected)


def test_batches_are_counted_together_not_averaged():
    right = {"pseudo": TRUTH, "trusted_before": VALID, "propagated": PROPAGATED, "trusted": KEPT}
    found = metrics(look(**WHOLE), look(**right))
    assert found["mining_before"] == pytest.approx(100 * (2 + 8) / (4 + 8))
    assert found["kept_accuracy_before"] == pytest.approx(100 * (2 + 8) / (3 + 8))
    assert found["accuracy_after/road"] == pytest.approx(100 * 4 / 6)


def test_a_method_without_propagation_has_only_the_first_stage():
    found = metrics(look(pseudo=PSEUDO, trusted=KEPT_BEFORE))
    assert found == pytest.approx({name: 100 * share for name, share in BEFORE.items()})
    assert metrics(look(confidence=PSEUDO)) == {}


def test_colours_and_pictures():
    palette = ((9, 8, 7), (1, 2, 3))
    assert colour(np.array([[0, 1, 255]]), palette).tolist() == [[[9, 8, 7], [1, 2, 3], [0, 0, 0]]]
    for width, shown in ((LARGEST_WIDTH, LARGEST_WIDTH), (3 * LARGEST_WIDTH, LARGEST_WIDTH), (5, 5)):
        png = encode(np.zeros((30, width, 3), dtype=np.uint8))
        assert int.from_bytes(png[16:20], "big") == shown  # the width of a PNG's header


def test_the_weights_stand_beside_the_kept_pixels():
    weight = [[0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 0.0, 0.0]]
    palette = ((10, 20, 30), (40, 50, 60), (70, 80, 90))
    batch = semi_batch(3)  # pictures need an image of a size that PNG holds
    one = replace(look(**WHOLE, weight=weight), batch=replace(batch, weak_U3HW=torch.rand(1, 3, 1, 10)))
    titles = [title for title, _ in unlabeled_panels(one, 0, palette)]
    assert titles == ["image", "pseudo-label", "after propagation", "kept pixels", "weight", "prediction", "truth"]
    assert grey(np.array(weight))[0, :, 1].tolist() == [0, 51, 102, 153, 204, 255, 255, 255, 0, 0]
    assert grey(np.array([[1.0, 2.0]]))[0, :, 0].tolist() == [128, 255]  # the released form reaches 2
