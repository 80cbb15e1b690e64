"""Confusion matrix and its ratios: the worked number, a literal count, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysemi.errors import DataError
from raysemi.ops.confusion import confusion_matrix, iou, mean_iou, pixel_accuracy


def test_worked_mean_iou():
    matrix = confusion_matrix(torch.tensor([0, 0, 1, 1, 2, 2, 1]), torch.tensor([0, 1, 1, 255, 2, 0, 255]), 4)
    assert matrix.diagonal().tolist() == [1, 1, 1, 0]
    assert (matrix.sum(0) + matrix.sum(1) - matrix.diagonal()).tolist() == [3, 2, 2, 0]
    assert matrix.sum() == 5
    assert round(100 * mean_iou(matrix), 2) == 33.33  # class 3 is absent and counts 0
    assert iou(matrix).tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2, 0])
    assert pixel_accuracy(matrix) == pytest.approx(3 / 5)


def test_rows_are_labels():
    matrix = confusion_matrix(torch.tensor([[2, 2, 0]]), torch.tensor([[1, 1, 0]]), 3)
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]
    assert matrix.dtype == torch.int64


@pytest.mark.parametrize("ignore", [255, 0, -1])
def test_equals_a_literal_count(ignore):
    rng = np.random.default_rng(3)
    label, predicted = rng.integers(0, 5, (2, 7, 11)), rng.integers(0, 5, (2, 7, 11))
    label[rng.random(label.shape) < 0.2] = ignore
    expected = np.zeros((5, 5), int)
    for row, column in zip(label.flat, predicted.flat, strict=True):
        if row != ignore:
            expected[row, column] += 1
    matrix = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(label), 5, ignore)
    np.testing.assert_array_equal(matrix.numpy(), expected)


def test_images_add_up():
    g = torch.Generator().manual_seed(0)
    predicted, label = (torch.randint(0, 4, (3, 5, 6), generator=g).to(torch.uint8) for _ in range(2))
    parts = sum(confusion_matrix(predicted[i], label[i], 4) for i in range(3))
    assert torch.equal(parts, confusion_matrix(predicted, label, 4))


def test_ignored_pixels_may_have_any_prediction():
    matrix = confusion_matrix(torch.tensor([200, 1]), torch.tensor([255, 1]), 2)
    assert matrix.tolist() == [[0, 0], [0, 1]]


def test_nothing_scored():
    matrix = confusion_matrix(torch.tensor([0, 1]), torch.tensor([255, 255]), 2)
    assert (mean_iou(matrix), pixel_accuracy(matrix)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("predicted", "label", "text"),
    [
        ([0, 1], [0, 37], r"must lie in 0\.\.1; got labels 0\.\.37 and predictions 0\.\.1"),
        ([0, 2], [0, 1], r"must lie in 0\.\.1; got labels 0\.\.1 and predictions 0\.\.2"),
        ([0, 1], [0, -1], r"got labels -1\.\.0"),
        ([0, 1, 1], [0, 1], r"label's shape \(2,\); got \(3,\)"),
    ],
)
def test_refusals(predicted, label, text):
    with pytest.raises(DataError, match=text):
        confusion_matrix(torch.tensor(predicted), torch.tensor(label), 2)
