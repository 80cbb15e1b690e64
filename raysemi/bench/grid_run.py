"""One run of a grid, in a process of its own: `python -m raysemi.bench.grid_run FOLDER METHOD WEIGHTING GRADIENTS SEED
PARENT < config.yaml`. Started by `bench.grid`; it trains as `raysemi train` does and notes how that ended.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

from raysemi import config_io
from raysemi.bench.grid import Cell, GridRun
from raysemi.bench.step import passes_of_a_step
from raysemi.config import RunConfig
from raysemi.engine import distributed, memory
from raysemi.errors import RaysemiError
from raysemi.launch.logs import log_to_stderr
from raysemi.launch.terminal import TrainingProgress
from raysemi.launch.train import launch


def train(run: GridRun, config: RunConfig, parent: int) -> None:
    """Trains until the end, and notes it.

    Args:
        run: where to note it.
        config: its settings.
        parent: process whose end stops the run, with a checkpoint: nobody else would know that it still trains.
    """
    begun = run.steps
    device = distributed.local_device()
    try:
        with TrainingProgress(config.train.steps) as progress:

            def on_log(step: int, metrics: dict[str, float]) -> None:
                progress(step, metrics)
                if os.getppid() != parent:
                    signal.raise_signal(signal.SIGINT)

            launch(config, on_log)
    finally:
        if begun < config.train.steps:  # otherwise no step was taken, and this is no training's memory
            # a run in several parts took what its largest part took
            largest = max(memory.peak_bytes(device), run.record.get("peak_bytes", 0))
            run.note(peak_bytes=largest, memory="CUDA's allocator" if device.type == "cuda" else "resident memory")
    run.note(state="done", reason=None, passes=[one.as_json() for one in passes_of_a_step(config)])


def main(arguments: list[str]) -> int:
    """Reads the config on stdin; returns the exit code."""
    folder, method, weighting, gradients, seed, parent = arguments
    run = GridRun(Cell(method, weighting, gradients), int(seed), Path(folder))
    log_to_stderr()
    try:
        train(run, config_io.parse(sys.stdin.read()), int(parent))
    except KeyboardInterrupt:
        run.note(state="stopped", reason=None)
        return 130
    except Exception as error:
        own = isinstance(error, RaysemiError)
        if not own:
            traceback.print_exc()
        reason = " ".join((str(error) if own else f"{type(error).__name__}: {error}").split())
        print(f"error: {reason}", file=sys.stderr)
        run.note(state="failed", reason=reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
