"""Images a second of the stream on one core, beside decoding the same images alone; one JSON line.

Drawn scenes, 128 px, crop 96, no loader processes. Ratios of one run compare; absolute numbers depend on the machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from raysemi.data.loader import DataConfig, Stream
from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.reader import Reader
from raysemi.data.sources.scenes import Scenes

IMAGES, BATCH, PAIRS = 128, 8, 15


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pack(Scenes(train=IMAGES + 8, val=1), folder, split=8, pools=("labeled", "unlabeled"), processes=1)
        pools = {name: Pool.open(Path(folder) / name) for name in ("labeled", "unlabeled")}
        reader = Reader(pools["unlabeled"])
        config = DataConfig(crop=96, loader_processes=0)
        made, floor = [], []
        for pair in range(PAIRS):
            steps = range(pair, pair + IMAGES // BATCH)
            stream = Stream(config, pools, 0, 1, BATCH, 0, 1, 1, False, steps.start, steps.stop)
            start = time.perf_counter()
            count = sum(len(host.keys_U) + len(host.keys_L) for host in stream)
            middle = time.perf_counter()
            for row in range(count):
                reader.image(row % IMAGES)
            end = time.perf_counter()
            made.append(count / (middle - start))
            floor.append(count / (end - middle))
    print(json.dumps({
        "bench": "stream", "images_per_s": round(statistics.median(made), 1),
        "decode_images_per_s": round(statistics.median(floor), 1),
        "ratio_to_decoding": round(statistics.median(m / f for m, f in zip(made, floor, strict=True)), 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
