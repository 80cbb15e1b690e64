"""Files of strangers, broken at random: whatever the bytes, an error of ours comes out, soon and in little memory.

The same examples each time. A longer hunt with others: RAYSEMI_FUZZ=5000 pytest tests/unit/test_fuzz.py
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs

from raysemi import config_io
from raysemi.data.boxes import SCHEMA, open_boxes, write_boxes
from raysemi.data.index import scan_shard
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.rows import INDEX_SCHEMA
from raysemi.data.sources.folder import read_class_map
from raysemi.errors import CheckpointError, ConfigError, DataError
from raysemi.report.runs import read_run

SECONDS, BYTES = 20.0, 600 << 20
"""Of one example, at most, of the processor's time: far more than any needs."""

fuzz = settings(
    max_examples=int(os.environ.get("RAYSEMI_FUZZ", "30")),
    derandomize="RAYSEMI_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)
cuts = st.none() | st.integers(0, 1 << 20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def bounded() -> Iterator[None]:
    """Neither time nor memory grows with what a file claims."""
    unit = 1 if sys.platform == "darwin" else 1024
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < BYTES


def broken(content: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    made = bytearray(content)
    for at, value in changes:
        made[at % len(made)] = value
    return bytes(made if cut is None else made[: cut % len(made)])


def encoded(kind: str, mask: bool = False) -> bytes:
    array = np.random.default_rng(len(kind)).integers(0, 2 if mask else 256, (12, 9) if mask else (12, 9, 3))
    stream = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def shard() -> tuple[bytes, list[int]]:
    """A tar with images of each kind, a long name and notes; and where its headers begin."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        files = [
            ("a/0.jpg", encoded("JPEG")), ("a/0.mask.png", encoded("PNG", mask=True)), ("b.webp", encoded("WEBP")),
            (f"{'long' * 40}.png", encoded("PNG")), ("ü.png", encoded("PNG")), ("ü.json", b"{}"),
        ]  # fmt: skip
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    content = stream.getvalue()
    return content, [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]


def scan(folder: Path, content: bytes) -> None:
    (folder / "x.tar").write_bytes(content)
    with bounded():
        found = scan_shard(fs.LocalFileSystem(), str(folder), "x.tar", num_classes=2, mask_suffix="mask.png")
    assert found.faults or found.rows
    assert all("x.tar" in fault for fault in found.faults)


@fuzz
@given(changes=edits, cut=cuts)
def test_shards(shard, tmp_path_factory, changes, cut):
    scan(tmp_path_factory.getbasetemp(), broken(shard[0], changes, cut))


@fuzz
@given(content=st.binary(max_size=2000), padded=st.booleans())
def test_shards_of_random_bytes(tmp_path_factory, content, padded):
    scan(tmp_path_factory.getbasetemp(), content + bytes(-len(content) % 512 + 1024 if padded else 0))


NUMBERS = st.sampled_from(
    [
        b"\xff" * 8 + b"\0" * 4,
        b"\xff" * 12,
        b"\x80" + b"\x7f" * 11,
        b"77777777777\0",
        b"-0000000001\0",
        b"00000000000\0",
    ]
)


@fuzz
@given(
    which=st.integers(0, 50),
    field=st.sampled_from([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (386, 96)]),
    value=NUMBERS | st.binary(min_size=1, max_size=12) | st.sampled_from([b"L", b"K", b"x", b"g", b"S", b"5", b"1"]),
)
def test_headers_whose_checksum_is_right(shard, tmp_path_factory, which, field, value):
    """Sizes below 0 and of exabytes, other types (links, folders, sparse files, notes on notes), other names."""
    content, headers = bytearray(shard[0]), shard[1]
    at, (start, length) = headers[which % len(headers)], field
    content[at + start : at + start + min(length, len(value))] = value[:length]
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    scan(tmp_path_factory.getbasetemp(), bytes(content))


def test_notes_on_notes_on_notes(tmp_path):
    """A chain of long names, each of the next: deeper than an interpreter can follow."""
    header = tarfile.TarInfo("n")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    scan(tmp_path, (header.tobuf() + b"x".ljust(512, b"\0")) * 3000 + bytes(1024))


@pytest.fixture(scope="module")
def pool(scenes) -> Path:
    write_boxes(
        Pool.open(scenes / "val"),
        "fuzz",
        pa.Table.from_pylist(
            [
                dict(zip(SCHEMA.names, (Pool.open(scenes / "val").key(i), 1, 2, 30, 40, 1, 0.5), strict=True))
                for i in range(4)
            ],
            schema=SCHEMA,
        ).to_batches(),
        {},
    )
    return scenes / "val"


def use(folder: Path) -> None:
    """All that a run reads of a pool."""
    with bounded():
        try:
            opened = Pool.open(folder)
            assert len(opened.digest) == 64
            reader = Reader(opened)
            for i in range(min(opened.num_samples, 5)):
                reader.sample(i, with_mask=True)
        except DataError as error:
            assert len(str(error)) < 3000  # noqa: PT017 - or no error at all


def beside(pool: Path, tmp_path_factory: pytest.TempPathFactory, **files: bytes) -> Path:
    """The pool with other files."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    for file in pool.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        (folder / name.replace("__", ".").replace("_", "-")).write_bytes(content)
    return folder


@fuzz
@given(changes=edits, cut=cuts)
def test_pool_json(pool, tmp_path_factory, changes, cut):
    use(beside(pool, tmp_path_factory, pool__json=broken((pool / "pool.json").read_bytes(), changes, cut)))


@fuzz
@given(place=st.integers(0, 100), value=values)
def test_pool_json_with_other_values(pool, tmp_path_factory, place, value):
    content = json.loads((pool / "pool.json").read_bytes())
    places = [(content, name) for name in content] + [(content["shards"][0], name) for name in content["shards"][0]]
    where, name = places[place % len(places)]
    where[name] = value
    use(beside(pool, tmp_path_factory, pool__json=json.dumps(content).encode(errors="surrogatepass")))


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**6, b"9" * 10**6, b" " * (1 << 27) + b"{}", b"NaN"])
def test_absurd_pool_json(pool, tmp_path_factory, content):
    with pytest.raises(DataError, match=r"pool\.json must"):
        Pool.open(beside(pool, tmp_path_factory, pool__json=content))


def promised(pool: Path, index: bytes, samples: int | None = None, of_before: bool = False) -> bytes:
    """`pool.json` that names this index; one of an earlier version says nothing of the footer."""
    content = json.loads((pool / "pool.json").read_bytes())
    content["index_sha256"] = hashlib.sha256(index).hexdigest()
    footer = index[-(int.from_bytes(index[-8:-4], "little") + 8) :]
    content["index_footer_sha256"] = None if of_before else hashlib.sha256(footer).hexdigest()
    if samples is not None:
        content["shards"] = [{**content["shards"][0], "samples": samples}]
        content["masks"] = 0
    return json.dumps(content).encode()


@fuzz
@given(changes=edits, cut=cuts, of_before=st.booleans())
def test_index(pool, tmp_path_factory, changes, cut, of_before):
    index = broken((pool / "index.parquet").read_bytes(), changes, cut)
    use(beside(pool, tmp_path_factory, index__parquet=index, pool__json=promised(pool, index, None, of_before)))


@fuzz
@given(changes=edits.filter(bool), of_before=st.booleans())
def test_footers_of_an_index(pool, tmp_path_factory, changes, of_before):
    """Where the columns lie and what is in them, which the C++ below believes."""
    index = (pool / "index.parquet").read_bytes()
    length = int.from_bytes(index[-8:-4], "little")
    index = index[: -8 - length] + broken(index[-8 - length : -8], changes, None) + index[-8:]
    use(beside(pool, tmp_path_factory, index__parquet=index, pool__json=promised(pool, index, None, of_before)))


@fuzz
@given(
    row=st.integers(0, 4),
    name=st.sampled_from([name for name in INDEX_SCHEMA.names if name != "class_pixels"]),
    number=st.none() | st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-1, 0, 1, 2**31 - 1]),
)
def test_index_with_other_values(pool, tmp_path_factory, row, name, number):
    table = Pool.open(pool).index
    column = table.schema.get_field_index(name)
    made = table.column(name).to_pylist()
    made[row] = number if name not in ("key", "shard") else (None if number is None else f"../{number}")
    try:
        changed = table.set_column(column, table.schema.field(name), pa.array(made).cast(table.schema.field(name).type))
    except pa.ArrowException:
        return  # no file can hold it
    stream = io.BytesIO()
    pq.write_table(changed, stream)
    use(beside(pool, tmp_path_factory, index__parquet=stream.getvalue(), pool__json=promised(pool, stream.getvalue())))


