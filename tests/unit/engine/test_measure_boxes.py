"""Counts of boxes and pixels by hand."""

from __future__ import annotations

import pytest
import torch

from raysemi.engine.measure_boxes import BoxCounts


def test_pixels_are_counted_inside_and_outside_agreeing_boxes() -> None:
    counts = BoxCounts(3)
    label = torch.tensor([[1, 1, 2, 255], [0, 1, 2, 2]])
    predicted = torch.tensor([[1, 1, 1, 1], [1, 1, 2, 2]])
    sure = torch.ones(2, 4, dtype=torch.bool)
    sure[1, 3] = False
    counts.add(torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 1.0]]), torch.tensor([1, 2]),
               torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0]]), torch.tensor([1, 2]))  # fmt: skip
    counts.add_pixels(predicted, sure, label, torch.tensor([[0.0, 0.0, 2.0, 2.0, 1.0], [2.0, 0.0, 4.0, 1.0, 2.0]]))
    result = counts.result(("background", "a", "b"), [1, 2])
    assert (result["precision"], result["recall"]) == (50.0, 50.0)  # the second overlaps by a half alone
    a, b = result["classes"]["a"], result["classes"]["b"]
    assert a["pixel_accuracy"] == pytest.approx(60.0)  # 3 of 5 that are annotated
    assert a["pixel_accuracy_inside"] == pytest.approx(75.0)
    assert a["pixel_accuracy_outside"] == pytest.approx(0.0)
    assert (b["pixel_accuracy"], b["pixel_accuracy_inside"], b["pixel_accuracy_outside"]) == (100.0, None, 100.0)
