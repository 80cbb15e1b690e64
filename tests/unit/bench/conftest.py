"""Pools that are measured."""

from __future__ import annotations

import pytest

from raysemi.data.pack import pack
from raysemi.data.pool import Pool
from raysemi.data.sources.scenes import Scenes


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 scenes in three shards each: `labeled`, and `unlabeled` without masks."""
    folder = tmp_path_factory.mktemp("pools")
    pack(
        Scenes(train=48, val=1, size=40), folder, split=24, pools=("labeled", "unlabeled"), shard_samples=8, processes=1
    )
    return folder


@pytest.fixture
def pool(folder):
    return Pool.open(folder / "labeled")
