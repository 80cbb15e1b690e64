"""The plan of a pool of 100 million samples: time to be ready, time of step 1,000,000, memory; one JSON line."""

from __future__ import annotations

import json
import time
import tracemalloc

import numpy as np

from raysemi.data.order import Order


def main() -> None:
    shard_rows = np.full(100_000, 1000, dtype=np.int64)
    start = time.perf_counter()
    order = Order(shard_rows, "digest", 0, 64)
    ready = time.perf_counter()
    order.step(1_000_000)
    first = time.perf_counter()
    order.step(1_000_001)
    second = time.perf_counter()
    tracemalloc.start()
    Order(shard_rows, "digest", 1, 64).step(1_000_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    print(json.dumps({
        "bench": "order", "samples": int(shard_rows.sum()), "ready_s": round(ready - start, 4),
        "step_1000000_s": round(first - ready, 4), "next_step_s": round(second - first, 5), "peak_bytes": peak_bytes,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
