"""Windows of the published protocols, prediction in windows, and a confusion matrix that ranks do not change."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.sources import open_source
from raysemi.engine.evaluate import (
    EvalConfig,
    evaluate,
    image_tensor,
    inference,
    predict_labels,
    predict_probabilities,
    read_ahead,
    same_size_batches,
    windows,
)
from raysemi.errors import DataError
from raysemi.methods.base import SingleRank
from raysemi.models.decoders import Decoded, DeepLabV3Plus, Keep
from raysemi.models.encoders import Encoder, Features
from raysemi.models.segmentor import ModelConfig, Segmentor, build_segmentor

CPU = torch.device("cpu")
CLASSES = 3
SIZES = [(40, 56), (33, 48), (40, 56), (33, 48), (40, 56), (64, 50), (40, 56)]


class Parity(nn.Module):
    """Encoder and decoder whose logits are one-hot in what the red channel says: 0, 127 or 255 of 255."""

    def forward(self, maps: tuple[Tensor, ...], keep: Keep | None = None) -> Decoded:
        low_B3hw = maps[0]
        logits_BKhw = functional.one_hot((low_B3hw[:, 0] * 2).round().long(), CLASSES).movedim(-1, 1) * 9.0
        return Decoded(logits_BKhw, low_B3hw, low_B3hw, None)


class Eyes(Encoder):
    """Gives the image itself as both maps, at stride 1."""

    def __init__(self, multiple: int = 1) -> None:
        super().__init__(nn.BatchNorm2d(3), (3, 3), 3, ((0.0,) * 3, (1.0,) * 3), multiple=multiple)
        self.sizes: list[tuple[int, ...]] = []

    def classifier_shapes(self) -> dict[str, torch.Size]:
        return {}

    def forward(self, images_B3HW: Tensor) -> Features:
        self.sizes.append(tuple(images_B3HW.shape))
        return Features((images_B3HW, images_B3HW))


def parity(multiple: int = 1) -> Segmentor:
    return Segmentor(Eyes(multiple), Parity(), {}, CLASSES, frozen=False)


def network() -> Segmentor:
    return build_segmentor(ModelConfig(weights="random", channels=8, low_channels=4), CLASSES, None, 0)


class ThreadRanks:
    """Ranks as threads of this process: the sum waits for all of them, as a process group's does."""

    def __init__(self, world: int) -> None:
        self.values: list[Tensor] = [torch.zeros(())] * world
        self.barrier = threading.Barrier(world, timeout=60)


class OneOf:
    def __init__(self, ranks: ThreadRanks, rank: int) -> None:
        self.ranks, self.rank, self.world, self.sums = ranks, rank, len(ranks.values), 0

    def sum(self, value: Tensor) -> Tensor:
        self.sums += 1
        self.ranks.values[self.rank] = value
        self.ranks.barrier.wait()
        return torch.stack(self.ranks.values).sum(dim=0)

    def max(self, value: Tensor) -> Tensor:
        raise AssertionError("evaluation needs no maximum")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for part in ("images/val", "labels/val"):
        (root / part).mkdir(parents=True)
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    for i, (height, width) in enumerate(SIZES):
        label = rng.integers(0, CLASSES, (height, width)).astype(np.uint8)
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        image[..., 0] = np.array([0, 127, 255])[label]
        image[:5, :, 0] = 0  # the upper rows all look like class 0
        label[:, :7] = 255
        Image.fromarray(image).save(root / f"images/val/{i}.png")
        Image.fromarray(label).save(root / f"labels/val/{i}.png")
    return pack(open_source("folder", root), root / "pools", pools=("val",), processes=1)["val"]


