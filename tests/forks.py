"""Processes forked from one interpreter that has imported everything: a rank starts in no time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

FORKS = multiprocessing.get_context("forkserver")
PRELOAD = [
    "raysemi.cli", "raysemi.launch.train", "raysemi.launch.worker", "raysemi.data.shard", "timm", "webdataset",
    "deepspeed",
]  # fmt: skip


def start() -> None:
    """Starts the interpreter unless it runs. A process has one, which keeps what its first user asked it to import."""
    FORKS.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported: else it looks for a GPU
        forkserver.ensure_running()


def _rank(number: int, world: int, store: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=number, world_size=world)
    work(number, *arguments)
    torch.distributed.destroy_process_group()


def ranks(world: int, folder: Path, work: Callable[..., None], *arguments: Any, within: float = 240.0) -> list[int]:
    """Runs `work(rank, *arguments)` as ranks of a gloo group; their exit codes."""
    start()
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    processes = [FORKS.Process(target=_rank, args=(number, world, store, work, arguments)) for number in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(within)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
