"""Losses against a NumPy oracle, the worked numbers of the papers, and sums that do not depend on sharding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysemi.errors import ConfigError
from raysemi.ops.losses import (
    IGNORE,
    Criterion,
    class_balance,
    kl_divergence,
    labeled_loss,
    ohem_cross_entropy,
    ohem_keep,
    pixel_cross_entropy,
    soft_cross_entropy,
    supervised,
    unsupervised,
)

TRUE = (0.95, 0.60, 0.80, 0.30, 0.75, 0.99)  # probability of the true class at six pixels


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def cross_entropy(z, y):
    known = np.where(y == 255, 0, y)
    return -np.take_along_axis(log_softmax(z), known[:, None], 1)[:, 0] * (y != 255)


def ohem_kept(p, valid, threshold, min_kept):
    if min_kept > valid.sum():
        return valid
    if min_kept:
        threshold = max(threshold, np.sort(np.where(valid, p, 1.0), axis=None)[min(p.size, min_kept) - 1])
    return valid & (p <= threshold)


def make(seed, images=2, classes=5, height=7, width=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, height, width, generator=g, dtype=torch.float64).to(dtype) * 2
    labels = torch.randint(0, classes, (images, height, width), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = IGNORE
    return logits, labels


def two_class(probabilities):
    """Logits [1, 2, 1, n] whose class 0 has these probabilities, and labels 0."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack((p.log(), (1 - p).log()))[None, :, None], torch.zeros(1, 1, len(p), dtype=torch.int64)


class OneRank:
    def sum(self, value):
        return value


def test_cross_entropy_is_a_sum_and_a_count():
    logits, labels = make(0)
    total, count = pixel_cross_entropy(logits, labels)
    assert total.item() == pytest.approx(cross_entropy(logits.numpy(), labels.numpy()).sum())
    assert count.item() == (labels != IGNORE).sum().item()
    assert not count.requires_grad


def test_weight_multiplies_and_is_not_counted():
    logits, labels = make(1)
    counted = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    total, count = pixel_cross_entropy(logits, labels, counted_BHW=counted, weight_BHW=weight)
    expected = (cross_entropy(logits.numpy(), labels.numpy()) * weight.numpy() * counted.numpy()).sum()
    assert total.item() == pytest.approx(expected)
    assert count.item() == counted.sum().item()


def test_worked_masked_consistency():
    # cross-entropies (2, 1, .5, 4, 9), confidence (.99, .97, .96, .50, .99), last pixel padded, threshold .95
    logits, labels = two_class(tuple(np.exp(-np.array([2.0, 1.0, 0.5, 4.0, 9.0]))))
    trusted = torch.tensor([[[0.99, 0.97, 0.96, 0.50, 0.99]]]) >= 0.95
    valid = torch.tensor([[[True, True, True, True, False]]])
    total, count = pixel_cross_entropy(logits, labels, counted_BHW=valid, weight_BHW=trusted)
    assert (total / count).item() == pytest.approx(0.875)


def test_nothing_trusted_gives_zero_and_finite_gradients():
    logits, labels = make(4)
    logits.requires_grad_()
    nothing = torch.zeros(labels.shape, dtype=torch.bool)
    target = torch.zeros_like(logits).scatter_(1, torch.zeros_like(labels)[:, None], 1.0)
    total = pixel_cross_entropy(logits, labels, weight_BHW=nothing)[0]
    total = total + soft_cross_entropy(logits, target, nothing) + kl_divergence(logits, target, nothing)
    total.backward()
    assert total.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ignored_pixels_change_nothing():
    logits, labels = make(5)
    moved = torch.where((labels == IGNORE)[:, None], logits + torch.arange(5.0)[None, :, None, None], logits)
    for loss in (lambda z: pixel_cross_entropy(z, labels)[0], lambda z: ohem_cross_entropy(z, labels, min_kept=30)):
        assert loss(moved).item() == loss(logits).item()


def test_labels_may_be_bytes_and_logits_half():
    logits, labels = make(6, dtype=torch.float32)
    total, count = pixel_cross_entropy(logits.bfloat16(), labels.to(torch.uint8))
    assert total.dtype == count.dtype == torch.float32
    exact = cross_entropy(logits.bfloat16().double().numpy(), labels.numpy()).sum()
    assert total.item() == pytest.approx(exact, rel=1e-5)  # bf16 arithmetic would miss it by 1e-2