@pytest.mark.parametrize(
    ("window", "stride", "shifted", "rows", "columns"),
    [
        (801, 534, False, [0, 534], [0, 534, 1068, 1602]),
        (800, 533, False, [0, 533], [0, 533, 1066, 1599]),
        (798, 532, True, [0, 226], [0, 532, 1064, 1250]),
        (769, 513, True, [0, 255], [0, 513, 1026, 1279]),
    ],
)
def test_windows_of_the_published_protocols(
    window: int, stride: int, shifted: bool, rows: list[int], columns: list[int]
) -> None:
    found = windows(1024, 2048, window, stride, shifted)
    assert [(w.top, w.left) for w in found] == [(row, column) for row in rows for column in columns]
    assert all(w.bottom == min(w.top + window, 1024) and w.right == min(w.left + window, 2048) for w in found)
    if shifted:
        assert {(w.bottom - w.top, w.right - w.left) for w in found} == {(window, window)}
    elif window == 801:
        assert found[-1] == (534, 1024, 1602, 2048)  # 490 x 446


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_cover_every_pixel_and_small_images_need_one(shifted: bool) -> None:
    for height, width in [(5, 9), (8, 8), (9, 21), (17, 40)]:
        seen = np.zeros((height, width), dtype=int)
        for w in windows(height, width, 8, 5, shifted):
            seen[w.top : w.bottom, w.left : w.right] += 1
        assert seen.min() >= 1
    assert windows(600, 700, 801, 534, shifted) == [(0, 600, 0, 700)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_sliding_windows_put_every_pixel_in_its_place(shifted: bool, batch: int) -> None:
    columns = torch.arange(53) % 2
    images = (columns / 2.0).expand(2, 3, 31, 53).clone()
    images[1] = 1.0  # the second image is all class 2
    config = EvalConfig(mode="sliding_window", window=16, shifted=shifted, batch=batch)
    net = parity()
    with inference(net, CPU):
        labels = predict_labels(net, images, config)
        probabilities = predict_probabilities(net, images, config)
    assert torch.equal(labels[0].long(), columns.expand(31, 53))
    assert torch.equal(labels[1].long(), torch.full((31, 53), 2))
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2, 31, 53))
    torch.testing.assert_close(probabilities.argmax(dim=1), labels.long())
    sizes = net.encoder.sizes
    assert max(size[0] for size in sizes) == batch
    assert len(sizes) < 2 * 2 * len(windows(31, 53, 16, 10, shifted)) or batch == 1


def test_windows_are_averaged_as_probabilities() -> None:
    net = network().eval()
    images = torch.rand(1, 3, 32, 50)
    config = EvalConfig(mode="sliding_window", window=32, stride=18)
    with inference(net, CPU):
        found = predict_probabilities(net, images, config)
        left, right = (net(images[..., a : a + 32]).logits_BKHW.softmax(dim=1) for a in (0, 18))
    torch.testing.assert_close(found[..., :18], left[..., :18])
    torch.testing.assert_close(found[..., 18:32], (left[..., 18:] + right[..., :14]) / 2)
    torch.testing.assert_close(found[..., 32:], right[..., 14:])


def test_default_stride_is_two_thirds_rounded_down() -> None:
    net = parity()
    with inference(net, CPU):
        predict_labels(net, torch.zeros(1, 3, 20, 41), EvalConfig(mode="sliding_window", window=20, batch=9))
    assert net.encoder.sizes == [(2, 3, 20, 20), (1, 3, 20, 15)]  # starts 0, 13, 26


@pytest.mark.parametrize(("shifted", "last"), [(None, 28), (True, 28), (False, 14)])
def test_windows_of_a_transformer_are_shifted_back_unless_told_otherwise(shifted: bool | None, last: int) -> None:
    net = parity(multiple=14)
    images = torch.ones(1, 3, 28, 55)
    config = EvalConfig(mode="sliding_window", window=28, stride=20, shifted=shifted)
    with inference(net, CPU):
        assert torch.equal(predict_labels(net, images, config), torch.full((1, 28, 55), 2, dtype=torch.uint8))
    assert {size[3] for size in net.encoder.sizes} == {28, last}  # cut off, the last one has 15 columns


