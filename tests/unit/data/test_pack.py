from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.sources import open_source
from raysemi.data.verify import verify
from raysemi.errors import ConfigError, DataError

NUM_TRAIN, NUM_VAL = 11, 3


def put(root: Path, part: str, key: str, seed: int, mask=True, size=(5, 7), suffix="png") -> None:
    rng = np.random.default_rng(seed)
    image, label = root / f"images/{part}/{key}.{suffix}", root / f"labels/{part}/{key}.png"
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
    if mask:
        Image.fromarray(rng.choice([0, 1, 2, 255], size).astype(np.uint8)).save(label)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "source"
    for number in range(NUM_TRAIN):
        put(root, "train", f"{'ab'[number % 2]}/{number:02d}", number, suffix=("png", "jpg", "webp")[number % 3])
    for number in range(NUM_VAL):
        put(root, "val", f"v{number}", 100 + number)
    (root / "classes.txt").write_text("sky\ntree\nroad\n")
    return root


def run(root, out, **options):
    options = {"split": 4, "processes": 1, "shard_samples": 3} | options
    return pack(open_source("folder", root), out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_three_pools_hold_every_image_once_unchanged(root, tmp_path):
    seen = []
    pools = run(root, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 14)
    assert seen[-1] == (14, 14)
    assert {name: pool.num_samples for name, pool in pools.items()} == {"labeled": 4, "unlabeled": 7, "val": 3}
    assert pools["labeled"].labeled
    assert pools["val"].labeled
    assert not pools["unlabeled"].has_masks
    assert pools["unlabeled"].shard_rows.tolist() == [3, 3, 1]
    keys = {name: pool.index.column("key").to_pylist() for name, pool in pools.items()}
    assert sorted(keys["labeled"] + keys["unlabeled"]) == sorted(f"{'ab'[n % 2]}/{n:02d}" for n in range(NUM_TRAIN))
    for name, pool in pools.items():
        verify(pool)
        assert keys[name] == sorted(keys[name])
        for i in range(pool.num_samples):
            row = pool.row(i)
            with pool.open_shard(row.shard) as file:
                file.seek(row.image_offset)
                part = "val" if name == "val" else "train"
                (image,) = (root / f"images/{part}").glob(f"{row.key}.*")
                assert file.read(row.image_bytes) == image.read_bytes()
    assert not list((tmp_path / "out").rglob("*.part"))
    assert not list((tmp_path / "out").rglob(".parts"))


def test_masks_are_8_bit_indices_and_any_webdataset_tool_reads_them(root, tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    pool = run(root, tmp_path / "out")["labeled"]
    samples = []
    for shard in pool.shards:
        with (tmp_path / "out/labeled" / shard).open("rb") as file:  # WebDataset itself leaves its files open
            members = ({**member, "__url__": shard} for member in tar_file_iterator(file))
            samples += list(group_by_keys(members))
    assert [sample["__key__"] for sample in samples] == pool.index.column("key").to_pylist()
    for sample in samples:
        with Image.open(io.BytesIO(sample["mask.png"])) as mask:
            assert mask.mode == "L"
            with Image.open(root / f"labels/train/{sample['__key__']}.png") as original:
                assert (np.asarray(mask) == np.asarray(original)).all()


def test_members_have_fixed_time_owner_and_mode(root, tmp_path):
    run(root, tmp_path / "out")
    with tarfile.open(tmp_path / "out/labeled/labeled-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o444)}


@pytest.mark.usefixtures("fork_server")
def test_the_bytes_do_not_depend_on_processes_or_place(root, tmp_path):
    run(root, tmp_path / "one", processes=1)
    root.rename(tmp_path / "moved")
    run(tmp_path / "moved", tmp_path / "three", processes=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_masks_of_unlabeled_images_are_stored_only_when_asked(root, tmp_path):
    (root / "labels/train/a/00.png").unlink()
    pools = run(root, tmp_path / "out", keep_unlabeled_masks=True)
    rows = pools["unlabeled"].index.to_pylist()
    assert {row["key"] for row in rows if row["mask_offset"] is None} == {"a/00"}
    assert all(len(row["class_pixels"]) == 3 for row in rows if row["key"] != "a/00")


def test_without_masks_unlabeled_images_need_none_and_broken_ones_do_not_matter(root, tmp_path):
    labeled = set(run(root, tmp_path / "a")["labeled"].index.column("key").to_pylist())
    for path in (root / "labels/train").rglob("*.png"):
        if f"{path.parent.name}/{path.stem}" not in labeled:
            path.write_bytes(b"noise")
    run(root, tmp_path / "b")
    assert contents(tmp_path / "a/unlabeled").keys() == contents(tmp_path / "b/unlabeled").keys()
    assert Pool.open(tmp_path / "a/unlabeled").digest == Pool.open(tmp_path / "b/unlabeled").digest


class Stop(Exception):
    pass


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_pack_goes_on_where_it_stopped(root, tmp_path, processes):
    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "out", processes=processes, progress=interrupt)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert finished
    assert not list((tmp_path / "out").rglob("pool.json"))
    run(root, tmp_path / "out", processes=processes)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    run(root, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_killed_pack_goes_on_and_a_shard_with_lost_bytes_is_written_again(root, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from raysemi.data.pack import pack\n"
        "from raysemi.data.sources import open_source\n"
        "def kill(done, total):\n"
        "    if done >= 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack(open_source('folder', sys.argv[1]), sys.argv[2], split=4, processes=1, shard_samples=3, progress=kill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, root, tmp_path / "out"], check=False, cwd=Path.cwd())
    assert killed.returncode == -9
    (shard, *_) = sorted((tmp_path / "out").rglob("*.tar"))
    shard.write_bytes(bytes(shard.stat().st_size))
    run(root, tmp_path / "out")
    run(root, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_pool_json_says_whether_a_list_or_a_draw_chose(root, tmp_path):
    drawn = run(root, tmp_path / "drawn", split="3", seed=7)["labeled"]
    (root / "splits").mkdir()
    (root / "splits/3.txt").write_text("a/00\nb/01\na/04\n")
    listed = run(root, tmp_path / "listed", split="3", seed=7)["labeled"]
    assert {name: value for name, value in drawn.made.items() if name != "plan"} == {
        "source": "folder", "split": "3", "drawn": 3, "seed": 7,
    }  # fmt: skip
    assert {name: value for name, value in listed.made.items() if name != "plan"} == {
        "source": "folder", "split": "3", "list": "splits/3.txt",
    }  # fmt: skip
    assert listed.index.column("key").to_pylist() == ["a/00", "a/04", "b/01"]
    assert drawn.digest != listed.digest


def test_a_finished_pool_is_kept_and_another_one_is_not_overwritten(root, tmp_path):
    run(root, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    seen = []
    run(root, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(14, 14)]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(DataError, match="another finished pool"):
        run(root, tmp_path / "out", split=5)


def test_an_interrupted_plan_with_more_shards_leaves_nothing_behind(root, tmp_path):
    def stop_late(done, total):
        if done == total:
            raise Stop

    with pytest.raises(Stop):
        run(root, tmp_path / "out", shard_samples=1, progress=stop_late)
    run(root, tmp_path / "out")
    run(root, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_folder_with_other_files_is_not_touched(root, tmp_path):
    (tmp_path / "out/val").mkdir(parents=True)
    (tmp_path / "out/val/mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"got mine\.txt"):
        run(root, tmp_path / "out")


def test_all_faults_of_images_and_masks_are_named_and_good_shards_stay(root, tmp_path):
    labels = root / "labels/val"
    Image.fromarray(np.full((5, 7), 37, np.uint8)).save(labels / "v0.png")
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(labels / "v1.png")
    (labels / "v2.png").write_bytes(b"nothing")
    put(root, "val", "v3", 200)
    (root / "images/val/v3.png").write_bytes((root / "images/val/v3.png").read_bytes()[:90])
    put(root, "val", "v4", 201, size=(40, 60), suffix="jpg")
    whole = (root / "images/val/v4.jpg").read_bytes()
    (root / "images/val/v4.jpg").write_bytes(whole[: len(whole) // 2])
    put(root, "val", "v5", 202, suffix="jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (7, 5)).save(root / "images/val/v5.jpg", exif=exif)
    put(root, "val", "v6", 203)
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(root / "images/val/v6.png")
    with pytest.raises(DataError) as caught:
        run(root, tmp_path / "out")
    lines = str(caught.value).splitlines()
    for line, text in zip(
        lines,
        (
            "class id 37 of 3",
            "mask of v1 .* must have the image's size 7 x 5; got 6 x 5",
            "v2.png must be a readable PNG",
            "image of v3 .* must be readable",
            "image of v4 .* must be readable to its end.*truncated",
            "v5 .* must stand upright; got EXIF orientation 6",
            "v6 .* must have 8 bits a channel; got mode I;16",
        ),
        strict=True,
    ):
        with pytest.raises(DataError, match=text):
            raise DataError(line)
    assert len(list((tmp_path / "out/unlabeled").glob("*.tar"))) == 3
    assert not list((tmp_path / "out/val").glob("*.tar*"))


def test_many_faults_end_the_work_early(root, tmp_path):
    for path in (root / "labels").rglob("*.png"):
        path.write_bytes(b"x")
    for number in range(60):
        put(root, "val", f"w{number:02d}", 300 + number)
        (root / f"labels/val/w{number:02d}.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"at least 2[0-9] faults in all, the first 20 shown"):
        run(root, tmp_path / "out")


def test_the_same_image_on_both_sides_of_a_split_is_named(root, tmp_path):
    (root / "images/val/v1.png").write_bytes((root / "images/train/a/00.png").read_bytes())
    with pytest.raises(DataError, match=r"same bytes as a/00 of (un)?labeled and v1 of val"):
        run(root, tmp_path / "out")
    with pytest.raises(DataError, match=r"v1 of val"):  # also when only one side is packed
        run(root, tmp_path / "out", pools=("val",))
    run(root, tmp_path / "out", allow_same_images=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": NUM_TRAIN}, "pool unlabeled must hold images.*--pools labeled,val"),
        ({"split": "a/00"}, "must be a name, a file or a number"),
    ],
)
def test_empty_pools_and_unknown_splits_are_told(root, tmp_path, options, text):
    with pytest.raises(DataError, match=text):
        run(root, tmp_path / "out", **options)
    assert set(run(root, tmp_path / "out", split=NUM_TRAIN, pools=("labeled", "val"))) == {"labeled", "val"}


def test_labeled_images_need_masks(root, tmp_path):
    for key in ("a/02", "b/05"):
        (root / f"labels/train/{key}.png").unlink()
    (root / "labels/val/v2.png").unlink()
    (root / "splits").mkdir()
    (root / "splits/s.txt").write_text("a/02\nb/05\na/04\n")
    with pytest.raises(DataError) as caught:
        run(root, tmp_path / "out", split="s")
    assert sorted(line.split(" must")[0] for line in str(caught.value).splitlines()) == [
        "image a/02 of pool labeled",
        "image b/05 of pool labeled",
        "image v2 of pool val",
    ]


def test_dots_in_keys_are_refused_or_escaped(root, tmp_path):
    put(root, "val", "v.3", 300)
    with pytest.raises(DataError, match=r"dot; got 'v\.3'.*--escape-dots"):
        run(root, tmp_path / "out")
    pool = run(root, tmp_path / "out", escape_dots=True)["val"]
    assert pool.index.column("key").to_pylist() == ["v0", "v1", "v2", "v_3"]
    put(root, "val", "v_3", 301)
    with pytest.raises(DataError, match=r"must differ after --escape-dots; got 'v.3' and 'v.3'"):
        run(root, tmp_path / "other", escape_dots=True)


def test_a_full_disk_is_told_and_finished_shards_stay(root, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = tmp_path / "out/unlabeled"
    (folder / ".parts").mkdir(parents=True)
    (folder / "unlabeled-000001.tar.part").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"room for unlabeled-000001\.tar.*No space left.*finished shards stay"):
        run(root, tmp_path / "out")
    assert [path.name for path in folder.glob("*.tar*")] == ["unlabeled-000000.tar"]
    assert (tmp_path / "out/labeled/labeled-000001.tar").exists()
    run(root, tmp_path / "out")  # with room again
    run(root, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(root, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(DataError, match="must be writable"):
        run(root, tmp_path / "out")


def test_arguments_out_of_range_are_told_together(root, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(root, tmp_path / "out", pools=("labelled",), processes=0, shard_samples=0)
    assert [fault.split()[0] for fault in caught.value.faults] == ["--pools", "--processes", "--shard-samples"]


def test_val_alone_needs_no_train_images(root, tmp_path):
    (root / "images/train").rename(root / "images/away")
    assert set(run(root, tmp_path / "out", pools=("val",), split=None)) == {"val"}
    with pytest.raises(DataError, match="images/train must be a folder"):
        run(root, tmp_path / "other")
