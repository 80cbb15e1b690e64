"""First in, first out, against lists of Python."""

from __future__ import annotations

import pytest
import torch

from raysemi.methods.queues import ClassQueues


def vectors(count, dim=4, start=0):
    """Row i holds i + start in every channel: told apart in half precision up to 2,048."""
    return (torch.arange(count) + start)[:, None].expand(count, dim).half()


def held(queues, k):
    """First channel of everything that class k may draw, as a set."""
    rows = queues.draw(torch.arange(0, 1, 1 / 512).expand(len(queues.filled_K), 512))[k]
    return {int(row[0]) for row in rows}


def test_the_first_is_gone_after_one_more_than_fit():
    """u2pl.md section 9: 30,001 vectors into a queue of 30,000."""
    queues = ClassQueues([30_000], dim=2)
    marks = torch.zeros(1, 1, 30_001, 2, dtype=torch.float16)
    marks[0, 0, 0], marks[0, 0, -1] = 1.0, 2.0
    queues.insert(marks[:, :, :20_000], torch.tensor([[20_000]]))
    assert (queues.keys_TD == 1).any()
    queues.insert(marks[:, :, 20_000:-1], torch.tensor([[10_000]]))
    assert (queues.keys_TD == 1).any()
    queues.insert(marks[:, :, -1:], torch.tensor([[1]]))
    assert not (queues.keys_TD == 1).any()
    assert (queues.keys_TD == 2).any()
    assert queues.filled_K.item() == 30_000


def test_they_are_lists_of_the_newest():
    """Random numbers of vectors, also more than a queue holds, in the order of slots."""
    sizes, generator = [5, 13, 8], torch.Generator().manual_seed(0)
    queues, expected, number = ClassQueues(sizes, dim=4), [[], [], []], 1
    for _ in range(30):
        keys_GKmD = torch.zeros(2, 3, 6, 4, dtype=torch.float16)
        counts_GK = torch.randint(0, 7, (2, 3), generator=generator)
        keys_GKmD[:] = -1.0  # what does not count must not be kept
        for g in range(2):
            for k in range(3):
                count = int(counts_GK[g, k])
                keys_GKmD[g, k, :count] = vectors(count, start=number)
                expected[k] = [*expected[k], *range(number, number + count)][-sizes[k] :]
                number += count
        queues.insert(keys_GKmD, counts_GK)
        assert queues.filled_K.tolist() == [len(queue) for queue in expected]
        for k in range(3):
            if expected[k]:
                assert held(queues, k) == set(expected[k])


def test_an_empty_queue_gives_numbers_and_stays_empty():
    queues = ClassQueues([3, 4], dim=5)
    queues.insert(torch.full((1, 2, 6, 5), torch.nan, dtype=torch.float16), torch.tensor([[0, 0]]))
    assert queues.filled_K.tolist() == [0, 0]
    drawn = queues.draw(torch.rand(3, 2, 7))
    assert drawn.shape == (3, 2, 7, 5)
    assert drawn.dtype == torch.float32
    assert drawn.isfinite().all()


def test_a_checkpoint_carries_them():
    queues, other = ClassQueues([3, 4], dim=4), ClassQueues([3, 4], dim=4)
    queues.insert(vectors(10).view(1, 2, 5, 4), torch.tensor([[5, 2]]))
    assert set(queues.state_dict()) == {"keys_TD", "inserted_K"}
    other.load_state_dict(queues.state_dict())
    assert held(other, 0) == held(queues, 0) == {2, 3, 4}
    assert held(other, 1) == {5, 6}


@pytest.mark.parametrize("finite", [True, False])
def test_what_was_inserted_since_the_beginning_is_taken_back(finite):
    """Twice in one step, in part into the same rows; also more than fits."""
    queues = ClassQueues([3, 4], dim=4)
    queues.insert(vectors(10).view(1, 2, 5, 4), torch.tensor([[5, 2]]))
    before, held_before = queues.keys_TD.clone(), [held(queues, k) for k in (0, 1)]
    queues.begin()
    queues.insert(vectors(12, start=20).view(2, 2, 3, 4), torch.tensor([[2, 3], [1, 0]]))
    queues.insert(vectors(12, start=50).view(1, 2, 6, 4), torch.tensor([[6, 1]]))
    written = queues.keys_TD.clone()
    queues.restore(torch.tensor(finite))
    assert torch.equal(queues.keys_TD, written if finite else before)
    assert held_before == [{2, 3, 4}, {5, 6}]
    queues.insert(vectors(2, start=90).view(1, 2, 1, 4), torch.tensor([[1, 1]]))
    after = queues.keys_TD.clone()
    queues.restore(torch.tensor(False))  # nothing is noted outside of a step
    assert torch.equal(queues.keys_TD, after)