def test_a_transformer_sees_the_nearest_multiple_of_a_patch_and_answers_at_the_own_size() -> None:
    net = parity(multiple=14)
    images = torch.arange(33).div(64).expand(1, 3, 19, 33).clone()  # 0 below column 16, then 1
    with inference(net, CPU):
        labels = predict_labels(net, images, EvalConfig())
    assert net.encoder.sizes == [(1, 3, 14, 28)]
    assert labels.shape == (1, 19, 33)
    assert torch.equal(labels[0, :, :15], torch.zeros(19, 15, dtype=torch.uint8))
    assert torch.equal(labels[0, :, 18:], torch.ones(19, 15, dtype=torch.uint8))


def test_whole_images_of_odd_size() -> None:
    net = network()
    images = torch.rand(2, 3, 97, 131)
    with inference(net, CPU):
        logits = net(images).logits_BKHW
        assert torch.equal(predict_labels(net, images, EvalConfig()).long(), logits.argmax(dim=1))
        torch.testing.assert_close(predict_probabilities(net, images, EvalConfig()), logits.softmax(dim=1))


def test_center_crop_pads_and_crops_around_the_middle() -> None:
    net = parity()
    images = torch.zeros(1, 3, 12, 31)
    images[:, :, 4:8] = 1.0
    config = EvalConfig(mode="center_crop", window=20)
    with inference(net, CPU):
        labels = predict_labels(net, images, config)[0]
        probabilities = predict_probabilities(net, images, config)[0]
    assert net.encoder.sizes[0] == (1, 3, 20, 20)
    assert torch.equal(labels[:, 5:25], (images[0, 0, :, 5:25] * 2).to(torch.uint8))
    assert bool((labels[:, :5] == 255).all())
    assert bool((labels[:, 25:] == 255).all())
    assert float(probabilities[:, :, :5].sum()) == 0.0


def test_inference_restores_every_mode_also_after_an_error() -> None:
    net = network()
    net.decoder.reduce.eval()
    before = [module.training for module in net.modules()]
    with inference(net, CPU, torch.bfloat16):
        assert not any(module.training for module in net.modules())
        assert not torch.is_grad_enabled()
        assert net(torch.rand(1, 3, 32, 40)).logits_BKHW.dtype == torch.bfloat16
    assert [module.training for module in net.modules()] == before
    with pytest.raises(RuntimeError), inference(net, CPU):
        net(torch.rand(1, 4, 32, 40))  # four channels
    assert [module.training for module in net.modules()] == before
    assert torch.is_grad_enabled()


def test_images_become_floats_channels_last() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    tensor = image_tensor(list(images), CPU)
    assert tensor.shape == (2, 3, 4, 5)
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(tensor[1, 2, 3, 4], torch.tensor(119 / 255))


def expected(pool: Pool, root: Path, config: EvalConfig) -> np.ndarray:
    """The matrix counted by hand from the files, for the network that reads the red channel."""
    matrix = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for i, (height, width) in enumerate(SIZES):
        red = np.asarray(Image.open(root / f"images/val/{i}.png"))[..., 0]
        label = np.asarray(Image.open(root / f"labels/val/{i}.png"))
        predicted = np.select([red == 0, red == 127, red == 255], [0, 1, 2])
        scored = label != 255
        if config.mode == "center_crop":
            side = config.window or 0
            inside = np.zeros_like(scored)
            top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
            inside[top : top + side, left : left + side] = True
            scored &= inside
        np.add.at(matrix, (label[scored], predicted[scored]), 1)
    return matrix


