"""Who is filed where, who is drawn, and that crops are what was seen."""

from __future__ import annotations

import torch

from raysemi.methods.base import SingleRank
from raysemi.methods.crop_cache import CropCache

CLASSES, PER_CLASS, SIDE = 4, 3, 6
BANK = torch.tensor([0.9, 0.2, 0.6, 0.4])  # from the weakest: 1, 3, 2, 0


def crops(*marks):
    """[G, 3, S, S] of one grey each, and valid pixels, the first column padding."""
    grey_G = torch.tensor(marks, dtype=torch.float32) / 255.0
    valid_GSS = torch.ones(len(marks), SIDE, SIDE, dtype=torch.bool)
    valid_GSS[:, :, 0] = False
    return grey_G[:, None, None, None].expand(-1, 3, SIDE, SIDE), valid_GSS


def shows(*classes):
    return torch.stack([torch.tensor([k in some for k in range(CLASSES)]) for some in classes])


def filled(*entries):
    cache = CropCache(CLASSES, PER_CLASS, SIDE)
    for mark, classes in entries:
        cache.insert(*crops(mark), shows(classes), BANK, SingleRank())
    return cache


def marks(cache, class_U=None, draws=60):
    """Of what is drawn for a class."""
    uniform_U = (torch.arange(draws) + 0.5) / draws
    row_U = cache.draw(None if class_U is None else torch.full((draws,), class_U), uniform_U)
    image_U3SS, valid_USS, there_U = cache.read(row_U)
    assert torch.equal(valid_USS.any(dim=1)[:, 0], torch.zeros(draws, dtype=torch.bool))
    return {round(float(image[0, 0, 0]) * 255): int((there_U).sum()) for image in image_U3SS}


def test_an_empty_cache_says_so():
    cache = CropCache(CLASSES, PER_CLASS, SIDE)
    _, _, there_U = cache.read(cache.draw(torch.tensor([0, 3]), torch.tensor([0.1, 0.9])))
    assert not there_U.any()
    cache.insert(*crops(7), shows(()), BANK, SingleRank())  # of nothing but padding
    assert cache.filled_K.sum() == 0
    assert not cache.crops_T4SS.any()
    assert not cache.presence_TK.any()


def test_a_crop_is_filed_under_its_weakest_class_and_found_by_any():
    cache = filled((10, (0, 2)), (20, (0, 1, 3)), (30, (0,)))
    assert cache.filled_K.tolist() == [1, 1, 1, 0]
    assert marks(cache, 3).keys() == {20}
    assert marks(cache, 2).keys() == {10}
    assert marks(cache, 0).keys() == {10, 20, 30}
    assert marks(cache).keys() == {10, 20, 30}
    cache = filled((10, (0, 2)), (30, (0,)))
    assert marks(cache, 1).keys() == {10, 30}  # nobody shows it: any


def test_common_crops_make_room_for_each_other_alone():
    cache = filled((5, (0, 1)), *((10 + i, (0,)) for i in range(20)))
    assert marks(cache, 0).keys() == {5, 27, 28, 29}
    assert marks(cache, 1).keys() == {5}


def test_of_more_than_fit_in_one_step_the_last_ones_stay():
    cache = CropCache(CLASSES, PER_CLASS, SIDE)
    cache.insert(*crops(*range(1, 9)), shows(*[(0,)] * 4, (2,), *[(0,)] * 3), BANK, SingleRank())
    assert marks(cache, 0).keys() == {6, 7, 8}
    assert marks(cache, 2).keys() == {5}


def test_draws_are_uniform():
    cache = filled((10, (1,)), (20, (1, 2)), (30, (0, 1)), (40, (2,)))
    row_U = cache.draw(torch.ones(999, dtype=torch.int64), torch.arange(999) / 999)
    _, counts = row_U.unique(return_counts=True)
    assert counts.tolist() == [333, 333, 333]


def test_what_the_teacher_sees_now_counts():
    cache = filled((10, (0, 2)), (20, (1,)))
    row_U = cache.draw(torch.tensor([0, 0]), torch.tensor([0.2, 0.8]))
    before = cache.presence_TK.clone()
    cache.renew(row_U, shows((0,), (0, 3)), SingleRank())  # both drew the same crop
    assert marks(cache, 2).keys() == {10, 20}  # nobody shows it any more: any
    assert marks(cache, 3).keys() == {10}
    assert (cache.presence_TK != before).any(dim=1).sum() == 1
    cache.renew(torch.full((2,), len(cache.rows_TX) - 1), shows((1,), (2,)), SingleRank())  # there was no crop
    assert not cache.presence_TK[-1].any()


def test_every_byte_comes_back():
    cache = CropCache(CLASSES, PER_CLASS, 16)
    bytes_13SS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    valid_1SS = torch.rand(1, 16, 16) < 0.5
    cache.insert(bytes_13SS.float() / 255.0, valid_1SS, shows((3,)), BANK, SingleRank())
    image_U3SS, found_USS, there_U = cache.read(cache.draw(None, torch.zeros(1)))
    assert torch.equal(image_U3SS, bytes_13SS.float() / 255.0)
    assert torch.equal(found_USS, valid_1SS)
    assert there_U.all()
