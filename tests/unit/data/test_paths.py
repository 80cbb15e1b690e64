"""Packing from and into a real S3 server on loopback."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from object_store import CREDENTIALS, client, upload
from PIL import Image
from pyarrow import fs

from raysemi.data.pack import pack
from raysemi.data.paths import as_path, below
from raysemi.data.shard import ShardPlan, finish_pool
from raysemi.data.sources import open_source
from raysemi.data.store import StoreConfig
from raysemi.errors import DataError, DataFailure


def put_image(path: Path, seed: int, mask: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    values = rng.choice([0, 1, 2, 255], (5, 7)) if mask else rng.integers(0, 256, (5, 7, 3))
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of the plain layout, 11 images to train with and 3 to validate."""
    root = tmp_path / "source"
    for number in range(14):
        part, key = ("train", f"{'ab'[number % 2]}/{number:02d}") if number < 11 else ("val", f"v{number}")
        put_image(root / f"images/{part}/{key}.{('png', 'jpg', 'webp')[number % 3]}", number)
        put_image(root / f"labels/{part}/{key}.png", number, mask=True)
    (root / "classes.txt").write_text("sky\ntree\nroad\n")
    (root / "splits").mkdir()
    (root / "splits/few.txt").write_text("a/00\nb/03\na/08\nimages/train/b/07.jpg labels/train/b/07.png\n")
    return root


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[fs.FileSystem, str]:
    """A plain client, and the name of a bucket of this test's own; the address stands in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    bucket = f"b{abs(hash(request.node.name)):x}"
    plain = client(s3)
    plain.create_dir(bucket)
    return plain, bucket


def run(root, out, **options):
    options = {"split": "few", "processes": 1, "shard_samples": 3} | options
    return pack(open_source("folder", root), out, **options)


def local(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote(filesystem: fs.FileSystem, folder: str) -> dict[str, bytes]:
    infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    files = [info.path for info in infos if info.type == fs.FileType.File]
    return {path.removeprefix(f"{folder}/"): filesystem.open_input_file(path).readall() for path in files}


@pytest.mark.parametrize("processes", [1, 2])
def test_from_a_store_into_a_store_gives_the_bytes_of_a_local_pack(fork_server, folder, tmp_path, s3, store, processes):
    plain, bucket = store
    upload(folder, s3, f"{bucket}/source")
    run(folder, tmp_path / "out")
    made = run(f"s3://{bucket}/source", f"s3://{bucket}/out", processes=processes)
    assert made["labeled"].path == f"s3://{bucket}/out/labeled"
    assert made["labeled"].made["list"] == "splits/few.txt"
    assert remote(plain, f"{bucket}/out") == local(tmp_path / "out")
    run(f"s3://{bucket}/source", tmp_path / "mixed")
    assert local(tmp_path / "mixed") == local(tmp_path / "out")


def test_the_address_may_stand_in_the_url(folder, tmp_path, s3, store, monkeypatch):
    plain, bucket = store
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    query = f"?region=us-east-1&scheme=http&endpoint_override={s3}"
    upload(folder, s3, f"{bucket}/source")
    run(f"s3://{bucket}/source{query}", f"s3://{bucket}/out{query}", pools=["val"])
    run(folder, tmp_path / "out", pools=["val"])
    assert remote(plain, f"{bucket}/out") == local(tmp_path / "out")


def test_a_killed_pack_goes_on_in_the_store(folder, tmp_path, store):
    plain, bucket = store
    out = f"s3://{bucket}/out"
    program = (
        "import os, signal, sys\n"
        "from raysemi.data.pack import pack\n"
        "from raysemi.data.sources import open_source\n"
        "def kill(done, total):\n"
        "    if done >= 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack(open_source('folder', sys.argv[1]), sys.argv[2], split='few', processes=1, shard_samples=3,\n"
        "     progress=kill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, folder, out], check=False, cwd=Path.cwd())
    assert killed.returncode == -signal.SIGKILL
    begun = {info.path: info.mtime for info in plain.get_file_info(fs.FileSelector(f"{bucket}/out", recursive=True))}
    shards = [path for path in begun if path.endswith(".tar")]
    assert len(shards) >= 2
    assert not [path for path in begun if path.endswith("pool.json")]
    with plain.open_output_stream(shards[0]) as half:
        half.write(b"half")
    run(folder, out)
    after = {info.path: info.mtime for info in plain.get_file_info(fs.FileSelector(f"{bucket}/out", recursive=True))}
    assert [after[path] == begun[path] for path in shards[1:]] == [True] * len(shards[1:])
    run(folder, tmp_path / "fresh")
    assert remote(plain, f"{bucket}/out") == local(tmp_path / "fresh")
    seen = []
    run(folder, out, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(14, 14)]
    with pytest.raises(DataError, match="another finished pool"):
        run(folder, out, split=5)


def test_an_interrupted_plan_with_more_shards_leaves_nothing_behind(folder, tmp_path, store):
    plain, bucket = store

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, f"s3://{bucket}/out", shard_samples=1, progress=stop)
    run(folder, f"s3://{bucket}/out")
    run(folder, tmp_path / "fresh")
    assert remote(plain, f"{bucket}/out") == local(tmp_path / "fresh")


def test_a_folder_with_other_objects_and_a_missing_bucket_are_told(folder, store):
    plain, bucket = store
    with plain.open_output_stream(f"{bucket}/out/val/mine.txt") as other:
        other.write(b"x")
    with pytest.raises(DataError, match=r"got mine\.txt"):
        run(folder, f"s3://{bucket}/out")
    with pytest.raises(DataError, match=r"s3://nowhere-at-all/out/labeled must be writable"):
        run(folder, "s3://nowhere-at-all/out")
    with pytest.raises(DataError, match=r"--root must be a folder that exists; got s3://.*/nothing"):
        run(f"s3://{bucket}/nothing", f"s3://{bucket}/out")
    with pytest.raises(DataError, match="must not carry credentials"):
        run(folder, "s3://key:secret@bucket/out")


def test_faults_name_the_objects_and_a_store_that_is_gone_is_no_fault_of_theirs(folder, s3, store, proxy):
    _, bucket = store
    (folder / "labels/val/v11.png").write_bytes(b"nothing")
    upload(folder, s3, f"{bucket}/source")
    with pytest.raises(DataError, match=rf"mask s3://{bucket}/source/labels/val/v11\.png must be a readable PNG"):
        run(f"s3://{bucket}/source", f"s3://{bucket}/out")
    between = proxy()
    config = StoreConfig(endpoint=between.endpoint, region="us-east-1", deadline=1)
    source = open_source("folder", as_path(f"s3://{bucket}/source", config))

    def die(done: int, total: int) -> None:
        if done == 0:
            between.down()

    with pytest.raises(DataFailure, match=r"image of .* must be readable; got no answer"):
        pack(source, folder.parent / "out", split="few", processes=1, shard_samples=3, progress=die)


@pytest.mark.parametrize("fails", [0.0, 0.1])
def test_each_image_is_read_once_and_failing_requests_change_no_byte(
    folder, tmp_path, s3, store, proxy, monkeypatch, fails
):
    plain, bucket = store
    upload(folder, s3, f"{bucket}/source")
    between = proxy(fails=fails)
    config = StoreConfig(endpoint=between.endpoint, region="us-east-1")
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    out = as_path(f"s3://{bucket}/out", config)
    run(as_path(f"s3://{bucket}/source", config), out, allow_same_images=True)
    run(folder, tmp_path / "out")
    assert remote(plain, f"{bucket}/out") == local(tmp_path / "out")
    reads = [one.path for one in between.requests if one.method == "GET" and "/images/" in one.path]
    if fails:
        assert between.failed
    else:
        assert sorted(reads) == sorted(f"/{bucket}/source/{name}" for name in local(folder) if "images/" in name)


def test_voc_cityscapes_and_coco_are_read_from_a_store_too(tmp_path, s3, store):
    plain, bucket = store
    voc, city, coco = tmp_path / "voc", tmp_path / "city", tmp_path / "coco"
    for number, part in enumerate(("train", "val")):
        put_image(voc / f"JPEGImages/{part}.jpg", number)
        put_image(voc / f"SegmentationClass/{part}.png", number, mask=True)
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/Segmentation/{part}.txt").write_text(f"{part}\n")
        put_image(city / f"leftImg8bit/{part}/ulm/ulm_{number}_leftImg8bit.png", number)
        put_image(city / f"gtFine/{part}/ulm/ulm_{number}_gtFine_labelTrainIds.png", number, mask=True)
        put_image(city / f"gtFine/{part}/ulm/ulm_{number}_gtFine_labelIds.png", 9, mask=True)
        put_image(coco / f"{part}2017/{number}.jpg", number)
        put_image(coco / f"masks/{part}2017/{number}.png", number, mask=True)
    for name, root in (("voc", voc), ("cityscapes", city), ("coco", coco)):
        upload(root, s3, f"{bucket}/{name}")
        options = {} if name == "cityscapes" else {"check": False}
        for where, out in (
            (root, tmp_path / f"{name}-pools"),
            (f"s3://{bucket}/{name}", f"s3://{bucket}/{name}-pools"),
        ):
            pack(open_source(name, where, **options), out, pools=["labeled", "val"], processes=1)
        assert remote(plain, f"{bucket}/{name}-pools") == local(tmp_path / f"{name}-pools")


def test_paths_in_a_store_are_those_of_pathlib(folder, s3, store):
    _, bucket = store
    (folder / "odd #1%20?.txt").write_text("x")
    upload(folder, s3, f"{bucket}/source")
    there = as_path(f"s3://{bucket}/source")

    def names(paths, root):
        return sorted(str(below(path, root)) for path in paths if path.is_file())

    for pattern in ("*", "*.png", "*.txt"):
        assert names(there.rglob(pattern), there) == names(folder.rglob(pattern), folder)
    for pattern in ("*.txt", "images/val/*", "*/*/*.png", "images/*/*/0*.jpg"):
        assert names(there.glob(pattern), there) == names(folder.glob(pattern), folder)
    assert {path.name for path in there.iterdir()} == {path.name for path in folder.iterdir()}
    one, own = there / "images/train/a/00.png", folder / "images/train/a/00.png"
    assert (one.name, one.stem, one.suffix, one.parent.name) == (own.name, own.stem, own.suffix, own.parent.name)
    assert one.read_bytes() == one.open("rb").read() == own.read_bytes()
    assert one.stat().st_size == own.stat().st_size
    assert [path.stat() for path in there.rglob("00.png") if path == one] == [one.stat()]
    assert (one.is_file(), one.is_dir(), one.exists()) == (True, False, True)
    assert (one.parent.is_file(), one.parent.is_dir(), (there / "no").exists()) == (False, True, False)
    assert (there / "classes.txt").read_text(encoding="utf-8") == "sky\ntree\nroad\n"
    assert pickle.loads(pickle.dumps(one)) == as_path(str(one)) == one
    assert as_path(str(there / "odd #1%20?.txt")).read_bytes() == b"x"
    assert below(own, there) is below(one, folder) is below(there, one) is None
    with pytest.raises(FileNotFoundError):
        (there / "no").stat()


def test_a_large_upload_is_whole_and_a_broken_one_leaves_nothing(store):
    plain, bucket = store
    path = as_path(f"s3://{bucket}/large")
    content = os.urandom(1 << 20) * 70  # more than is in memory at once
    path.upload(io.BytesIO(content))
    assert plain.open_input_file(f"{bucket}/large").readall() == content

    class Breaks(io.BytesIO):
        def read(self, length: int = -1) -> bytes:
            if self.tell():
                raise KeyboardInterrupt
            return super().read(length)

    with pytest.raises(KeyboardInterrupt):
        (there := as_path(f"s3://{bucket}/broken")).upload(Breaks(content))
    assert not there.exists()


def test_an_upload_that_the_store_garbles_is_told(store, monkeypatch):
    _, bucket = store
    for name in CREDENTIALS:
        monkeypatch.delenv(name)  # of an unsigned upload moto keeps the frames of its chunks too
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(OSError, match=r"\d+ bytes in the store where 5 were sent"):
        as_path(f"s3://{bucket}/file").upload(io.BytesIO(b"bytes"))


def test_a_shard_that_is_not_as_it_was_written_is_told_by_what_differs(tmp_path):
    plan = ShardPlan(tmp_path / "val-000000.tar", (), "plan")
    plan.part.parent.mkdir()

    def found(part: str | None, content: bytes | None = b"tar") -> str:
        for path, kept in ((plan.part, part and part.encode()), (plan.path, content)):
            path.unlink(missing_ok=True) if kept is None else path.write_bytes(kept)
        with pytest.raises(
            DataError, match=r"val-000000\.tar must stay until its pool is done; got .*\. Run"
        ) as caught:
            finish_pool(tmp_path, [plan], ("sky",), ((0, 0, 0),), {})
        return str(caught.value)

    whole = '{"fingerprint": "plan", "bytes": 3, "sha256": "", "rows": []}'
    assert "nothing there" in found(None)
    assert "nothing there" in found(whole, None)
    assert "4 bytes instead of 3" in found(whole, b"more")
    assert "of other samples or settings" in found(whole.replace("plan", "other"))
    assert "with other content than was written" in found("3D\r\n" + whole)
    assert "with other content than was written" in found("{}")
