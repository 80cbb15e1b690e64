"""Pools that many tests read: drawn once a session, small."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from raysemi.data.pack import pack
from raysemi.data.sources.scenes import Scenes

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYSEMI_COMPILE_BACKEND", "aot_eager")  # train.compile without minutes of a C++ compiler
# Ignored in a script's background job, for its children too: tests of Ctrl-C want a terminal's default.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tests run beside each other on few cores; more threads only wait for one another


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the pools labeled (8), unlabeled (16, masks kept) and val (5) of drawn scenes, 64 px."""
    out = tmp_path_factory.mktemp("scenes")
    source = Scenes(train=24, val=5, size=64)
    pack(source, out, split=8, processes=1, keep_unlabeled_masks=True, shard_samples=6)
    return out
