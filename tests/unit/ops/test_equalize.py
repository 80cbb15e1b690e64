"""The worked numbers of ael.md."""

from __future__ import annotations

import pytest
import torch

from raysemi.ops.equalize import class_pixels, keep_rates, moved_bank, true_class_sums

BANK = torch.tensor([0.9, 0.5, 0.7])


def test_the_worked_rates():
    """ael.md section 3: k = (.9, .5, .7) -> r = (.2, 1, .6)."""
    torch.testing.assert_close(keep_rates(BANK, 1.0), torch.tensor([0.2, 1.0, 0.6]))
    torch.testing.assert_close(keep_rates(BANK, 2.0), torch.tensor([0.04, 1.0, 0.36]))
    assert keep_rates(BANK, 0.0).tolist() == [1, 1, 1]
    for equal in (0.0, 0.3, 1.0):
        assert keep_rates(torch.full((4,), equal), 1.0).tolist() == [1, 1, 1, 1]


def test_the_bank_after_a_step():
    """ael.md section 8: .5 with v = .9 -> .5004; a class that is absent stays, or moves towards 0."""
    sums_2K = torch.tensor([[1.8, 0.0, 0.5], [2.0, 0.0, 1.0]])
    torch.testing.assert_close(
        moved_bank(torch.full((3,), 0.5), sums_2K, 0.999), torch.tensor([0.5004, 0.5, 0.5]), rtol=0, atol=1e-7
    )
    zero_K = moved_bank(torch.full((3,), 0.5), sums_2K, 0.999, absent_zero=True)
    assert zero_K[1].item() == pytest.approx(0.4995)


def test_sums_are_those_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits_BKHW = torch.randn(2, 5, 7, 11, generator=generator)
    labels_BHW = torch.randint(0, 4, (2, 7, 11), generator=generator)  # class 4 is absent
    labels_BHW[:, :2] = 255
    sums_2K = true_class_sums(logits_BKHW, labels_BHW)
    probability_BKHW = logits_BKHW.softmax(dim=1)
    for k in range(5):
        chosen_BHW = labels_BHW == k
        assert sums_2K[1, k] == chosen_BHW.sum()
        assert sums_2K[0, k].item() == pytest.approx(probability_BKHW[:, k][chosen_BHW].sum().item(), abs=1e-4)
    pixels_BK = class_pixels(labels_BHW, 5)
    assert pixels_BK.tolist() == [[(image == k).sum().item() for k in range(5)] for image in labels_BHW]


def test_a_sum_over_millions_of_pixels_loses_none():
    """One by one in fp32, ones above 2 ** 24 would be lost."""
    logits_BKHW = torch.zeros(1, 1, 4200, 4200)
    sums_2K = true_class_sums(logits_BKHW, torch.zeros(1, 4200, 4200, dtype=torch.int64))
    assert sums_2K.tolist() == [[4200.0**2], [4200.0**2]]
