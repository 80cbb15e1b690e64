"""Corrupt samples on two ranks: counted once for the run, known to both, limited for both at the same step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forks import ranks
from makers import tiny_run

from raysemi.config import RunConfig
from raysemi.data.pool import Pool
from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import DataError
from raysemi.launch import worker
from raysemi.report.page import build_report

SETTINGS = ["train.batch.unlabeled=4", "model.batch_norm=frozen", "train.log_every=2", "data.on_corrupt=skip"]


def rank(number: int, folder: Path, config: RunConfig) -> None:
    steps = []
    try:
        worker.run(config, lambda step, _: steps.append(step))
        said = ""
    except DataError as error:
        said = str(error)
    (folder / f"said-{number}.json").write_text(json.dumps([said, steps]), encoding="utf-8")


def run(folder: Path, config: RunConfig) -> list[tuple[str, list[int]]]:
    """What each rank said at its end, and the steps at which it has logged."""
    assert ranks(2, folder, rank, folder, config) == [0, 0]
    said = [json.loads((folder / f"said-{number}.json").read_text()) for number in range(2)]
    return [(text, steps) for text, steps in said]


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The pools with four unlabeled images damaged, and their keys."""
    pools = tmp_path / "pools"
    shutil.copytree(scenes, pools)
    pool = Pool.open(pools / "unlabeled")
    keys = []
    for i in (1, 5, 8, 14):
        row = pool.row(i)
        keys.append(row.key)
        path = pools / "unlabeled" / row.shard
        content = bytearray(path.read_bytes())
        content[row.image_offset + row.image_bytes // 2] ^= 4
        path.write_bytes(content)
    return pools, sorted(keys)


def keys_of(folder: Path) -> list[str]:
    return [row["key"] for row in json.loads((folder / "skipped.json").read_text())]


def test_both_ranks_know_what_either_has_skipped(damaged, tmp_path):
    """Stopped on two ranks, continued on one: four steps are a pass over the 16 images."""
    pools, keys = damaged
    settings = [*SETTINGS, "train.steps=8"]
    said = run(tmp_path, tiny_run(pools, tmp_path / "run", "fixmatch", *settings, "train.stop_at=4"))
    assert [text for text, _ in said] == ["", ""]
    assert keys_of(tmp_path / "run") == keys
    saved = checkpoint.load_newest(RunFolder(tmp_path / "run"))
    assert [row["key"] for row in saved.state["skipped"]] == keys
    worker.run(tiny_run(pools, tmp_path / "run", "fixmatch", *settings))
    assert keys_of(tmp_path / "run") == keys  # once each, in both passes
    page = build_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "4 skipped" in page
    for key in keys:
        assert f'<td class="left">{key}</td>' in page
    assert "image must have the bytes that were packed" in page


def test_the_budget_is_one_for_all_ranks(damaged, tmp_path):
    """Each rank alone stays below the limit; together they pass it, and both stop at the same log line."""
    pools, keys = damaged
    settings = [*SETTINGS, "train.steps=8", "data.corrupt_limit=3"]
    said = run(tmp_path, tiny_run(pools, tmp_path / "run", "fixmatch", *settings))
    assert said[0] == said[1]
    text, steps = said[0]
    assert "at most 3 corrupt samples; got 4" in text
    assert all(f"key {key}" in text for key in keys)
    assert steps in ([], [2])
    assert keys_of(tmp_path / "run") == keys


def test_skips_of_before_a_stop_count(damaged, tmp_path):
    pools, keys = damaged
    settings = [*SETTINGS, "train.steps=8"]
    worker.run(tiny_run(pools, tmp_path / "run", "fixmatch", *settings, "train.stop_at=4"))
    with pytest.raises(DataError, match="at most 3 corrupt samples; got 4"):
        worker.run(tiny_run(pools, tmp_path / "run", "fixmatch", *settings, "data.corrupt_limit=3"))
    assert keys_of(tmp_path / "run") == keys