def bomb(rows: int, **columns: pa.Array) -> bytes:
    plain = {name: pa.repeat(pa.scalar(1, pa.int64()), rows) for name in ("image_offset", "image_bytes")}
    plain |= {name: pa.nulls(rows, pa.int64()) for name in ("mask_offset", "mask_bytes")}
    plain |= {name: pa.repeat(pa.scalar(9, pa.int32()), rows) for name in ("height", "width")}
    plain |= {"key": pa.repeat("k", rows), "shard": pa.repeat("val-000000.tar", rows)}
    plain |= {"class_pixels": pa.nulls(rows, pa.list_(pa.int64())), **columns}
    stream = io.BytesIO()
    pq.write_table(pa.table(plain), stream, compression="zstd")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "samples", "text"),
    [
        (lambda: bomb(3_000_000), 3_000_000, "row groups of"),
        (lambda: bomb(5, key=pa.repeat("k" * (8 << 20), 5)), 5, "characters|bytes once unpacked"),
        (lambda: bomb(5, class_pixels=pa.array([[0] * 3_000_000] * 5)), 5, "bytes once unpacked where 5 rows"),
    ],
)
def test_a_small_index_that_unpacks_to_a_large_one(pool, tmp_path_factory, make, samples, text):
    index = make()
    assert len(index) < 1 << 20
    folder = beside(pool, tmp_path_factory, index__parquet=index, pool__json=promised(pool, index, samples))
    with bounded(), pytest.raises(DataError, match=text):
        _ = Pool.open(folder).index


