"""Against a real S3 server on loopback, with a proxy before it that counts and fails."""

from __future__ import annotations

import pickle
import time

import pytest
from object_store import upload
from pyarrow import fs

from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.store import StoreConfig, open_store
from raysemi.data.verify import verify
from raysemi.errors import DataError, DataFailure


@pytest.fixture
def remote(tmp_path, make_pool, s3):
    """The local pool, and where its copy lies."""
    local = make_pool(tmp_path / "here")
    upload(tmp_path / "here", s3, "bucket/pool")
    return local, "s3://bucket/pool", StoreConfig(endpoint=f"http://{s3}", region="us-east-1")


def quick(proxy, **settings):
    return StoreConfig(endpoint=proxy.endpoint, region="us-east-1", **{"deadline": 20, **settings})


def test_reads_what_the_local_pool_reads(remote):
    local, url, store = remote
    pool = Pool.open(url, store=store)
    assert not pool.local
    assert pool.digest == local.digest
    assert pool.index == local.index
    for i in range(13):
        assert Reader(pool).sample(i, with_mask=True).image == Reader(local).sample(i).image
        assert (Reader(pool).mask(i) == Reader(local).mask(i)).all()
    verify(pool)


def test_the_address_may_stand_in_the_url_or_the_environment(remote, monkeypatch):
    _, url, store = remote
    host = store.endpoint.removeprefix("http://")
    assert Pool.open(f"{url}?region=us-east-1&scheme=http&endpoint_override={host}").num_samples == 13
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    assert Pool.open(url).num_samples == 13


def test_a_pool_crosses_process_borders_without_its_connections(remote):
    local, url, store = remote
    again = pickle.loads(pickle.dumps(Pool.open(url, store=store)))
    assert again.store == store
    assert Reader(again).picture(7) == Reader(local).picture(7)


def test_threads_read_one_file_at_different_places(remote):
    from concurrent.futures import ThreadPoolExecutor

    local, url, store = remote
    pool = Pool.open(url, store=store)
    far, near = pool.open_shard("p-000001.tar"), local.open_shard("p-000001.tar")
    with ThreadPoolExecutor(8) as threads:
        for place, content in enumerate(threads.map(lambda i: far.read_at(700, i * 97), range(100))):
            assert content == near.read_at(700, place * 97)


def test_pools_are_written_too(remote, s3):
    filesystem, folder = open_store("s3://bucket/new", remote[2])
    with filesystem.open_output_stream(f"{folder}/a/b.bin") as out:
        out.write(b"x" * 100)
    assert filesystem.get_file_info(f"{folder}/a/b.bin").size == 100
    found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    assert [info.path for info in found if info.is_file] == ["bucket/new/a/b.bin"]
    filesystem.delete_file(f"{folder}/a/b.bin")
    assert filesystem.get_file_info(f"{folder}/a/b.bin").type == fs.FileType.NotFound


def test_every_read_survives_failures_and_a_death(remote, proxy):
    local, url, _ = remote
    bad = proxy(fails=0.3)
    reader = Reader(Pool.open(url, store=quick(bad)))
    death = bad.die_for(1.0)
    for i in range(13):
        assert reader.picture(i) == Reader(local).picture(i)
    death.join()
    assert bad.failed > 3


def test_the_deadline_names_shard_and_cause_in_time(remote, proxy):
    _, url, _ = remote
    one = proxy()
    reader = Reader(Pool.open(url, store=quick(one, deadline=1.5)))
    reader.pool.row(7)  # the index has been read
    one.down()
    began = time.monotonic()
    with pytest.raises(DataFailure) as caught:
        reader.image(7)
    assert time.monotonic() - began < 20  # not the 120 s that are the default
    text = str(caught.value)
    assert "shard p-000001.tar" in text
    assert "key city/007" in text
    assert f"no answer of s3:// at {one.endpoint} within 1.5 s" in text
    assert "connect" in text.lower()
    assert "\n" not in text


def test_a_server_that_takes_no_notice_ends_by_the_deadline(remote):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as hole:
        store = StoreConfig(endpoint=f"http://127.0.0.1:{hole.getsockname()[1]}", region="us-east-1", deadline=1)
        began = time.monotonic()
        with pytest.raises(DataFailure, match=r"pool/pool\.json must be readable; got no answer"):
            Pool.open(remote[1], store=store)
        assert time.monotonic() - began < 9  # not the 10 s of a read without a deadline


def one_line(url, store=None):
    with pytest.raises(DataError) as caught:
        Pool.open(url, store=store)
    assert type(caught.value) is DataError  # not a failure: another try changes nothing
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_will_not_go_better_is_told_at_once(remote, proxy, monkeypatch):
    _, url, store = remote
    began = time.monotonic()
    assert "bucket nowhere is not there" in one_line("s3://nowhere/pool", store)
    assert "bucket/other/pool.json is not there" in one_line("s3://bucket/other", store)
    assert "another region than us-east-1 (data.store.region)" in one_line(url, quick(proxy(answer=301)))
    assert "access to bucket/pool/pool.json is denied" in one_line(url, quick(proxy(answer=403)))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "AWS_ACCESS_KEY_ID" in (text := one_line(url, quick(proxy(answer=403))))
    assert "not in the environment" in text
    assert time.monotonic() - began < 18  # not until the deadline


def test_a_missing_shard_is_no_failure(remote, s3):
    from object_store import client

    _, url, store = remote
    pool = Pool.open(url, store=store)
    client(s3).delete_file("bucket/pool/p-000001.tar")
    with pytest.raises(DataError, match=r"p-000001\.tar is not there") as caught:
        Reader(pool, "skip").sample(7)
    assert type(caught.value) is DataError


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://host/pool", "a web server promises neither reads by range"),
        ("http://host/pool", "a web server"),
        ("s3://key:hidden@bucket/pool", "must not carry credentials"),
        ("s3://bucket/pool?access_key=a&secret_key=hidden", "must not carry credentials"),
        ("s3://bucket/pool?colour=red", r"got \?colour="),
        ("s3:///pool", "no bucket"),
        ("nothing://bucket/pool", "such as s3://bucket/pool"),
        ("pipe:cat hidden.tar", "Commands are never run"),
    ],
)
def test_urls_that_are_refused(url, text):
    with pytest.raises(DataError, match=text) as caught:
        Pool.open(url)
    assert "hidden" not in str(caught.value) or "pipe" in url


@pytest.mark.parametrize("endpoint", ["host:9000", "http://key:word@host", "http://host/bucket", "s3://host"])
def test_an_endpoint_is_a_plain_server(endpoint):
    with pytest.raises(ValueError, match=r"http\(s\)://HOST"):
        StoreConfig(endpoint=endpoint)
