"""Damage of every kind, done to a real small pool: named by `verify`, and what a stream and an evaluation make of it.

A table of all this is in docs/data.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from makers import call, tiny_segmentor
from PIL import Image
from pyarrow import fs

from raysemi.data.index import index_shards
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.sources import open_source
from raysemi.data.verify import verify
from raysemi.data.write_pool import write_index
from raysemi.engine.evaluate import EvalConfig, evaluate
from raysemi.errors import DataError
from raysemi.launch.restore import open_pool
from raysemi.methods.base import SingleRank

CLASSES = ("sky", "road", "car")
SAMPLES, SHARD_SAMPLES, DAMAGED = 16, 4, 6
KEY, SHARD = f"city/{DAMAGED:02d}", "val-000001.tar"


def encoded(array: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labeled pool of 16 JPEG images of 48 x 40 pixels in four shards."""
    root = tmp_path_factory.mktemp("damage")
    for i in range(SAMPLES):
        rng = np.random.default_rng(i)
        image = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((48, 40))
        for kind in ("images", "labels"):
            (root / f"{kind}/val/city").mkdir(parents=True, exist_ok=True)
        image.save(root / f"images/val/city/{i:02d}.jpg", quality=95)
        Image.fromarray(rng.integers(0, 3, (5, 6), dtype=np.uint8)).resize((48, 40), 0).save(
            root / f"labels/val/city/{i:02d}.png"
        )
    (root / "classes.txt").write_text("\n".join(CLASSES))
    pack(open_source("folder", root), root / "out", split=None, pools=("val",), processes=1, shard_samples=4)
    return root / "out/val"


class Damage(NamedTuple):
    """What is done to a pool."""

    do: Callable[[Path, Pool], None]
    told: str
    """What `verify` says of it: the shard, and the key or member."""
    indexed: str | None
    """What `raysemi index` says of the shards; None: it takes them, or would only ask for what is missing."""
    skipped: tuple[int, ...]
    """Samples that a stream cannot read."""
    fields: str = ""
    """What the stream says of the first of them."""


def change_shard(change: Callable[[bytearray, Pool], bytes | bytearray | None]) -> Callable[[Path, Pool], None]:
    def do(folder: Path, pool: Pool) -> None:
        content = bytearray((folder / SHARD).read_bytes())
        made = change(content, pool)
        (folder / SHARD).write_bytes(content if made is None else made)

    return do


def flip(content: bytearray, at: int) -> None:
    content[at] ^= 1


def rewrite(change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> Callable[[Path, Pool], None]:
    """The second shard written again, with other members, by someone who left index and pool.json as they were."""

    def do(folder: Path, pool: Pool) -> None:
        with tarfile.open(folder / SHARD) as tar:
            files = [(info.name, tar.extractfile(info).read()) for info in tar]
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for name, data in change(files):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        (folder / SHARD).write_bytes(stream.getvalue())

    return do


def foreign_index(change: Callable[[list[dict]], None]) -> Callable[[Path, Pool], None]:
    """Index and pool.json written again, consistently, by someone with other rules."""

    def do(folder: Path, pool: Pool) -> None:
        rows = pool.index.to_pylist()
        change(rows)
        write_index(
            fs.LocalFileSystem(), str(folder), rows=rows, shards=pool.shard_files, classes=CLASSES, palette=pool.palette
        )

    return do


def rename(rows: list[dict], key: str) -> None:
    rows[DAMAGED]["key"] = key


def renamed(key: str) -> Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]:
    return lambda files: [(name.replace(KEY, key), data) for name, data in files]


def in_place(data: bytes, room: int) -> bytes:
    """A JPEG padded behind its end to the length of another."""
    assert len(data) <= room
    return data + bytes(room - len(data))


