"""Memory of the stream over many steps: resident bytes of the process and of its loader process; one JSON line.

python tests/bench/memory.py [STEPS]
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from raysemi.data.loader import DataConfig, Stream
from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.sources.scenes import Scenes

LOOKS = 10


def resident() -> list[int]:
    """MB of this process and of each of its children."""
    page = resource.getpagesize()
    children = Path("/proc/self/task").glob("*/children")
    processes = ["self", *(pid for file in children for pid in file.read_text().split())]
    return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page >> 20 for pid in processes]


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    torch.set_num_threads(1)
    found: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pack(Scenes(train=1000, val=1, size=32), folder, split=100, pools=("labeled", "unlabeled"), processes=1)
        pools = {name: Pool.open(Path(folder) / name) for name in ("labeled", "unlabeled")}
        start = time.perf_counter()
        config = DataConfig(crop=32, loader_processes=1)
        for batch in Stream(config, pools, 0, 1, 1, 0, 1, 1, False, 0, steps):
            if (batch.step + 1) % (steps // LOOKS) == 0 or batch.step == 200:
                found[batch.step + 1] = resident()
        seconds = time.perf_counter() - start
    print(json.dumps({"bench": "memory", "steps": steps, "seconds": round(seconds), "megabytes_at": found}))


if __name__ == "__main__":
    main()
