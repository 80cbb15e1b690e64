"""The contrastive loss against sets and loops of Python: who is an anchor, what enters which queue, who learns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from makers import PixelNet, semi_batch, step_context
from pydantic import ValidationError

from raysemi.errors import ConfigError
from raysemi.methods.pixel_contrast import Cells, ContrastConfig, PixelContrast, QueueConfig
from raysemi.ops.entropy import entropy

DIM, HEIGHT, WIDTH = 7, 3, 5
N = HEIGHT * WIDTH


def build(classes, queue=None, **settings):
    queue = {"size": 60, "first_size": 90, "max_new": 4} | (queue or {})
    return PixelContrast(ContrastConfig(**settings), QueueConfig(**queue), classes, DIM)


def scene(classes, labeled=2, unlabeled=3, seed=0):
    """Random representations and cells: a part of the labels ignored, a part of the cells without any use."""
    generator = torch.Generator().manual_seed(seed)
    images = labeled + unlabeled
    student, teacher = torch.randn(2, images, DIM, HEIGHT, WIDTH, generator=generator)
    label_BN = torch.randint(0, classes, (images, N), generator=generator)
    label_BN[:labeled, :3] = 255
    middle_BN = torch.rand(images, N, generator=generator)
    reliable_BN = (middle_BN < 0.6) & (label_BN != 255)
    probability_BKN = (2 * torch.randn(images, classes, N, generator=generator)).softmax(dim=1)
    cells = Cells(label_BN, reliable_BN, (middle_BN >= 0.6)[labeled:], probability_BKN)
    return student.requires_grad_(), teacher.requires_grad_(), cells, semi_batch(classes, labeled, unlabeled)


def run(contrast, student, teacher, cells, batch, **context):
    context = step_context(PixelNet(), **context)
    contrast.remember(teacher, cells, batch, context)
    return contrast.loss(student, teacher, cells, batch, context)


def places(probability_K):
    return sorted(range(len(probability_K)), key=lambda k: (-probability_K[k], k))


def of_class(cells, labeled, b, n, k, low, high):
    """Whether the cell's vector enters queue k, by the paper's eqs. 11-15."""
    place = places(cells.probability_BKN[b, :, n].tolist()).index(k)
    if b < labeled:
        return bool(cells.reliable_BN[b, n]) and cells.label_BN[b, n] != k and place < low
    return bool(cells.unreliable_UN[b - labeled, n]) and low <= place < high


def unit(vector):
    return vector / vector.norm()


def test_it_is_the_papers_loss():
    """One vector for all anchors of an image and one for all that enters a queue: then the draws do not matter."""
    classes, settings = 4, {"low_rank": 2, "high_rank": 3, "delta_p": 0.3, "negatives": 5, "temperature": 0.4}
    student, teacher, cells, batch = scene(classes)
    with torch.no_grad():
        student[:] = student[:, :, :1, :1]  # one vector an image
        teacher[:] = teacher[:1, :, :1, :1]  # one vector in all: positive and negatives
    total, normaliser = run(build(classes, **settings), student, teacher, cells, batch)

    means, present = [], 0
    for k in range(classes):
        members = [(b, n) for b in range(5) for n in range(N) if cells.reliable_BN[b, n] and cells.label_BN[b, n] == k]
        present += len(members) > 0
        queue = [(b, n) for b in range(5) for n in range(N) if of_class(cells, 2, b, n, k, 2, 3)]
        assert queue
        anchors = sorted({b for b, n in members if cells.probability_BKN[b, k, n] > 0.3})
        losses = []
        for b in anchors:
            near = unit(student[b, :, 0, 0]) @ unit(teacher[0, :, 0, 0]) / 0.4
            losses.append(torch.logsumexp(near.expand(6), dim=0) - near)
        means.append(torch.stack(losses).mean())
    assert present == classes
    assert normaliser.item() == present
    assert total.item() == pytest.approx(sum(means).item(), rel=1e-3)  # keys are kept in half precision
    assert total.item() == pytest.approx(classes * math.log(6), rel=1e-3)


def test_centres_are_means_over_all_reliable_pixels_of_a_class():
    """Negatives of cosine 0 with everything: the loss is then decided by the positive alone."""
    classes = 3
    student, teacher, cells, batch = scene(classes)
    contrast = build(classes, low_rank=1, delta_p=0.0, negatives=2, temperature=1.0, queries=5)
    with torch.no_grad():
        student[:] = student[:, :, :1, :1]
    contrast.queues.inserted_K.fill_(1)  # of zeros
    total, _ = contrast.loss(student, teacher, cells, batch, step_context(PixelNet()))
    expected = 0.0
    flat_BDN = teacher.detach().flatten(2)
    for k in range(classes):
        members = [(b, n) for b in range(5) for n in range(N) if cells.reliable_BN[b, n] and cells.label_BN[b, n] == k]
        centre = torch.stack([flat_BDN[b, :, n] for b, n in members]).mean(dim=0)
        near = [unit(student.detach()[b, :, 0, 0]) @ unit(centre) for b in {b for b, _ in members}]
        expected += sum(math.log(math.exp(x) + 2) - x for x in map(float, near)) / len(near)
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_queues_hold_exactly_what_is_surely_not_of_the_class():
    classes, low, high = 5, 2, 4
    student, teacher, cells, batch = scene(classes)
    contrast = build(classes, {"max_new": N}, low_rank=low, high_rank=high)
    run(contrast, student, teacher, cells, batch)
    start = 0
    for k, size in enumerate((90, 60, 60, 60, 60)):
        expected = [
            unit(teacher.detach()[b].flatten(1)[:, n])
            for b in range(5)
            for n in range(N)
            if of_class(cells, 2, b, n, k, low, high)
        ]
        count = int(contrast.queues.filled_K[k])
        assert count == len(expected) > 0
        found = contrast.queues.keys_TD[start : start + count].float()
        assert (found - torch.stack(expected)).abs().max() < 1e-3  # in the order of slots
        start += size


def test_an_image_brings_at_most_max_new_vectors():
    student, teacher, cells, batch = scene(4)
    contrast = build(4, {"max_new": 2})
    for calls in (1, 2, 3):
        run(contrast, student, teacher, cells, batch)
        assert contrast.queues.inserted_K.max() <= calls * 2 * 5
    assert contrast.queues.inserted_K.max() > 2 * 2 * 5


def test_no_queue_holds_a_pixel_of_its_class():
    """u2pl.md section 9: two classes; a labeled pixel that is confused enters, one that is right does not.

    The released rule demands that its label be the queue's own class, so that the labeled part is always empty.
    """
    label_BN = torch.tensor([[0, 0, 1, 1, 255]]).repeat(2, 1)
    right_KN = torch.tensor([[0.9, 0.2, 0.1, 0.8, 0.9], [0.1, 0.8, 0.9, 0.2, 0.1]])
    cells = Cells(label_BN, label_BN != 255, torch.zeros(0, 5, dtype=torch.bool), right_KN.repeat(2, 1, 1))
    vectors_BDhw = torch.zeros(2, DIM, 1, 5)
    vectors_BDhw[:, [0, 1, 2, 3, 4], 0, [0, 1, 2, 3, 4]] = 1.0  # cell n is basis vector n
    batch = semi_batch(2, labeled=2, unlabeled=0)
    contrast = build(2, low_rank=1)
    run(contrast, vectors_BDhw.clone(), vectors_BDhw, cells, batch)
    for k, entering in enumerate((3, 1)):  # the pixel of the other class that is taken for k
        held = contrast.queues.draw(torch.arange(0, 1, 0.01).expand(2, 100))[k]
        assert contrast.queues.filled_K[k] == 2  # one of each image
        assert held.argmax(dim=1).unique().tolist() == [entering]


@pytest.mark.parametrize("absent", [0, 1])
def test_classes_keep_to_their_own_queues_when_one_is_absent(absent):
    """u2pl.md section 9: with class 0 absent the released code compares the anchors of class 1 with queue 0."""
    _, _, cells, batch = scene(4)
    basis = torch.eye(DIM)
    cells = replace(cells, reliable_BN=cells.reliable_BN & (cells.label_BN != absent))
    contrast = build(4, delta_p=0.0, negatives=3, temperature=1.0)
    contrast.queues.inserted_K.fill_(1)
    for k, row in enumerate(contrast.queues._starts_K.tolist()):
        contrast.queues.keys_TD[row] = basis[k]  # queue k: the basis vector of class k
    label_BhwD = basis[cells.label_BN.clamp(max=6)].unflatten(1, (HEIGHT, WIDTH))
    own_BDhw = label_BhwD.permute(0, 3, 1, 2).contiguous()  # an anchor of class k is that vector, and so is its mean
    total, normaliser = contrast.loss(own_BDhw, own_BDhw, cells, batch, step_context(PixelNet()))
    assert normaliser.item() == 3
    assert total.item() == pytest.approx(3 * math.log(4), rel=1e-4)  # positive and 3 negatives: all the same vector


def test_fewer_than_two_classes_or_an_empty_queue_teach_nothing():
    student, teacher, cells, batch = scene(4)
    lonely = replace(cells, reliable_BN=cells.reliable_BN & (cells.label_BN == 2))
    total, normaliser = run(build(4), student, teacher, lonely, batch)
    assert (total.item(), normaliser.item()) == (0, 1)
    total, normaliser = build(4).loss(student, teacher, cells, batch, step_context(PixelNet()))
    assert (total.item(), normaliser.item()) == (0, 4)
    total.backward()
    assert student.grad.isfinite().all()
    nothing = replace(cells, reliable_BN=torch.zeros_like(cells.reliable_BN))
    assert run(build(4), student, teacher, nothing, batch)[0].item() == 0


def test_gradient_reaches_anchors_of_the_student_alone():
    student, teacher, cells, batch = scene(4)
    total, _ = run(build(4, queries=200, low_rank=2), student, teacher, cells, batch)
    total.backward()
    assert teacher.grad is None
    reached_BN = student.grad.abs().amax(dim=1).flatten(1) > 0
    own_BN = cells.probability_BKN.gather(1, cells.label_BN.clamp(max=3)[:, None]).squeeze(1)
    eligible_BN = cells.reliable_BN & (own_BN > 0.3)
    assert torch.equal(reached_BN, eligible_BN)  # 40 draws an image and class reach every one of at most 15


def test_another_step_draws_other_anchors():
    student, teacher, cells, batch = scene(4)
    totals = {step: run(build(4, queries=5), student, teacher, cells, batch, step=step)[0].item() for step in (3, 4)}
    assert totals[3] != totals[4]


def test_ranks_that_leave_no_class_unlikely_are_refused():
    with pytest.raises(ConfigError, match=r"low_rank must be less than the number of classes, 2; got 3\. Set it to 1"):
        build(2)
    with pytest.raises(ValidationError, match=r"low_rank must be less than high_rank, 3; got 3"):
        build(9, high_rank=3)


def test_cells_are_read_at_their_centres():
    """33 x 41 pixels and stride 4: cell (i, j) is pixel (4 i, 4 j), for labels, masks, entropies and scores."""
    generator = torch.Generator().manual_seed(0)
    label_LHW = torch.randint(0, 5, (2, 33, 41), generator=generator)
    label_LHW[:, :9] = 255
    pseudo_UHW = torch.randint(0, 5, (3, 33, 41), generator=generator)
    valid_UHW = torch.rand(3, 33, 41, generator=generator) < 0.8
    logits_BKHW = torch.randn(5, 5, 33, 41, generator=generator)
    entropy_UHW = entropy(logits_BKHW[2:])
    prediction = replace(PixelNet()(torch.zeros(5, 3, 33, 41)), logits_BKHW=logits_BKHW)
    prediction = replace(prediction, joined_BDhw=torch.zeros(5, 2, 9, 11))
    limits = torch.tensor(0.9), torch.tensor(1.2)
    cells = Cells.of(label_LHW, (pseudo_UHW, valid_UHW, entropy_UHW), limits, prediction)
    low_UHW, high_UHW = valid_UHW & (entropy_UHW <= 0.9), valid_UHW & (entropy_UHW >= 1.2)
    reliable_BHW = torch.cat((label_LHW != 255, low_UHW))
    for found, pixels in (
        (cells.label_BN, torch.cat((label_LHW, pseudo_UHW))),
        (cells.reliable_BN, reliable_BHW),
        (cells.unreliable_UN, high_UHW),
    ):
        assert torch.equal(found, pixels[:, ::4, ::4].flatten(1))
    expected = logits_BKHW[:, :, ::4, ::4].softmax(dim=1).flatten(2)
    assert torch.allclose(cells.probability_BKN, expected, atol=1e-5)