@pytest.mark.parametrize("real", [False, True])
def test_soft_losses_equal_their_formulas(real):
    logits, labels = make(7)
    target = make(8)[0].softmax(1)
    target[:, 2] = 0.0
    target = target / target.sum(1, keepdim=True)
    kept = labels != IGNORE
    if real:
        kept = kept * torch.rand(kept.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    t, log_p, k = target.numpy(), log_softmax(logits.numpy()), kept.numpy()
    log_t = np.log(np.where(t > 0, t, 1.0))
    assert soft_cross_entropy(logits, target, kept).item() == pytest.approx(-((t * log_p).sum(1) * k).sum())
    assert kl_divergence(logits, target, kept).item() == pytest.approx(((t * (log_t - log_p)).sum(1) * k).sum())


def test_soft_losses_train_the_logits_alone():
    logits = make(10)[0].requires_grad_()
    source = make(11)[0].requires_grad_()
    kept = torch.ones(2, 7, 9, dtype=torch.bool)
    for loss in (soft_cross_entropy, kl_divergence):
        (gradient,) = torch.autograd.grad(loss(logits, source.softmax(1), kept), logits)
        torch.testing.assert_close(gradient, (logits.softmax(1) - source.softmax(1)).detach())
        assert not loss(logits.detach(), source.softmax(1), kept).requires_grad


def test_divergence_from_itself_is_zero():
    logits = make(12)[0]
    kept = torch.ones(2, 7, 9, dtype=torch.bool)
    assert kl_divergence(logits, logits.softmax(1), kept).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("min_kept", "loss"), [(2, 0.857399), (4, 0.556406), (7, 0.381161)])
def test_worked_ohem(min_kept, loss):
    logits, labels = two_class(TRUE)
    assert ohem_cross_entropy(logits, labels, 0.7, min_kept).item() == pytest.approx(loss, abs=5e-7)
    total, count = labeled_loss(Criterion(name="ohem", min_kept=min_kept), logits, labels, OneRank())
    assert (total / count).item() == pytest.approx(loss, abs=5e-7)
    kept = {2: [0, 1, 0, 1, 0, 0], 4: [0, 1, 1, 1, 1, 0], 7: [1] * 6}[min_kept]
    assert ohem_keep(logits, labels, 0.7, min_kept).flatten().tolist() == [bool(k) for k in kept]


@pytest.mark.parametrize("seed", range(12))
def test_ohem_equals_the_oracle(seed):
    logits, labels = make(seed)
    valid = labels.numpy() != 255
    ce = cross_entropy(logits.numpy(), labels.numpy())
    p = np.exp(-ce)
    for threshold in (0.0, 0.1, 0.7, 0.99):
        for min_kept in (0, 1, 17, int(valid.sum()), int(valid.sum()) + 1, p.size, p.size + 5):
            kept = ohem_kept(p, valid, threshold, min_kept)
            loss = (ce * kept).sum() / max(kept.sum(), 1)
            assert ohem_cross_entropy(logits, labels, threshold, min_kept).item() == pytest.approx(loss, rel=1e-12)
            by_histogram = ohem_keep(logits, labels, threshold, min_kept).numpy()
            assert (by_histogram >= kept).all()
            limit = max([threshold, *p[kept]])
            assert (p[by_histogram & ~kept] <= limit + (1 - threshold) / 2048).all()


def test_ohem_gradient_passes_through_kept_pixels_alone():
    logits, labels = two_class(TRUE)
    logits.requires_grad_()
    ohem_cross_entropy(logits, labels, 0.7, 2).backward()
    expected = torch.tensor([0.0, 0.4, 0.0, 0.7, 0.0, 0.0], dtype=torch.float64) / 2
    torch.testing.assert_close(logits.grad[0, :, 0], torch.stack((-expected, expected)))


def test_ohem_selection_does_not_depend_on_the_number_of_ranks():
    logits, labels = make(20, images=4, height=16, width=17, dtype=torch.float32)
    labels[3] = IGNORE
    labels[3, 0, :5] = 1  # shards of very different counts
    whole = ohem_keep(logits, labels, 0.3, 400)
    counts = []
    for rank in range(2):
        ohem_keep(
            logits[2 * rank :][:2], labels[2 * rank :][:2], 0.3, 400, sum_over_ranks=lambda x: counts.append(x) or x
        )
    shards = [
        ohem_keep(
            logits[2 * rank :][:2], labels[2 * rank :][:2], 0.3, 400, sum_over_ranks=lambda x: counts[0] + counts[1]
        )
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(shards), whole)
    alone = [ohem_keep(logits[2 * rank :][:2], labels[2 * rank :][:2], 0.3, 400) for rank in range(2)]
    assert not torch.equal(torch.cat(alone), whole)


