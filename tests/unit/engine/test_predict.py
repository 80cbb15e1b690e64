"""Label maps and overlays at the image's own size; what cannot be read is named when the rest is done."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.sources import open_source
from raysemi.engine.evaluate import EvalConfig, image_tensor, inference, predict_labels
from raysemi.engine.predict import label_png, overlay, predict_folder, predict_pool
from raysemi.errors import ConfigError, DataError
from raysemi.models.segmentor import ModelConfig, Segmentor, build_segmentor

CPU = torch.device("cpu")
PALETTE = ((10, 0, 200), (0, 130, 0), (250, 250, 0), (77, 77, 77))
SIZES = {"a": (40, 56), "b": (40, 56), "deep/down/c": (33, 49), "deep/d": (33, 49)}


@pytest.fixture(scope="module")
def network() -> Segmentor:
    return build_segmentor(ModelConfig(weights="random", channels=8, low_channels=4), len(PALETTE), None, 0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for i, (name, (height, width)) in enumerate(SIZES.items()):
        path = tmp_path / "in" / f"{name}.{('png', 'JPG', 'webp', 'jpeg')[i]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def outputs(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def test_every_image_gets_its_label_map_and_overlay(network: Segmentor, images: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "out", []
    network.train()
    count = predict_folder(
        network, images, out, PALETTE, EvalConfig(), device=CPU, progress=lambda done, total: told.append((done, total))
    )
    assert count == 4
    assert outputs(out) == {f"{kind}/{name}.png" for kind in ("labels", "overlays") for name in SIZES}
    assert told[-1] == (4, 4)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert network.training
    for file in images.rglob("*"):
        name = file.relative_to(images).with_suffix("").as_posix()
        if name not in SIZES:
            continue
        picture = np.asarray(Image.open(file).convert("RGB"))
        with inference(network, CPU):
            expected = predict_labels(network, image_tensor([picture], CPU), EvalConfig())[0].numpy()
        with Image.open(out / "labels" / f"{name}.png") as label:
            assert label.mode == "P"
            assert label.size == SIZES[name][::-1]
            written = np.asarray(label)
            assert label.getpalette()[:12] == [value for colour in PALETTE for value in colour]
        assert (written == expected).mean() > 0.999  # a batch of two may round a tie otherwise
        with Image.open(out / "overlays" / f"{name}.png") as seen:
            assert seen.mode == "RGB"
            assert np.array_equal(np.asarray(seen), overlay(picture, written, PALETTE))


def test_overlay_is_half_image_half_colour() -> None:
    image = np.array([[[100, 0, 255], [1, 2, 3]]], dtype=np.uint8)
    mixed = overlay(image, np.array([[1, 2]], dtype=np.uint8), PALETTE)
    assert mixed.tolist() == [[[50, 65, 128], [126, 126, 2]]]


def test_label_png_keeps_every_index(tmp_path: Path) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    label_png(labels, PALETTE).save(tmp_path / "l.png")
    with Image.open(tmp_path / "l.png") as image:
        assert np.array_equal(np.asarray(image), labels)
        assert image.convert("RGB").getpixel((31, 7)) == (255, 255, 255)


def test_unreadable_images_are_named_and_the_others_are_done(network: Segmentor, images: Path, tmp_path: Path) -> None:
    good = (images / "a.png").read_bytes()
    (images / "cut.png").write_bytes(good[: len(good) // 2])
    (images / "text.jpg").write_text("not an image")
    Image.fromarray(np.zeros((9, 12), dtype=np.uint16)).save(images / "wide.png")
    rotated = Image.fromarray(np.zeros((9, 12, 3), dtype=np.uint8))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(images / "turned.jpg", exif=exif)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="got 4 that are not, the other 4 are in") as caught:
        predict_folder(network, images, out, PALETTE, EvalConfig(batch=2), device=CPU)
    for name in ("cut.png", "text.jpg", "wide.png must have 8 bits", "turned.jpg must not be rotated"):
        assert name in str(caught.value)
    assert outputs(out) == {f"{kind}/{name}.png" for kind in ("labels", "overlays") for name in SIZES}


def test_a_second_run_replaces_and_keeps_other_files(network: Segmentor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "labels").mkdir(parents=True)
    (out / "labels" / "a.png").write_text("old")
    (out / "labels" / "mine.txt").write_text("mine")
    predict_folder(network, images, out, PALETTE, EvalConfig(mode="sliding_window", window=32), device=CPU)
    with Image.open(out / "labels" / "a.png") as label:
        assert label.size == (56, 40)
    assert (out / "labels" / "mine.txt").read_text() == "mine"


def test_a_full_disk_leaves_no_half_file(
    network: Segmentor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save = Image.Image.save

    def fails_late(self: Image.Image, path: Path, *args: object) -> None:
        save(self, path, *args)
        if "c.png" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails_late)
    with pytest.raises(DataError, match="must have room; got none left"):
        predict_folder(network, images, out, PALETTE, EvalConfig(batch=1), device=CPU)
    assert outputs(out) == {f"{kind}/{name}.png" for kind in ("labels", "overlays") for name in ("a", "b", "deep/d")}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ("same name", DataError, r"must differ in more than the suffix; got .*a\.jpg and .*a\.png"),
        ("empty", DataError, "must hold images"),
        ("missing", DataError, "the folder of images must exist"),
        ("inside", ConfigError, "must lie outside the folder of images"),
        ("center", ConfigError, r"eval\.mode must be original or sliding_window to predict; got center_crop"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    network: Segmentor, images: Path, tmp_path: Path, change: str, error: type[Exception], text: str
) -> None:
    out, config = tmp_path / "out", EvalConfig()
    if change == "same name":
        shutil.copy(images / "b.JPG", images / "a.jpg")
    elif change == "empty":
        images = tmp_path / "nothing"
        images.mkdir()
    elif change == "missing":
        images = tmp_path / "nowhere"
    elif change == "inside":
        out = images / "out"
    else:
        config = EvalConfig(mode="center_crop", window=16)
    with pytest.raises(error, match=text):
        predict_folder(network, images, out, PALETTE, config, device=CPU)
    assert not out.exists()


def make_pool(root: Path) -> Pool:
    rng = np.random.default_rng(2)
    for part in ("images", "labels"):
        (root / part / "val" / "city").mkdir(parents=True)
    (root / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    for key in ("city/x", "y"):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3)).astype(np.uint8)).save(root / f"images/val/{key}.jpg")
        Image.fromarray(np.zeros((40, 56), dtype=np.uint8)).save(root / f"labels/val/{key}.png")
    return pack(open_source("folder", root), root / "pools", pools=("val",), processes=1)["val"]


def test_a_pool_is_predicted_by_key(network: Segmentor, tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "source")
    assert predict_pool(network, pool, tmp_path / "out", PALETTE, EvalConfig(), device=CPU) == 2
    assert outputs(tmp_path / "out") == {
        f"{kind}/{key}.png" for kind in ("labels", "overlays") for key in ("city/x", "y")
    }
    with Image.open(tmp_path / "out" / "labels" / "y.png") as label:  # the caller's colours, not the pool's
        assert label.getpalette()[:12] == [value for colour in PALETTE for value in colour]


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a/../../x", "a//x", "..\\x"])
def test_keys_of_foreign_pools_cannot_leave_the_output(
    network: Segmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    pool = make_pool(tmp_path / "source")
    monkeypatch.setattr(Pool, "key", lambda self, i: key)
    with pytest.raises(DataError, match="keys must be paths below a folder; got"):
        predict_pool(network, pool, tmp_path / "out" / "deep", PALETTE, EvalConfig(), device=CPU)
    assert not (tmp_path / "out").exists()