@fuzz
@given(changes=edits, cut=cuts)
def test_boxes(pool, tmp_path_factory, changes, cut):
    boxes = broken((pool / "boxes-fuzz.parquet").read_bytes(), changes, cut)
    folder = beside(pool, tmp_path_factory, boxes_fuzz__parquet=boxes)
    with bounded():
        try:
            found = open_boxes(Pool.open(folder), "fuzz", 0.0)
            assert found.starts[-1] == len(found.boxes_M4)
        except DataError as error:
            assert len(str(error)) < 3000  # noqa: PT017 - or no error at all


def load(text: str, *overrides: str) -> None:
    with bounded():
        for read in (lambda: config_io.parse(text), lambda: config_io.load(None, overrides)):
            try:
                read()
            except ConfigError as error:
                assert len(str(error)) < 100_000  # noqa: PT017 - or no error at all


@fuzz
@given(
    changes=edits,
    cut=cuts,
    extra=st.text(alphabet=st.sampled_from("&*a!{}[]:,-|>#%@`'\"\n ?<=~0x1.e!int"), max_size=30),
)
def test_config(changes, cut, extra):
    recipe = config_io.recipe_file(config_io.recipes()[0]).read_bytes()
    text = broken(recipe, changes, cut).decode(errors="replace")
    load(f"{text}\n{extra}", f"method={extra}", f"train.steps={extra}", f"data={extra}", extra)


ALIASES = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    "text",
    [
        ALIASES, "a: &a [*a]", "[" * 100_000, "- " * 50_000, "a: " * 5000,
        "seed: " + "9" * 50_000, "seed: !!int x", "seed: !!bool x",
        "a: !!python/object/apply:os.system [ls]", "a: !!timestamp 2026-99-99", "? [a]\n: b", "a: !!set {b, c}",
        "x" * 300_000, "a: \x00", "\ud800", "<<: &a {b: 1}\nc: *a", "- a", "a: !!binary =",
    ],
)  # fmt: skip
def test_absurd_configs(text, tmp_path):
    with bounded(), pytest.raises(ConfigError):
        config_io.parse(text)
    load("", f"data={text}")
    (tmp_path / "classes.yaml").write_bytes(text.encode(errors="surrogatepass"))
    with bounded(), pytest.raises(DataError):
        read_class_map(tmp_path / "classes.yaml")


def test_a_report_reads_no_bomb(tmp_path):
    (tmp_path / "config.yaml").write_text(ALIASES)
    with bounded(), pytest.raises(CheckpointError, match=r"config\.yaml must be as .*more than 50000 values"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "url",
    ["pipe:cat /etc/passwd", "pipe://cat x", "|cat x", "file:|cat x", "file:///nowhere/|ls", "s3:", "gs://", "://"],
)
def test_no_path_is_a_command(url, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a command was started")

    for name in ("os.system", "subprocess.Popen", "os.popen"):
        monkeypatch.setattr(name, refused)
    with pytest.raises(DataError):
        Pool.open(url)
