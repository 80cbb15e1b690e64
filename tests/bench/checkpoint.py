"""How long a checkpoint stops training, against a step of the same training; one JSON line.

DeepLabV3+ on ResNet-101 (59.5 million parameters with 21 classes), its average, SGD with momentum: 0.7 GB of state. The
seconds are those of the training thread's own work, with those on the clock beside them.

python tests/bench/checkpoint.py [STEPS]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time

from raysemi.bench.step import StepBench, StepSettings
from raysemi.engine.folder import RunFolder
from raysemi.engine.saver import Saver
from raysemi.methods.base import SingleRank


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    bench = StepBench(StepSettings("fixmatch", "resnet101", crop=321, batch=2).config(), threads=1)
    state = bench.trainer.snapshot().tensors.values()
    size = sum(value.nbytes for tensors in state for value in tensors.values())
    bench.step(0)
    work: dict[str, list[float]] = {"step": [], "save": []}
    clock: dict[str, list[float]] = {"step": [], "save": [], "written": []}
    with tempfile.TemporaryDirectory() as folder, Saver(RunFolder(folder), SingleRank(), bench.device, 1) as saver:
        for number in range(rounds):
            for name, act in (("step", bench.step), ("save", lambda _: saver.save(bench.trainer.snapshot()))):
                bench.trainer.step = number + 1
                began, own = time.perf_counter(), time.thread_time()
                act(number)
                work[name].append(time.thread_time() - own)
                clock[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.wait()
            clock["written"].append(time.perf_counter() - began)
    medians = {f"{name}_s": round(statistics.median(values), 3) for name, values in work.items()}
    on_clock = {f"{name}_clock_s": round(statistics.median(values), 3) for name, values in clock.items()}
    ratio = statistics.median(save / step for save, step in zip(work["save"], work["step"], strict=True))
    about = {"bench": "checkpoint", "rounds": rounds, "state_bytes": size, **medians, **on_clock}
    print(json.dumps(about | {"ratio": round(ratio, 4)}))


if __name__ == "__main__":
    main()
