"""A pool of 100 million samples, without its images: what a process needs to stand at step 1,000,000; one JSON line.

`pool.json` and a real `index.parquet` (0.5 GB) are written to a scratch folder first, or to --folder, where they stay
and are used again. Then fresh processes, as the only rank and as one of 8, open the pool and look up a step's samples.
"Ready" is the open pool, the footer of the index and the order; memory is the peak beyond the imports. Seconds are
of the clock, and `cpu` of the processor, which another process on the same core does not lengthen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.random
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from raysemi.data.order import Order
from raysemi.data.pool import Pool, Shard
from raysemi.data.rows import INDEX_SCHEMA, ROWS_A_GROUP
from raysemi.data.write_pool import write_index_groups

BATCH, STEP, MORE = 64, 1_000_000, 200


def groups(shards: list[Shard], at_most: int) -> Iterator[pa.Table]:
    """Row groups of whole shards, each sample with a size, an offset and a key of its own."""
    rng = numpy.random.Generator(numpy.random.Philox(key=0))
    first = 0
    together = max(at_most // shards[0].samples, 1)
    for start in range(0, len(shards), together):
        part = shards[start : start + together]
        counts = np.array([shard.samples for shard in part])
        rows = int(counts.sum())
        image_bytes = rng.integers(20_000, 300_000, rows)
        ends = np.cumsum((image_bytes + 1535) // 512 * 512)  # a header and whole blocks each, as in a tar
        shard = np.repeat(np.arange(len(part), dtype=np.int32), counts)
        before = np.concatenate(([0], ends))[np.concatenate(([0], np.cumsum(counts)[:-1]))]
        number = pa.array(np.arange(first, first + rows)).cast(pa.string())
        columns = {
            "key": pc.binary_join_element_wise("web/part/", pc.utf8_lpad(number, 12, "0"), ""),
            "shard": pa.DictionaryArray.from_arrays(shard, [one.name for one in part]),
            "image_offset": ends - (image_bytes + 511) // 512 * 512 - before[shard],
            "image_bytes": image_bytes,
            "mask_offset": pa.nulls(rows, pa.int64()),
            "mask_bytes": pa.nulls(rows, pa.int64()),
            "height": rng.choice([480, 427, 375, 640, 500], rows).astype(np.int32),
            "width": rng.choice([640, 500, 480, 333], rows).astype(np.int32),
            "image_crc32": pa.array(rng.integers(0, 1 << 32, rows), pa.uint32()),
            "mask_crc32": pa.nulls(rows, pa.uint32()),
            "class_pixels": pa.nulls(rows, pa.list_(pa.int64())),
        }
        yield pa.table(columns, schema=INDEX_SCHEMA)
        first += rows


def write(folder: str, samples: int, shard_samples: int, at_most: int) -> None:
    sizes = [min(shard_samples, samples - first) for first in range(0, samples, shard_samples)]
    shards = [
        Shard(f"unlabeled-{number:06d}.tar", size, 161_000 * size, hashlib.sha256(b"%d" % number).hexdigest())
        for number, size in enumerate(sizes)
    ]
    write_index_groups(
        fs.LocalFileSystem(), folder, groups=groups(shards, at_most), shards=shards, classes=["one"],
        palette=[(0, 0, 0)], made={"source": "drawn for a measurement"},
    )  # fmt: skip


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def read() -> tuple[int, int]:
    """Bytes and calls of reading, of this process so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["syscr"])


def measure(folder: str, rank: int, world: int) -> dict[str, float]:
    imports = memory("VmRSS")
    start, start_cpu = time.perf_counter(), time.process_time()
    pool = Pool.open(folder)
    opened = time.perf_counter()
    pool.open_index()
    index = time.perf_counter()
    order = Order(pool.shard_rows, pool.digest, 0, BATCH)
    ready, ready_cpu = time.perf_counter(), time.process_time()
    plan, lo, hi = memory("VmHWM"), rank * BATCH // world, (rank + 1) * BATCH // world
    bytes_before, calls_before = read()
    before, before_cpu = time.perf_counter(), time.process_time()
    taken, _ = order.slots(STEP, lo, hi)
    ordered = time.perf_counter()
    rows = [pool.row(int(i)) for i in taken]
    done, done_cpu = time.perf_counter(), time.process_time()
    bytes_after, calls_after = read()
    assert [row.key for row in rows] == [f"web/part/{i:012d}" for i in taken]
    first = memory("VmHWM")
    more = time.perf_counter()
    for step in range(STEP + 1, STEP + 1 + MORE):
        for i in order.slots(step, lo, hi)[0]:
            pool.row(int(i))
    end = time.perf_counter()
    return {
        "ranks": world, "ready_s": round(ready - start, 3), "ready_cpu_s": round(ready_cpu - start_cpu, 3),
        "pool_json_s": round(opened - start, 3),
        "footer_s": round(index - opened, 3), "ready_bytes": plan - imports,
        "first_step_s": round(done - before, 3), "first_step_cpu_s": round(done_cpu - before_cpu, 3),
        "of_that_order_s": round(ordered - before, 3), "slots": hi - lo,
        "shards_read": len({row.shard for row in rows}), "reads": calls_after - calls_before,
        "read_bytes": bytes_after - bytes_before, "first_step_bytes": first - imports,
        "next_step_s": round((end - more) / MORE, 5), "bytes_after_more_steps": memory("VmHWM") - imports,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--shard-samples", type=int, default=3000)
    parser.add_argument("--rows-a-group", type=int, default=ROWS_A_GROUP)
    parser.add_argument("--folder", help="keep the pool here; default: a scratch folder")
    parser.add_argument("--measure", nargs=2, type=int, metavar=("RANK", "WORLD"), help="in this process")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.folder, *given.measure)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or scratch)
        start = time.perf_counter()
        if not (folder / "pool.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write(str(folder), given.samples, given.shard_samples, given.rows_a_group)
        written = time.perf_counter()
        command = [sys.executable, __file__, "--folder", str(folder), "--measure"]
        found = [
            json.loads(subprocess.run([*command, *rank], check=True, stdout=subprocess.PIPE).stdout)
            for rank in (["0", "1"], ["3", "8"])
        ]
        print(json.dumps({
            "bench": "scale", "samples": given.samples, "shards": -(-given.samples // given.shard_samples),
            "rows_a_group": given.rows_a_group, "write_s": round(written - start, 1),
            "index_bytes": (folder / "index.parquet").stat().st_size,
            "pool_json_bytes": (folder / "pool.json").stat().st_size, "batch": BATCH, "step": STEP, "measured": found,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