def cut_scan(data: bytes) -> bytes:
    """A JPEG without the second half of its pixels, with an end mark: decoders fill it with grey."""
    return in_place(data[: len(data) * 2 // 3] + b"\xff\xd9", len(data))


def put_image(make: Callable[[bytes], bytes]) -> Callable[[Path, Pool], None]:
    def change(content: bytearray, pool: Pool) -> None:
        row = pool.row(DAMAGED)
        place = slice(row.image_offset, row.image_offset + row.image_bytes)
        content[place] = make(bytes(content[place]))

    return change_shard(change)


def huge(data: bytes) -> bytes:
    """The same JPEG, whose header claims 50,000 x 50,000 pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 50_000, 50_000) + data[at + 4 :]


def text_bomb(room: int) -> bytes:
    """A small PNG that holds a text of 200 MB once unpacked."""
    body = b"note\0\0" + zlib.compress(bytes(200 << 20), 9)[: room - 400]
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = encoded(np.zeros((40, 48, 3)), "PNG")
    return in_place(plain[:33] + chunk + plain[33:], room)


WHOLE_SHARD = tuple(range(4, 8))
LENGTH = r"shard must have \d+ bytes as pool\.json says"
BYTES = "must have the bytes that were packed"
DAMAGES = {
    "truncated in a header": Damage(
        change_shard(lambda content, pool: content[: pool.row(DAMAGED).image_offset - 100]),
        rf"{SHARD} has \d+ bytes instead of .*\n(.*\n)*.*key {KEY}: image must lie in the shard",
        rf"{SHARD} must.*city/05",
        WHOLE_SHARD,
        LENGTH,
    ),
    "truncated in a payload": Damage(
        change_shard(lambda content, pool: content[: pool.row(DAMAGED).image_offset + 50]),
        rf"{SHARD} has \d+ bytes instead of .*\n(.*\n)*.*key {KEY}: image must lie in the shard",
        rf"{SHARD} must.*{KEY}",
        WHOLE_SHARD,
        LENGTH,
    ),
    "truncated at a block end": Damage(
        change_shard(lambda content, pool: content[: pool.row(DAMAGED).image_offset - 512]),
        rf"{SHARD} has \d+ bytes instead of .*\n(.*\n)*.*key {KEY}: image must lie in the shard",
        rf"{SHARD} must end.*city/05\.mask\.png",
        WHOLE_SHARD,
        LENGTH,
    ),
    "a flipped bit in an image": Damage(
        change_shard(lambda content, pool: flip(content, pool.row(DAMAGED).image_offset + 700)),
        rf"{SHARD} has other bytes.*\n.*{SHARD}, key {KEY}: image {BYTES}",
        None,
        (DAMAGED,),
        f"image {BYTES}",
    ),
    "a flipped bit in a mask": Damage(
        change_shard(lambda content, pool: flip(content, pool.row(DAMAGED).mask_offset + 60)),
        rf"{SHARD} has other bytes.*\n.*{SHARD}, key {KEY}: mask {BYTES}",
        rf"mask of {KEY} of shard {SHARD} must be a readable PNG",
        (DAMAGED,),
        f"mask {BYTES}",
    ),
    "a flipped bit in a tar header": Damage(
        change_shard(lambda content, pool: flip(content, pool.row(DAMAGED).image_offset - 512 + 4)),
        rf"{SHARD} has other bytes.*\n.*a header is broken after 'city/05\.mask\.png'",
        r"a header is broken after 'city/05\.mask\.png'",
        (),  # nobody reads it
    ),
    "a missing mask": Damage(
        rewrite(lambda files: [(name, data) for name, data in files if name != f"{KEY}.mask.png"]),
        rf"{SHARD} has other bytes.*\n.*key {KEY}: mask must begin at byte \d+; got city/07",  # tar pads: no shorter
        None,
        (DAMAGED, DAMAGED + 1),
        BYTES,
    ),
    "members in the wrong order": Damage(
        rewrite(lambda files: files[::-1]),
        rf"{SHARD} has other bytes.*\n(.*\n)*.*key {KEY}: image must begin at byte \d+; got",
        None,
        WHOLE_SHARD,
        BYTES,
    ),
    "a duplicate key": Damage(
        foreign_index(lambda rows: rename(rows, "city/09")),
        r"key city/09: must be there once; got it 2 times",
        None,
        (),
    ),
    "a duplicate member": Damage(
        rewrite(renamed("city/05")),
        rf"{SHARD} has other bytes.*\n.*member city/05\.jpg must be there once",
        rf"key city/05 of shard {SHARD} must have one image",
        (),
    ),
    "a dotted key": Damage(
        foreign_index(lambda rows: rename(rows, "city/0.6")), r"key city/0\.6: must hold no dot", None, ()
    ),
    "a dotted member": Damage(
        rewrite(renamed("city/.6")),
        rf"{SHARD} has other bytes.*\n.*key {KEY}: image must begin at byte \d+; got city/\.6",
        rf"member of shard {SHARD} must be a file KEY\.SUFFIX; got 'city/\.6\.jpg'",
        (),
    ),
    "an empty shard": Damage(
        change_shard(lambda content, pool: b""),
        rf"{SHARD} has 0 bytes instead of (.*\n)*.*key {KEY}: image must lie in the shard",
        rf"{SHARD} must be a whole.*got empty file",
        WHOLE_SHARD,
        LENGTH,
    ),
    "a shard of no members": Damage(
        change_shard(lambda content, pool: bytes(len(content))),
        rf"{SHARD} has other bytes.*\n(.*\n)*.*key {KEY}: image must begin at byte \d+; got no member",
        rf"shard {SHARD} must hold images; got none",
        WHOLE_SHARD,
        BYTES,
    ),
    "a shard replaced by another of its length": Damage(
        change_shard(lambda content, pool: bytes(content).translate(bytes(range(255, -1, -1)))),
        rf"{SHARD} has other bytes.*\n(.*\n)*.*key {KEY}: image {BYTES}",
        rf"{SHARD} must be a whole, uncompressed tar",
        WHOLE_SHARD,
        BYTES,
    ),
    "an image that claims to be huge": Damage(
        put_image(huge), rf"{SHARD}, key {KEY}: image {BYTES}", rf"{KEY} of shard {SHARD} must be", (DAMAGED,), BYTES
    ),
    "an image that claims to be huge, in the index too": Damage(
        foreign_index(lambda rows: rows[DAMAGED].update(height=50_000, width=50_000)),
        rf"{SHARD}, key {KEY}: image must be 50000 x 50000 pixels; got 48 x 40",
        None,
        (DAMAGED,),
        "image must have at most 89478485 pixels; got 2500000000",
    ),
    "a JPEG without its last pixels": Damage(
        put_image(cut_scan),
        rf"{SHARD}, key {KEY}: image {BYTES}",
        rf"{KEY} of shard {SHARD} must be readable to its end; got a JPEG whose pixels end",
        (DAMAGED,),
        BYTES,
    ),
    "a bomb of text in an image": Damage(
        put_image(lambda data: text_bomb(len(data))),
        rf"{SHARD}, key {KEY}: image {BYTES}",
        rf"{KEY} of shard {SHARD} must be readable to its end; got Decompressed data too large",
        (DAMAGED,),
        BYTES,
    ),
    "a key that leads out": Damage(
        foreign_index(lambda rows: rename(rows, "../../06")),
        r"key '\.\./\.\./06': must be a plain path",
        None,
        (DAMAGED,),
        r"key must be a path below a folder; got '\.\./\.\./06'",
    ),
    "a member that leads out": Damage(
        rewrite(renamed("city/..")),
        rf"{SHARD} has other bytes.*\n.*key {KEY}: image must begin at byte \d+; got city/\.\.\.jpg",
        rf"member of shard {SHARD} must be a file KEY\.SUFFIX; got 'city/\.\.\.jpg'",
        (),
    ),
    "a stale index": Damage(
        lambda folder, pool: pq.write_table(pool.index.slice(0, 16), folder / "index.parquet"),
        r"index\.parquet of .* is not the one that was written with pool\.json",
        None,
        (),
    ),
}


def copied(sound: Path, folder: Path) -> Pool:
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return Pool.open(folder)


@pytest.fixture
def damage(request: pytest.FixtureRequest, sound: Path, tmp_path: Path) -> tuple[Damage, Path]:
    """A kind of damage, and the pool that has it."""
    kind = DAMAGES[request.param]
    pool = copied(sound, tmp_path / "pool")
    _ = pool.index
    kind.do(tmp_path / "pool", pool)
    return kind, tmp_path / "pool"


every_kind = pytest.mark.parametrize("damage", DAMAGES, indirect=True)


@every_kind
def test_verify_names_it(damage: tuple[Damage, Path]) -> None:
    kind, folder = damage
    with pytest.raises(DataError) as caught:
        verify(Pool.open(folder), decode="50000" in kind.told)
    assert re.search(kind.told, str(caught.value)), str(caught.value)
    assert str(caught.value).count("\n") < 25
    if SHARD in kind.told:
        others = {f"val-00000{i}.tar" for i in (0, 2, 3)}
        assert not any(other in str(caught.value) for other in others)


@every_kind
def test_index_names_it_where_it_reads_the_shards_anew(damage: tuple[Damage, Path]) -> None:
    kind, folder = damage
    (folder / "pool.json").unlink()
    (folder / "index.parquet").unlink()
    if kind.indexed is None:
        index_shards(folder, classes=CLASSES, processes=1)
    else:
        with pytest.raises(DataError) as caught:
            index_shards(folder, classes=CLASSES, processes=1)
        assert re.search(kind.indexed, str(caught.value)), str(caught.value)


def stream(pool: Pool, mode: str, rank: int = 0, world: int = 1, processes: int = 0) -> Stream:
    config = DataConfig(crop=16, on_corrupt=mode, loader_processes=processes)
    return Stream(config, {"labeled": pool}, 3, 4, 4, rank, world, 0, False, 0, SAMPLES // 4)


def keys(made: Stream) -> list[tuple[str, ...]]:
    return [batch.keys_L for batch in made]


@every_kind
def test_a_stream_stops_or_passes_over_it(damage: tuple[Damage, Path], sound: Path, request) -> None:
    """What is skipped is replaced, in its place; every other sample comes when it would have come."""
    kind, folder = damage
    if "stale" in request.node.name:
        for mode in ("raise", "skip"):  # it is no fault of one sample
            with pytest.raises(DataError, match=r"must be the one that was written with pool\.json"):
                keys(stream(Pool.open(folder), mode))
        return
    pool = Pool.open(folder)
    planned = [key for batch in keys(stream(Pool.open(sound), "raise")) for key in batch]
    names = {Pool.open(sound).key(i): pool.key(i) for i in range(SAMPLES)}
    if pool.digest == Pool.open(sound).digest:
        planned = [names[key] for key in planned]
    if not kind.skipped:
        assert [key for batch in keys(stream(pool, "raise")) for key in batch] == planned
        return
    with pytest.raises(DataError) as caught:
        keys(stream(pool, "raise"))
    first = next(key for key in planned if key in {pool.key(i) for i in kind.skipped})
    assert f"pool {folder}, shard {SHARD}, key {first}: " in str(caught.value)
    assert re.search(kind.fields, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)

    skipping = stream(pool, "skip")
    read = [key for batch in keys(skipping) for key in batch]
    lost = {pool.key(i) for i in kind.skipped}
    assert [key for key in planned if key not in lost] == [
        key for key, meant in zip(read, planned, strict=True) if meant not in lost
    ]
    assert not lost & set(read)
    assert {row["key"] for row in skipping.skips.as_rows()} == lost
    assert {row["shard"] for row in skipping.skips.as_rows()} == {SHARD}
    halves = [stream(pool, "skip", rank, 2) for rank in range(2)]
    batches = zip(*(keys(half) for half in halves), strict=True)
    assert [key for low, high in batches for key in low + high] == read
    assert {row["key"] for half in halves for row in half.skips.as_rows()} == lost


@pytest.mark.parametrize("damage", ["a flipped bit in an image", "an empty shard"], indirect=True)
def test_loader_processes_skip_the_same(damage: tuple[Damage, Path]) -> None:
    pool = Pool.open(damage[1])
    alone, shared = stream(pool, "skip"), stream(pool, "skip", processes=2)
    assert keys(alone) == keys(shared)
    assert alone.skips.as_rows() == shared.skips.as_rows()


@every_kind
def test_an_evaluation_counts_every_image_or_ends_with_its_name(damage: tuple[Damage, Path], request) -> None:
    kind, folder = damage
    network = tiny_segmentor(len(CLASSES))

    def run() -> torch.Tensor:
        return evaluate(network, Pool.open(folder), EvalConfig(), SingleRank(), torch.device("cpu"))

    if kind.skipped or "stale" in request.node.name:
        with pytest.raises(DataError, match=rf"shard {SHARD}, key .*: |must be the one that was written"):
            run()
    else:
        assert int(run().sum()) == SAMPLES * 40 * 48


def test_a_pool_without_checksums_still_tells_a_jpeg_without_its_last_pixels(sound: Path, tmp_path: Path) -> None:
    """Indexes of earlier versions: Pillow would paint the rest grey and say nothing."""
    pool = copied(sound, tmp_path / "pool")
    foreign_index(lambda rows: [row.update(image_crc32=None, mask_crc32=None) for row in rows])(pool.folder, pool)
    assert pool.index.num_rows == SAMPLES
    DAMAGES["a JPEG without its last pixels"].do(tmp_path / "pool", Pool.open(tmp_path / "pool"))
    with pytest.raises(DataError, match=f"key {KEY}: image must be a readable .*; got pixels that end before"):
        keys(stream(Pool.open(tmp_path / "pool"), "raise"))
    assert stream(Pool.open(sound), "raise").__iter__().__next__()


def test_an_index_without_columns_of_checksums_is_read(sound: Path, tmp_path: Path) -> None:
    pool = Pool.open(sound)
    copied(sound, tmp_path / "pool")
    table = pool.index.drop_columns(["image_crc32", "mask_crc32"])
    pq.write_table(table, tmp_path / "pool/index.parquet")
    content = json.loads((tmp_path / "pool/pool.json").read_text())
    content["index_sha256"] = hashlib.sha256((tmp_path / "pool/index.parquet").read_bytes()).hexdigest()
    del content["index_footer_sha256"]
    (tmp_path / "pool/pool.json").write_text(json.dumps(content))
    old = Pool.open(tmp_path / "pool")
    assert old.row(DAMAGED).image_crc32 is None
    assert pool.row(DAMAGED).image_crc32 is not None
    assert keys(stream(old, "raise")) == keys(stream(pool, "raise"))
    verify(old, decode=True)


def test_decoding_finds_what_was_packed_broken(sound: Path, tmp_path: Path) -> None:
    """Digests are right, and yet a mask has a class that the pool does not have, or other counts than the index."""
    pool = copied(sound, tmp_path / "pool")
    verify(pool, decode=True)
    foreign_index(lambda rows: rows[DAMAGED].update(class_pixels=[1, 2, 3]))(tmp_path / "pool", pool)
    verify(Pool.open(tmp_path / "pool"))
    with pytest.raises(DataError, match=rf"{SHARD}, key {KEY}: mask must have \[1, 2, 3\] pixels of each class; got"):
        verify(Pool.open(tmp_path / "pool"), decode=True)


def test_a_run_names_the_first_image_without_a_mask(sound: Path, tmp_path: Path) -> None:
    copied(sound, tmp_path / "pool")
    DAMAGES["a missing mask"].do(tmp_path / "pool", Pool.open(tmp_path / "pool"))
    (tmp_path / "pool/pool.json").unlink()
    index_shards(tmp_path / "pool", classes=CLASSES, processes=1)
    with pytest.raises(DataError, match=rf"data\.val must have a mask for every image; got .*1 .*{KEY}"):
        open_pool(str(tmp_path / "pool"), "data.val", masks=True)


@pytest.mark.usefixtures("fork_server")
def test_verify_in_processes_from_the_command_line(sound: Path, tmp_path: Path) -> None:
    result = call("verify", sound, "--decode", "--processes", 2)
    assert result.exit_code == 0, result.output
    assert "16 images in 4 shards are as they were written, and all can be decoded" in result.output
    copied(sound, tmp_path / "pool")
    DAMAGES["a flipped bit in an image"].do(tmp_path / "pool", Pool.open(tmp_path / "pool"))
    (tmp_path / "pool/val-000003.tar").unlink()
    result = call("verify", tmp_path / "pool", "--processes", 2)
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert [line for line in lines if f"{SHARD}, key {KEY}: image {BYTES}" in line]
    assert [line for line in lines if "val-000003.tar cannot be read" in line]
    assert "2 of 4 shards damaged" in lines[-1]
    assert "Traceback" not in result.output
