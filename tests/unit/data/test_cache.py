"""The shard cache: its limit holds at every moment, whoever dies, and nothing in it is believed unseen."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from raysemi.data.cache import Download, ShardCache
from raysemi.data.pool import Shard
from raysemi.errors import DataError

SIZE = 1000
HOLDER = """
import sys, time
from raysemi.data.cache import ShardCache
from raysemi.data.pool import Shard
folder, limit, name, sha256, half = sys.argv[1:]
content = (name * 1000)[:1000].encode()
download = ShardCache(folder, int(limit)).ask("s3://b/p/" + name, Shard(name, 1, 1000, sha256))
download.write(content[:500] if half == "half" else content)
if half != "half":
    download.publish()
print("ready", flush=True)
time.sleep(60)
"""


def content(name):
    return (name * SIZE)[:SIZE].encode()


def shard(name):
    return Shard(name, 1, SIZE, hashlib.sha256(content(name)).hexdigest())


def ask(cache, name):
    return cache.ask(f"s3://b/p/{name}", shard(name))


def fill(cache, name):
    """A leased descriptor of the shard, which is written if it is not there; None when there is no room."""
    found = ask(cache, name)
    if isinstance(found, Download):
        with found:
            for start in range(0, SIZE, 300):
                found.write(content(name)[start : start + 300])
            return found.publish()
    return found


def size(folder):
    total = 0
    for file in os.scandir(folder):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def holder(folder, limit, name, what):
    """Another process that holds the shard, half written or leased."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(limit), name, shard(name).sha256, what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_shard_is_written_once_and_read_by_its_lease(tmp_path):
    cache = ShardCache(tmp_path / "new" / "folder", 5 * SIZE)
    file = fill(cache, "a")
    assert os.pread(file, SIZE, 0) == content("a")
    again = ask(cache, "a")
    assert isinstance(again, int)
    os.close(file)
    os.close(again)
    other = cache.ask("s3://another/p/a", shard("a"))  # the same bytes by another address are another's
    assert isinstance(other, Download)
    other.drop()
    assert size(cache.folder) == SIZE


def test_the_least_recently_used_goes_and_a_leased_one_never(tmp_path):
    cache = ShardCache(tmp_path, 3 * SIZE)
    leases = {name: fill(cache, name) for name in "abc"}
    assert ask(cache, "d") is None  # all are in use
    for name in "bc":
        os.close(leases.pop(name))
    os.close(ask(cache, "b"))  # used again: c is now the oldest that nobody reads
    os.close(fill(cache, "d"))
    there = [name for name in "abd" if isinstance(found := ask(cache, name), int) and os.close(found) is None]
    assert there == ["a", "b", "d"]
    os.close(leases["a"])


def test_nothing_goes_when_it_would_not_be_enough(tmp_path):
    cache = ShardCache(tmp_path, 3 * SIZE)
    kept = [fill(cache, name) for name in "ab"]
    os.close(fill(cache, "c"))
    large = Shard("large", 1, 2 * SIZE, "0" * 64)
    assert cache.ask("s3://b/p/large", large) is None
    assert size(tmp_path) == 3 * SIZE
    for file in kept:
        os.close(file)


def test_the_limit_holds_at_every_moment(tmp_path):
    """A watcher looks while threads, as several processes would, fill, read and give back more than has room."""
    limit, seen, stop = 4 * SIZE, [], threading.Event()

    def watch():
        while not stop.is_set():
            seen.append(size(tmp_path))

    def work(seed):
        cache, draws, got = ShardCache(tmp_path, limit), random.Random(seed), 0
        for _ in range(60):
            file = fill(cache, name := draws.choice("abcdefghij"))
            if file is not None:
                assert os.pread(file, SIZE, 0) == content(name)
                got += 1
                os.close(file)
        return got

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as threads:
        assert min(threads.map(work, range(4))) > 10
    stop.set()
    watcher.join()
    assert max(seen) <= limit
    assert max(seen) > limit - 2 * SIZE


def test_kill_9_in_the_middle_leaves_nothing_that_stays(tmp_path):
    other = holder(tmp_path, 2 * SIZE, "a", "half")
    cache = ShardCache(tmp_path, 2 * SIZE)
    assert len(list(tmp_path.glob("*.part"))) == 1
    assert size(tmp_path) == SIZE  # its whole length is reserved
    assert ask(cache, "a") is None  # it is on its way: not a second time
    kill(other)
    os.close(fill(cache, "a"))
    assert not list(tmp_path.glob("*.part"))
    assert size(tmp_path) == SIZE


def test_a_stale_part_is_cleared_by_whoever_begins(tmp_path):
    kill(holder(tmp_path, 2 * SIZE, "a", "half"))
    assert len(list(tmp_path.glob("*.part"))) == 1
    ShardCache(tmp_path, 2 * SIZE)
    assert size(tmp_path) == 0


def test_what_another_process_reads_is_not_evicted_until_it_ends(tmp_path):
    other = holder(tmp_path, SIZE, "a", "leased")
    cache = ShardCache(tmp_path, SIZE)
    found = ask(cache, "a")
    assert isinstance(found, int)  # both read it
    os.close(found)
    assert ask(cache, "b") is None
    kill(other)
    os.close(fill(cache, "b"))
    assert size(tmp_path) == SIZE


@pytest.mark.parametrize("harm", ["cut", "longer", "flipped"])
def test_a_changed_file_is_not_believed(tmp_path, harm):
    cache = ShardCache(tmp_path, 5 * SIZE)
    os.close(fill(cache, "a"))
    (file,) = tmp_path.glob("*.tar")
    if harm == "cut":
        os.truncate(file, SIZE - 1)
    else:
        with file.open("r+b") as out:
            out.seek(SIZE if harm == "longer" else 7)
            out.write(b"!")
    found = ask(cache, "a")
    assert isinstance(found, Download)
    found.drop()
    assert size(tmp_path) == 0


def test_other_bytes_than_promised_never_appear(tmp_path):
    cache = ShardCache(tmp_path, 5 * SIZE)

    def bring(payload):
        with ask(cache, "a") as download:
            download.write(payload)
            download.publish()

    for payload in (content("b"), content("a")[:-1], content("a") + b"a"):
        with pytest.raises(DataError, match="shard a must hold the 1000 bytes"):
            bring(payload)
        assert size(tmp_path) == 0


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"data\.store\.cache must be a folder on a local disk"):
        ShardCache(tmp_path / "file", SIZE)
