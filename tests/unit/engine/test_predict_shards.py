"""Shards of predictions: the same images, label maps and confidences that the network's own softmax gives."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import tiny_segmentor
from PIL import Image

from raysemi.data.index import index_shards
from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.shard import ShardPlan, read_part
from raysemi.data.sources import open_source
from raysemi.engine.evaluate import EvalConfig, image_tensor, inference, predict_confident, predict_labels
from raysemi.engine.predict_shards import ShardPredictor
from raysemi.errors import DataFailure
from raysemi.models.segmentor import Segmentor

CPU = torch.device("cpu")
CLASSES = ("sky", "road", "car", "tree")
SUFFIXES = ("jpg", "png", "webp")
SLIDING = EvalConfig(mode="sliding_window", window=24, stride=16, batch=3)


@pytest.fixture(scope="module")
def network() -> Segmentor:
    return tiny_segmentor(len(CLASSES), seed=3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Nine images in folders, of two sizes that take turns and three kinds of file, without classes."""
    root, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(1)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for i in range(9):
        path = root / f"images/train/city/{i % 2}/{i}.{SUFFIXES[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (33, 49) if i % 4 else (40, 56)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    source = open_source("folder", root)
    return pack(source, root / "pools", pools=("unlabeled",), processes=1, shard_samples=5)["unlabeled"]


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def values(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert image.mode == "L"
        return np.asarray(image)


def by_hand(network: Segmentor, picture: np.ndarray) -> np.ndarray:
    """Probabilities [K, H, W] of one image, by numpy."""
    with torch.no_grad():
        logits = network.eval()(torch.tensor(picture).permute(2, 0, 1)[None] / 255).logits_BKHW
    raised = np.exp(logits[0].double().numpy())
    return raised / raised.sum(axis=0)


@pytest.mark.parametrize("min_confidence", [0.0, 0.4, 1.0])
def test_a_shard_holds_images_labels_and_confidences_of_the_same_keys(
    network: Segmentor, pool: Pool, tmp_path: Path, min_confidence: float
) -> None:
    predictor = ShardPredictor(network, pool, CLASSES, EvalConfig(batch=2), min_confidence=min_confidence, device=CPU)
    reader, row, ignored = Reader(pool), 0, 0
    for number, shard in enumerate(pool.shard_files):
        plan = ShardPlan(tmp_path / f"predicted-{number:06d}.tar", (), f"plan/{number}")
        plan.part.parent.mkdir(exist_ok=True)
        done = predictor.write(number, plan.path, plan.fingerprint)
        assert (done.samples, done.faults) == (shard.samples, ())
        content, rows = members(plan.path), read_part(plan)[1]
        assert [one["key"] for one in rows] == [pool.key(row + i) for i in range(shard.samples)]
        for one in rows:
            key, picture = one["key"], reader.image(row)
            suffix = SUFFIXES[int(key[-1]) % 3]
            assert content.pop(f"{key}.{suffix}") == reader.encoded(row)
            label, confidence = (values(content.pop(f"{key}.{name}.png")) for name in ("mask", "confidence"))
            assert label.shape == confidence.shape == picture.shape[:2]
            probability = by_hand(network, picture)
            kept = label != 255
            ignored += int((~kept).sum())
            assert kept[probability.max(axis=0) >= min_confidence + 1e-5].all()
            assert not kept[probability.max(axis=0) < min_confidence - 1e-5].any()
            chosen = np.take_along_axis(probability, np.minimum(label, 3)[None].astype(int), axis=0)[0]
            assert np.abs(chosen - probability.max(axis=0))[kept].max(initial=0) < 1e-5
            assert np.abs(confidence - 255 * probability.max(axis=0)).max() <= 0.5 + 1e-3
            assert one["class_pixels"] == [int((label == index).sum()) for index in range(4)]
            row += 1
        assert content == {}
    assert row == pool.num_samples
    assert (ignored > 0) == (min_confidence > 0)


@pytest.mark.parametrize("config", [EvalConfig(), SLIDING], ids=["original", "sliding_window"])
def test_confidences_belong_to_the_labels_of_predict_labels(network: Segmentor, pool: Pool, config: EvalConfig) -> None:
    images_B3HW = image_tensor([Reader(pool).image(row) for row in (5, 6)], CPU)
    with inference(network, CPU):
        label_BHW, confidence_BHW = predict_confident(network, images_B3HW, config)
        assert torch.equal(label_BHW, predict_labels(network, images_B3HW, config))
    if config.mode == "original":
        return
    total, seen = np.zeros((4, 33, 49)), np.zeros((33, 49))
    picture = Reader(pool).image(5)
    for top in (0, 16):
        for left in (0, 16, 32):
            part = np.s_[top : top + 24, left : left + 24]
            total[(slice(None), *part)] += by_hand(network, picture[part])
            seen[part] += 1
    assert np.abs(confidence_BHW[0].numpy() - (total / seen).max(axis=0)).max() < 1e-5


def test_the_bytes_do_not_depend_on_which_shard_came_before(network: Segmentor, pool: Pool, tmp_path: Path) -> None:
    written = []
    for numbers in ((0, 1), (1, 0)):
        folder = tmp_path / str(numbers[0])
        (folder / ".parts").mkdir(parents=True)
        predictor = ShardPredictor(network, pool, CLASSES, SLIDING, min_confidence=0.0, device=CPU)
        for number in numbers:
            predictor.write(number, folder / f"{number}.tar", "plan")
        written.append([(folder / f"{number}.tar").read_bytes() for number in (0, 1)])
    assert written[0] == written[1]


def test_shards_of_predictions_can_be_indexed_like_any_others(network: Segmentor, pool: Pool, tmp_path: Path) -> None:
    (tmp_path / ".parts").mkdir()
    predictor = ShardPredictor(network, pool, CLASSES, EvalConfig(), min_confidence=0.0, device=CPU)
    predictor.write(1, tmp_path / "a.tar", "plan")
    indexed = index_shards(tmp_path, classes=CLASSES, processes=1)
    assert [indexed.key(row) for row in range(4)] == [pool.key(row) for row in range(5, 9)]
    assert indexed.labeled


def test_a_store_that_does_not_answer_is_no_corrupt_image(
    network: Segmentor, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".parts").mkdir()
    predictor = ShardPredictor(network, pool, CLASSES, EvalConfig(), min_confidence=0.0, device=CPU)
    encoded = Reader.encoded

    def gone(self: Reader, row: int) -> bytes:
        if row == 3:
            raise DataFailure("shard must be readable; got no answer")
        return encoded(self, row)

    monkeypatch.setattr(Reader, "encoded", gone)
    with pytest.raises(DataFailure, match="no answer"):
        predictor.write(0, tmp_path / "a.tar", "plan")
    assert [path.name for path in tmp_path.iterdir()] == [".parts"]
