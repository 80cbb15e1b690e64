"""`raysemi bench data`: what is timed is the same work, and mistakes are told before it begins."""

from __future__ import annotations

import json

import pytest
from makers import call

from raysemi.bench import data
from raysemi.bench.data import DataSettings, measure_data
from raysemi.data.loader import DataConfig, Stream
from raysemi.data.pool import Pool
from raysemi.data.views import draw_geometry, generator
from raysemi.errors import ConfigError

SETTINGS = DataSettings(crop=33, batch=4, images=8, turns=2, rivals=("webdataset", "folder"))


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_it_prints_rates_and_ratios(folder, name):
    path = folder / name
    arguments = ["--crop", 33, "--batch", 4, "--images", 8, "--turns", 2, "--beside", "webdataset,folder"]
    result = call("bench", "data", path, *arguments, "--processes", "0,1", "--json")
    assert result.exit_code == 0, result.output
    for processes, one in enumerate(json.loads(result.stdout)):
        assert (one["processes"], one["labeled"], one["crop"], one["turns"]) == (processes, name == "labeled", 33, 2)
        rates = [one[name] for name in ("images_per_s", "floor_images_per_s", "decode_images_per_s")]
        assert min(rates) > 0
        assert set(one["rivals"]) == {"webdataset", "folder"}
        assert min(min(rival.values()) for rival in one["rivals"].values()) > 0
    table = call("bench", "data", path, "--crop", 33, "--batch", 4, "--images", 8, "--turns", 1)
    assert table.exit_code == 0
    assert "decoding alone" in table.output


def test_the_floor_reads_the_samples_of_the_stream(pool):
    """Of the same turn: the same shards and bytes, and regions of the same views."""
    with data._floor(pool, SETTINGS, True, 0, 1) as batches:
        assert list(batches) == [4] * 3
    with data._stream(pool, SETTINGS, 0, 1) as batches:
        assert list(batches) == [4] * 3
    order = data.order_of(pool, 0, 4)
    stream = Stream(DataConfig(crop=33, loader_processes=0), {"labeled": pool}, 0, 4, 0, 0, 1, 1, False, 3, 6)
    for step, batch in zip(range(3, 6), stream, strict=True):
        rows, passes = order.slots(step, 0, 4)
        assert batch.keys_L == tuple(pool.key(int(row)) for row in rows)
        for row, number in zip(rows, passes, strict=True):
            planned = data._Planned.of(pool, int(row), int(number), 33)
            sample = pool.row(int(row))
            assert (planned.shard, *planned.image) == (sample.shard, sample.image_offset, sample.image_bytes)
            assert planned.mask == (sample.mask_offset, sample.mask_bytes)
            drawn = draw_geometry(
                generator(0, int(number), sample.key, "geometry"), DataConfig().views, sample.height, sample.width, 33
            )
            assert planned.shown == drawn.shown
            top, bottom, left, right = planned.region
            down = sample.height / drawn.resized_height
            assert 0 <= top < bottom <= sample.height
            assert 0 <= left < right <= sample.width
            assert abs(top - drawn.top * down) < 1
            assert abs((bottom - top) - drawn.shown[0] * down) < 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (DataSettings(rivals=("folder",)), "--beside must be left out for a pool smaller than a turn of 272 images"),
        (DataSettings(batch=2, images=2, rivals=("ffcv",)), "--beside must name some of webdataset, folder, litdata"),
    ],
)
def test_mistakes_are_told_at_once(pool, settings, text):
    with pytest.raises(ConfigError, match=text):
        measure_data(pool.path, settings, [0])


def test_a_library_that_is_not_there_is_named(pool, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"got litdata\. Run: pip install litdata"):
        measure_data(pool.path, DataSettings(crop=9, batch=2, images=4, rivals=("litdata",)), [0])


def test_a_pool_elsewhere_is_refused(pool, monkeypatch):
    monkeypatch.setattr(Pool, "local", False)
    with pytest.raises(ConfigError, match="must lie in a folder"):
        measure_data(pool.path, DataSettings(crop=9, batch=2, images=4), [0])
