"""Indexes in memory: read once by the runs of a process and their loader processes, and never another pool's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from raysemi.data import kept
from raysemi.data.kept import keep_indexes
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.pack import pack
from raysemi.data.pool import INDEX_FILE, Pool
from raysemi.data.sources.scenes import Scenes
from raysemi.errors import DataError


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_kept", {})


@pytest.fixture
def folder(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes / "labeled", tmp_path / "labeled"))


def keys(pool: Pool) -> list[str]:
    return [pool.key(i) for i in range(pool.num_samples)]


@pytest.mark.parametrize("processes", [0, 1])
def test_a_second_run_reads_no_index(folder: Path, processes: int) -> None:
    def images() -> torch.Tensor:
        config = DataConfig(labeled=str(folder), crop=33, loader_processes=processes)
        pools = {"labeled": Pool.open(folder)}
        stream = Stream(config, pools, 3, 2, 0, 0, 1, strong_views=0, second_view=False, start=0, stop=2)
        return torch.cat([batch.image_L3HW for batch in stream])

    before = images()
    with keep_indexes():
        first = images()
    (folder / INDEX_FILE).unlink()
    with keep_indexes():
        assert torch.equal(images(), first)
    assert torch.equal(first, before)
    with pytest.raises(DataError, match="must be a readable index"):
        images()


def test_a_pool_that_was_packed_again_has_its_own_index(tmp_path: Path) -> None:
    found = []
    for size in (48, 64):
        shutil.rmtree(tmp_path / "val", ignore_errors=True)
        pack(Scenes(train=5, val=2, size=size), tmp_path, split=3, processes=1, pools=["val"])
        with keep_indexes():
            found.append(Pool.open(tmp_path / "val").row(1).height)
    assert found == [48, 64]


def test_a_broken_index_is_told_and_not_kept(folder: Path) -> None:
    whole = (folder / INDEX_FILE).read_bytes()
    (folder / INDEX_FILE).write_bytes(whole[:-9])
    with keep_indexes():
        with pytest.raises(DataError, match="must be"):
            Pool.open(folder).key(0)
        (folder / INDEX_FILE).write_bytes(whole)
        assert len(keys(Pool.open(folder))) == 8


def test_what_there_is_no_room_for_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "LARGEST", (folder / INDEX_FILE).stat().st_size - 1)
    with keep_indexes():
        assert keys(Pool.open(folder))
        (folder / INDEX_FILE).unlink()
        with pytest.raises(DataError, match="must be a readable index"):
            keys(Pool.open(folder))
