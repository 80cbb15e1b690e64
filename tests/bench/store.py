"""What reading ahead is worth: a pool of 32,768 images of 8 KB behind a server that answers after 30 ms, on loopback.

Run: PYTHONPATH=tests python tests/bench/store.py
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from object_store import CREDENTIALS, Proxy, client, moto_server

from raysemi.data.ahead import Ahead
from raysemi.data.order import Order
from raysemi.data.pool import Pool, Shard
from raysemi.data.rows import INDEX_SCHEMA
from raysemi.data.store import StoreConfig
from raysemi.data.write_pool import write_index

SPACE, ROWS, SHARDS, BATCH, STEPS = 8192, 512, 64, 16, 400


def fill(address: str) -> None:
    store = client(address)
    store.create_dir("raw")
    blob = np.random.default_rng(0).bytes(ROWS * SPACE)
    sha256 = hashlib.sha256(blob).hexdigest()
    rows, shards = [], []
    for number in range(SHARDS):
        name = f"p-{number}.tar"
        with store.open_output_stream(f"raw/p/{name}") as out:
            out.write(blob)
        shards.append(Shard(name, ROWS, len(blob), sha256))
        place = {"shard": name, "image_bytes": SPACE - 512, "height": 1, "width": 1}
        nothing = dict.fromkeys(INDEX_SCHEMA.names)
        rows += [nothing | place | {"key": f"{number}/{i}", "image_offset": i * SPACE + 512} for i in range(ROWS)]
    write_index(store, "raw/p", rows=rows, shards=shards, classes=["a"], palette=[(0, 0, 0)])


def measure(proxy: Proxy, name: str, steps: int, merged: bool = True, cache: str | None = None) -> None:
    pool = Pool.open("s3://raw/p", store=StoreConfig(endpoint=proxy.endpoint, region="us-east-1", cache=cache))
    table = Order(pool.shard_rows, pool.digest, 7, BATCH).table(1000, 1000 + steps)[0].tolist()
    pool.row(0)  # the index is not what is measured
    before, began = len(proxy.requests), time.perf_counter()
    if merged:
        ahead = Ahead(pool, table, False, 2**26)
        for _ in table:
            ahead.take()
    else:
        files = {shard: pool.open_shard(shard) for shard in pool.shards}
        began = time.perf_counter()
        for row in (pool.row(i) for rows in table for i in rows):
            files[row.shard].read_at(row.image_bytes, row.image_offset)
    seconds, images = time.perf_counter() - began, steps * BATCH
    reads = sum(one.method == "GET" for one in proxy.requests[before:])
    print(f"{name:20s} {images / seconds:7.0f} images/s, {reads} reads for {images} images", flush=True)


def main() -> None:
    os.environ.update(CREDENTIALS)
    folder = Path(tempfile.mkdtemp())
    with moto_server(folder / "log.txt") as address:
        fill(address)
        proxy = Proxy(address, wait=0.03)
        measure(proxy, "one read an image", 10, merged=False)
        measure(proxy, "read ahead", STEPS)
        cache = str(folder / "cache")
        measure(proxy, "cache, first run", STEPS, cache=cache)
        measure(proxy, "cache, second run", STEPS, cache=cache)
        proxy.down()


if __name__ == "__main__":
    main()