@pytest.mark.parametrize(
    "config",
    [
        EvalConfig(batch=3),
        EvalConfig(mode="sliding_window", window=16, batch=5),
        EvalConfig(mode="center_crop", window=36, batch=2),
    ],
)
def test_matrix_counts_every_pixel_once(pool: Pool, config: EvalConfig) -> None:
    net = parity().train()
    told: list[tuple[int, int]] = []
    matrix = evaluate(net, pool, config, SingleRank(), CPU, progress=lambda done, total: told.append((done, total)))
    assert np.array_equal(matrix.numpy(), expected(pool, Path(pool.path).parents[1], config))
    assert matrix.dtype == torch.int64
    assert told[-1] == (len(SIZES), len(SIZES))
    assert net.training


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_change_no_bit_and_sum_once(pool: Pool, world: int) -> None:
    net, config = network(), EvalConfig(batch=2)
    alone = evaluate(net, pool, config, SingleRank(), CPU)
    ranks = ThreadRanks(world)
    members = [OneOf(ranks, rank) for rank in range(world)]
    results: dict[int, Tensor] = {}

    def work(member: OneOf) -> None:
        results[member.rank] = evaluate(copy.deepcopy(net), pool, config, member, CPU)

    threads = [threading.Thread(target=work, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == world
    assert all(torch.equal(matrix, alone) for matrix in results.values())
    assert [member.sums for member in members] == [1] * world
    own = [value[:-1].sum() for value in ranks.values]
    assert all(0 < part < alone.sum() for part in own)


def test_batches_hold_one_size_and_every_row_once(pool: Pool) -> None:
    batches = same_size_batches(pool, 2)
    assert sorted(row for batch in batches for row in batch) == list(range(len(SIZES)))
    for batch in batches:
        assert len(batch) <= 2
        assert len({(pool.row(row).height, pool.row(row).width) for row in batch}) == 1
    assert sum(len(batch) == 2 for batch in batches) == 3


class LastOfMany(SingleRank):
    rank, world = 49, 50


def test_a_rank_without_a_batch_adds_nothing(pool: Pool) -> None:
    assert int(evaluate(parity(), pool, EvalConfig(batch=4), LastOfMany(), CPU).sum()) == 0


def test_a_rank_that_cannot_read_fails_all_ranks(pool: Pool, tmp_path: Path) -> None:
    broken_path = tmp_path / "val"
    shutil.copytree(pool.path, broken_path)
    row = pool.row(4)
    shard = broken_path / row.shard
    content = bytearray(shard.read_bytes())
    content[row.image_offset : row.image_offset + row.image_bytes] = bytes(row.image_bytes)
    shard.write_bytes(content)
    broken = Pool.open(broken_path)
    with pytest.raises(DataError, match=rf"{row.shard}.*key {row.key}"):
        evaluate(parity(), broken, EvalConfig(), SingleRank(), CPU)

    ranks, errors = ThreadRanks(2), {}

    def work(rank: int) -> None:
        try:
            evaluate(parity(), broken, EvalConfig(batch=1), OneOf(ranks, rank), CPU)
        except DataError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert any(row.key in text for text in errors.values())
    assert any("must be readable on every rank; got 1 of 2 that failed" in text for text in errors.values())


def test_pools_that_cannot_be_scored_are_refused(pool: Pool) -> None:
    other = Segmentor(Eyes(), DeepLabV3Plus(3, 3, 4, 8, 4, (1, 2, 3)), {}, 4, frozen=False)
    with pytest.raises(DataError, match="must have the 4 classes of the network; got 3"):
        evaluate(other, pool, EvalConfig(), SingleRank(), CPU)


def test_settings_that_miss_pixels_are_refused() -> None:
    with pytest.raises(ValidationError, match="window must be given for mode sliding_window"):
        EvalConfig(mode="sliding_window")
    with pytest.raises(ValidationError, match=r"stride must be at most the window \(16\)"):
        EvalConfig(mode="sliding_window", window=16, stride=17)


def test_reading_ahead_keeps_the_order_and_hands_errors_on() -> None:
    def read(i: int) -> int:
        if i == 5:
            raise DataError("five")
        return 10 * i

    assert list(read_ahead(read, range(5))) == [0, 10, 20, 30, 40]
    values = read_ahead(read, range(9))
    assert [next(values) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(DataError, match="five"):
        next(values)