def test_local_scope_keeps_its_share():
    logits, labels = two_class(TRUE)
    for min_kept_of, share in ((6, 4), (12, 2), (1, 24)):
        criterion = Criterion(name="ohem", scope="local", min_kept=4, min_kept_of=min_kept_of)
        total, count = labeled_loss(criterion, logits, labels, OneRank())
        assert (total / count).item() == pytest.approx(ohem_cross_entropy(logits, labels, 0.7, share).item())


def test_balance_by_hand():
    labels = torch.tensor([[[0, 0, 0, 0, 2, IGNORE]]])  # 4 pixels of class 0, none of 1, one of 2
    # 4 ** -0.5 = 1/2 each and 1: in sum 3 over 5 pixels
    half = class_balance(labels, 3, 0.5)
    torch.testing.assert_close(half, torch.tensor([[[5 / 6] * 4 + [5 / 3, 0.0]]]))
    # every class the same in sum: 5/2
    torch.testing.assert_close(class_balance(labels, 3, 1.0), torch.tensor([[[5 / 8] * 4 + [5 / 2, 0.0]]]))
    torch.testing.assert_close(class_balance(labels, 3, 0.0), torch.tensor([[[1.0] * 5 + [0.0]]]))


def test_balanced_criterion_is_the_weighted_mean_of_all_annotated_pixels():
    logits, labels = make(24)
    ce = torch.from_numpy(cross_entropy(logits.numpy(), labels.numpy()))
    total, count = labeled_loss(Criterion(name="balanced", power=0.7), logits, labels, OneRank())
    weight = torch.zeros_like(ce)
    for label in labels.unique():
        if label != IGNORE:
            weight[labels == label] = (labels == label).sum() ** -0.7
    weight /= weight[labels != IGNORE].mean()
    assert count.item() == (labels != IGNORE).sum()
    assert total.item() == pytest.approx((weight * ce).sum().item(), rel=1e-6)
    assert total.item() != pytest.approx(ce.sum().item(), rel=1e-3)


def test_balance_does_not_depend_on_the_number_of_ranks():
    labels = make(25, images=4)[1]
    labels[0] = 1  # shards of very different classes
    counts = []
    for rank in range(2):
        class_balance(labels[2 * rank :][:2], 5, 0.5, lambda x: counts.append(x) or x)
    shards = [class_balance(labels[2 * rank :][:2], 5, 0.5, lambda x: counts[0] + counts[1]) for rank in range(2)]
    whole = class_balance(labels, 5, 0.5)
    assert torch.equal(torch.cat(shards), whole)
    assert not torch.equal(torch.cat([class_balance(labels[2 * rank :][:2], 5, 0.5) for rank in range(2)]), whole)


def test_default_criterion_is_cross_entropy():
    logits, labels = make(21)
    assert labeled_loss(Criterion(), logits, labels, OneRank()) == pixel_cross_entropy(logits, labels)


def test_all_ignored_gives_zero():
    logits, labels = make(22)
    labels.fill_(IGNORE)
    logits.requires_grad_()
    for criterion in (
        Criterion(),
        Criterion(name="ohem"),
        Criterion(name="ohem", scope="local"),
        Criterion(name="balanced"),
    ):
        total, count = labeled_loss(criterion, logits, labels, OneRank())
        total.backward()
        assert total.item() == count.item() == 0.0
    assert ohem_cross_entropy(logits, labels).item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ohem_refuses_what_it_cannot_mean():
    logits, labels = make(23)
    with pytest.raises(ConfigError, match=r"threshold must lie in \[0, 1\); got 1.0"):
        ohem_cross_entropy(logits, labels, threshold=1.0)
    with pytest.raises(ConfigError, match="min_kept must be 0 or more pixels; got -1") as caught:
        ohem_keep(logits, labels, threshold=-0.1, min_kept=-1)
    assert len(caught.value.faults) == 2


def test_no_host_wait():
    logits = torch.empty(2, 5, 7, 9, device="meta")  # a meta tensor has nothing to read
    labels = torch.empty(2, 7, 9, device="meta", dtype=torch.int64)
    for name, scope in (("ce", "global"), ("ohem", "global"), ("ohem", "local"), ("balanced", "global")):
        total, count = labeled_loss(Criterion(name=name, scope=scope), logits, labels, OneRank())
        assert total.shape == count.shape == ()


def test_sides():
    pair = torch.tensor(3.0), torch.tensor(2.0)
    assert (supervised(pair, 0.5).side, unsupervised(pair, 0.5).side) == ("supervised", "unsupervised")
    term = unsupervised(pair, 0.25)
    assert (term.total.item(), term.normaliser.item(), term.weight) == (3.0, 2.0, 0.25)
