"""A training run whose pools lie in an object store behind a server that fails, is slow and dies."""

from __future__ import annotations

import pytest
import torch
from makers import tiny_run
from object_store import upload

from raysemi.engine import checkpoint
from raysemi.engine.folder import RunFolder
from raysemi.errors import ConfigError, DataFailure
from raysemi.launch.restore import open_pools
from raysemi.launch.worker import run

SETTINGS = ("train.steps=8", "method.threshold=0.2", "eval.every=4")


@pytest.fixture
def remote(scenes, s3, tmp_path):
    """remote(name, endpoint, ...) -> a run on the pools in the store."""
    upload(scenes, s3, "bucket/scenes")

    def make(name, endpoint, *more):
        pools = [f"data.{pool}=s3://bucket/scenes/{pool}" for pool in ("labeled", "unlabeled", "val")]
        store = [f"data.store.endpoint={endpoint}", "data.store.region=us-east-1"]
        return tiny_run(scenes, tmp_path / name, "fixmatch", *SETTINGS, *pools, *store, *more)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_run_through_a_faulty_store_ends_with_the_weights_of_a_local_one(scenes, remote, proxy, tmp_path, cached):
    local = tiny_run(scenes, tmp_path / "local", "fixmatch", *SETTINGS)
    result = run(local)
    bad = proxy(fails=0.05, slow=0.05, delay=0.4)
    bad.pause_after = 30
    cache = [f"data.store.cache={tmp_path / 'cache'}"] if cached else []
    run(remote("far", bad.endpoint, *cache, "train.stop_at=5"))
    far = run(remote("far", bad.endpoint, "data.store.deadline=60"))  # how it is read may change on the way
    bad.died.join()
    assert bad.failed
    assert bad.late
    one, other = (checkpoint.load_newest(RunFolder(tmp_path / name)) for name in ("local", "far"))
    assert (one.step, one.tensors.keys()) == (other.step, other.tensors.keys())
    for stem, tensors in one.tensors.items():
        for name, value in tensors.items():
            assert torch.equal(value, other.tensors[stem][name]), f"{stem}/{name}"
    assert far["iou"] == result["iou"]


def test_a_store_that_does_not_answer_is_a_failure_of_one_line_before_the_run(remote, proxy):
    gone = proxy()
    gone.down()
    with pytest.raises(DataFailure, match=r"data\.labeled: s3://bucket/scenes/labeled/pool\.json must be readable"):
        open_pools(remote("gone", gone.endpoint, "data.store.deadline=1"))


def test_a_cache_too_small_is_refused_before_the_run(remote, s3, tmp_path):
    pools = open_pools(remote("sizes", f"http://{s3}"))
    limit = max(pool.num_bytes for pool in (pools.labeled, pools.val, pools.unlabeled))
    config = remote("small", f"http://{s3}", f"data.store.cache={tmp_path / 'c'}", f"data.store.cache_bytes={limit}")
    with pytest.raises(ConfigError, match=r"data\.store\.cache_bytes must hold .* Raise it, pack smaller shards"):
        open_pools(config)
    assert not (tmp_path / "c").exists()
