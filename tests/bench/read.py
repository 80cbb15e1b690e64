"""One pass of the stream over a pool, by several ranks at once, each a process; one JSON line.

    python tests/bench/read.py POOL [--ranks 2] [--batch 64] [--crop 64]

Every image is decoded and every view made. Ends with an error unless the ranks together met each sample once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch

from raysemi.data.loader import DataConfig, Stream
from raysemi.data.pool import Pool


def digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def read(rank: int, path: str, ranks: int, batch: int, crop: int) -> tuple[np.ndarray, int, float]:
    """Digests of the keys that a rank meets in whole steps of one pass, its peak memory in bytes, and its seconds."""
    torch.set_num_threads(1)
    pool = Pool.open(path)
    config = DataConfig(crop=crop, loader_processes=0)
    steps = -(-pool.num_samples // batch)
    start = time.perf_counter()
    stream = Stream(config, {"unlabeled": pool}, 0, 0, batch, rank, ranks, 1, False, 0, steps)
    found = [digest(key) for step in stream for key in step.keys_U]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return np.array(found, dtype=np.uint64), peak, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pool")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--crop", type=int, default=64)
    given = parser.parse_args()
    pool = Pool.open(given.pool)
    work = partial(read, path=given.pool, ranks=given.ranks, batch=given.batch, crop=given.crop)
    with ProcessPoolExecutor(given.ranks, mp_context=get_context("spawn")) as executor:
        results = list(executor.map(work, range(given.ranks)))
    # each rank has its slots of every step; the last step goes on into the next pass
    share = given.batch // given.ranks
    whole = np.concatenate([found.reshape(-1, share) for found, _, _ in results], axis=1).reshape(-1)
    first = whole[: pool.num_samples]
    assert len(np.unique(first)) == pool.num_samples, "each sample once"
    seconds = max(seconds for _, _, seconds in results)
    print(json.dumps({
        "bench": "read", "samples": pool.num_samples, "bytes": pool.num_bytes, "ranks": given.ranks,
        "seconds": round(seconds, 1), "images_per_s": round(len(whole) / seconds, 1),
        "peak_bytes_per_rank": max(peak for _, peak, _ in results),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
