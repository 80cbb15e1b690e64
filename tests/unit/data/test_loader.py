import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import fs

from raysemi.data import loader, steps
from raysemi.data.boxes import SCHEMA, open_boxes, write_boxes
from raysemi.data.loader import DataConfig, Stream, loader_processes
from raysemi.data.order import Order
from raysemi.data.reader import Reader
from raysemi.data.views import draw_geometry, generator
from raysemi.errors import ConfigError, DataError, DataFailure
from raysemi.ops import intensity

SIDE = 24


@pytest.fixture
def pools(tmp_path, make_pool):
    return {"labeled": make_pool(tmp_path / "l", 5), "unlabeled": make_pool(tmp_path / "u", 13, masks=False)}


def stream(
    pools, start=0, stop=4, *, rank=0, world=1, strong=2, second=True, truth=False, batches=(2, 4), family="jitter",
    **settings,
):  # fmt: skip
    config = DataConfig(crop=SIDE, **settings)
    return Stream(config, pools, 7, *batches, rank, world, strong, second, start, stop, truth, strong=family)


def put_boxes(pool):
    """Two boxes an image but for each third, which has none."""
    keys = [pool.key(i) for i in range(pool.num_samples) if i % 3]
    found = [(key, 4 + i, 3, 30, 20 + i, i % 3, 0.5 + i / 20) for i, key in enumerate(keys)]
    found += [(key, 0, 0, 9, 30, 1, 0.99) for key in keys]
    columns = [dict(zip(SCHEMA.names, box, strict=True)) for box in found]
    write_boxes(pool, "a", pa.Table.from_pylist(columns, schema=SCHEMA).to_batches(), {})
    return open_boxes(pool, "a", 0.6)


def assert_same(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def test_shapes_and_ranges(pools):
    (batch,) = stream(pools, 3, 4)
    assert batch.step == 3
    assert batch.image_L3HW.shape == (2, 3, SIDE, SIDE)
    assert batch.label_LHW.shape == (2, SIDE, SIDE)
    assert set(batch.label_LHW.unique().tolist()) <= {0, 1, 255}
    assert batch.weak_U3HW.dtype == torch.uint8
    assert batch.valid_UHW.dtype == torch.bool
    assert batch.boxes_VU4.shape == (2, 4, 4)
    assert batch.photometric_VUP.shape == (2, 4, 10)
    assert not torch.equal(batch.photometric_VUP[0], batch.photometric_VUP[1])
    assert batch.second_weak_U3HW.shape == (4, 3, SIDE, SIDE)
    assert not torch.equal(batch.second_weak_U3HW, batch.weak_U3HW)
    assert batch.second_photometric_UP.shape == (4, 10)
    assert batch.truth_UHW is None


def test_the_method_proposes_the_family_of_strong_views_and_the_setting_decides(pools):
    (plain,) = stream(pools, 3, 4)
    (batch,) = stream(pools, 3, 4, family="intensity")
    assert (plain.strong, batch.strong) == ("jitter", "intensity")
    assert batch.photometric_VUP.shape == (2, 4, len(intensity.PARAMETERS))
    assert batch.second_photometric_UP.shape == (4, len(intensity.PARAMETERS))
    assert not torch.equal(batch.photometric_VUP[0], batch.photometric_VUP[1])
    halves = [next(iter(stream(pools, 3, 4, rank=rank, world=2, family="intensity"))) for rank in range(2)]
    assert torch.equal(torch.cat([half.photometric_VUP for half in halves], dim=1), batch.photometric_VUP)
    assert_same(next(iter(stream(pools, 3, 4, family="intensity", views={"strong": "jitter"}))), plain)
    assert_same(next(iter(stream(pools, 3, 4, views={"strong": "intensity"}))), batch)
    (one,) = stream(pools, 3, 4, family="intensity", views={"operations": 1})
    assert not one.photometric_VUP[..., 2:].any()


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_boxes_come_with_their_images_whatever_the_processes_and_ranks(pools, method, monkeypatch):
    monkeypatch.setattr(loader, "_start_method", lambda pools: method)
    boxes, pool = put_boxes(pools["unlabeled"]), pools["unlabeled"]
    assert stream(pools).__iter__().__next__().found_UN5 is None

    def batches(**rest):
        made = stream(pools, 2, 7, **rest)
        made._steps.boxes = boxes
        return list(made)

    plain = batches(loader_processes=0)
    for one, other in zip(plain, batches(loader_processes=2), strict=True):
        assert_same(one, other)
    halves = [batches(rank=rank, world=2) for rank in range(2)]
    rows = {pool.key(i): i for i in range(pool.num_samples)}
    order, shown = Order(pool.shard_rows, pool.digest, 7, 4), 0
    for number, batch in enumerate(plain):
        assert torch.equal(torch.cat([half[number].found_UN5 for half in halves]), batch.found_UN5)
        _, passes = order.step(2 + number)
        for key, passed, found in zip(batch.keys_U, passes.tolist(), batch.found_UN5, strict=True):
            row = pool.row(rows[key])
            rng = generator(7, passed, key, "geometry")
            geometry = draw_geometry(rng, DataConfig().views, row.height, row.width, SIDE)
            assert torch.equal(found, torch.from_numpy(boxes.view(rows[key], geometry)))
            assert bool((found[:, 4] >= 0).any()) == bool(rows[key] % 3)
            shown += int((found[:, 2] > found[:, 0]).sum())
    assert shown > 5


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_loader_processes_do_not_change_a_bit(pools, method, monkeypatch):
    monkeypatch.setattr(loader, "_start_method", lambda pools: method)
    torch.manual_seed(3)
    plain = list(stream(pools, 2, 9, loader_processes=0))
    shared = list(stream(pools, 2, 9, loader_processes=3))
    assert [batch.step for batch in shared] == list(range(2, 9))
    for one, other in zip(plain, shared, strict=True):
        assert_same(one, other)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))  # the global generator was left alone


def test_any_start_and_any_number_of_ranks_give_the_same_global_batches(pools):
    whole = list(stream(pools, 0, 6))
    assert_same(next(iter(stream(pools, 5, 6))), whole[5])
    halves = [next(iter(stream(pools, 5, 6, rank=rank, world=2))) for rank in range(2)]
    for field in ("image_L3HW", "label_LHW", "slots_L", "weak_U3HW", "valid_UHW", "slots_U", "second_weak_U3HW"):
        assert torch.equal(torch.cat([getattr(half, field) for half in halves]), getattr(whole[5], field))
    assert torch.equal(torch.cat([half.boxes_VU4 for half in halves], dim=1), whole[5].boxes_VU4)
    assert torch.equal(torch.cat([half.photometric_VUP for half in halves], dim=1), whole[5].photometric_VUP)
    assert halves[1].slots_U.tolist() == [2, 3]
    assert halves[0].keys_U + halves[1].keys_U == whole[5].keys_U


def test_keys_follow_the_order_and_views_change_with_the_pass(pools):
    order = Order(pools["labeled"].shard_rows, pools["labeled"].digest, 7, 2)
    batches = list(stream(pools, 0, 5))  # two passes of 5 labeled samples
    for t, batch in enumerate(batches):
        assert batch.keys_L == tuple(pools["labeled"].key(i) for i in order.step(t)[0])
    views = [(key, image) for batch in batches for key, image in zip(batch.keys_L, batch.image_L3HW, strict=True)]
    for key in {key for key, _ in views}:
        first, second = (image for name, image in views if name == key)
        assert not torch.equal(first, second)


def test_the_views_are_those_of_the_sample(pools):
    config = {"views": {"scale": (1, 1), "flip": 0}}
    for batch in stream(pools, 0, 3, **config):
        for key, image, label in zip(batch.keys_L, batch.image_L3HW, batch.label_LHW, strict=True):
            i = int(key[-3:])
            source, mask = Reader(pools["labeled"]).image(i), Reader(pools["labeled"]).mask(i)
            windows = np.lib.stride_tricks.sliding_window_view(mask, (SIDE, SIDE))
            places = np.argwhere((windows == label.numpy()).all(axis=(2, 3)))
            assert len(places) == 1
            top, left = places[0]
            assert np.array_equal(source[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1), image.numpy())


def test_labeled_only(pools):
    plain = list(stream(pools, 0, 3))
    for batch, other in zip(stream({"labeled": pools["labeled"]}, 0, 3), plain, strict=True):
        assert batch.weak_U3HW.shape == (0, 3, SIDE, SIDE)
        assert batch.valid_UHW.shape == (0, SIDE, SIDE)
        assert batch.boxes_VU4.shape[1:] == (0, 4)
        assert batch.slots_U.shape == (0,)
        assert batch.keys_U == ()
        assert torch.equal(batch.image_L3HW, other.image_L3HW)


def test_without_strong_views_the_weak_one_is_the_same(pools):
    for batch, other in zip(stream(pools, 0, 3, strong=0), stream(pools, 0, 3), strict=True):
        assert batch.boxes_VU4.shape == (0, 4, 4)
        assert batch.photometric_VUP.shape[:2] == (0, 4)
        for name in ("image_L3HW", "weak_U3HW", "valid_UHW", "slots_U"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


def test_training_never_opens_an_unlabeled_mask(tmp_path, make_pool, pools, monkeypatch):
    def garbage(key, files):
        files["mask.png"] = b"not a mask"

    masked = make_pool(tmp_path / "garbage", 13, change=garbage)
    opened = []
    read = Reader._payload

    def spy(self, row, offset, length, what):
        if what == "mask":
            opened.append(self.pool)
        return read(self, row, offset, length, what)

    monkeypatch.setattr(Reader, "_payload", spy)
    for one, other in zip(stream({**pools, "unlabeled": masked}), stream(pools), strict=True):
        assert one.truth_UHW is None
        assert torch.equal(one.image_L3HW, other.image_L3HW)
    assert opened
    assert set(opened) == {pools["labeled"]}
    with pytest.raises(DataError, match=r"key city/\d+: mask must be a readable PNG"):
        next(iter(stream({**pools, "unlabeled": masked}, truth=True)))


def test_measuring_reads_the_truth_and_draws_no_boxes(tmp_path, make_pool, pools):
    kept = {**pools, "unlabeled": make_pool(tmp_path / "kept", 13)}
    trained = list(stream(kept))
    assert sum(batch.boxes_VU4.any().item() for batch in trained) > 0
    for batch, other in zip(stream(kept, truth=True), trained, strict=True):
        assert torch.equal(batch.weak_U3HW, other.weak_U3HW)
        assert not batch.boxes_VU4.any()
        assert (batch.truth_UHW[~batch.valid_UHW] == 255).all()
        assert set(batch.truth_UHW[batch.valid_UHW].unique().tolist()) == {0, 1, 255}
    with pytest.raises(DataError, match=r"data\.unlabeled must be a pool whose samples all have masks"):
        stream(pools, truth=True)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_corrupt_sample_stops_the_run_with_its_own_words(tmp_path, make_pool, pools, processes):
    def change(key, files):
        if key == "city/003":
            files["jpg"] = files["jpg"][:200]

    broken = {**pools, "unlabeled": make_pool(tmp_path / "b", 13, masks=False, change=change)}
    with pytest.raises(DataError) as caught:
        list(stream(broken, loader_processes=processes))
    assert multiprocessing.active_children() == []  # they do not live on in the error's frames
    text = str(caught.value)
    assert "key city/003: image must be a readable" in text
    assert "Traceback" not in text
    assert "worker" not in text


@pytest.mark.parametrize("processes", [0, 2])
def test_skipped_samples_are_counted_logged_and_limited(tmp_path, make_pool, pools, processes, caplog):
    def change(key, files):
        if key in ("city/003", "city/009"):
            files["jpg"] = b"broken"

    broken = {**pools, "unlabeled": make_pool(tmp_path / "b", 13, masks=False, change=change)}
    settings = {"on_corrupt": "skip", "loader_processes": processes}
    run = stream(broken, 0, 13, **settings)
    keys = [key for batch in run for key in batch.keys_U]
    assert run.corrupt == 2  # distinct samples, though four passes met each of them
    assert len(caplog.records) == 2
    assert "key city/003" in caplog.text
    assert len(keys) == 52
    assert not {"city/003", "city/009"} & set(keys)
    shared = [
        key
        for rank in range(2)
        for batch in stream(broken, 4, 5, rank=rank, world=2, **settings)
        for key in batch.keys_U
    ]
    assert shared == keys[16:20]
    with pytest.raises(DataError, match=r"at most 1 corrupt samples; got 2"):
        list(stream(broken, 0, 13, corrupt_limit=1, **settings))


def test_batches_must_divide(pools):
    with pytest.raises(ConfigError) as caught:
        stream(pools, world=3)
    assert [fault.split(" must")[0] for fault in caught.value.faults] == [
        "train.batch.labeled",
        "train.batch.unlabeled",
    ]
    assert len(stream({"labeled": pools["labeled"]}, world=2, batches=(2, 3))) == 4  # no unlabeled pool, no rule for it
    assert len(stream({"unlabeled": pools["unlabeled"]}, world=2, batches=(3, 2))) == 4  # nor for no labeled one
    with pytest.raises(ConfigError, match="a stream must read at least one pool"):
        stream({})
    with pytest.raises(DataError, match=r"data\.labeled must be a pool whose samples all have masks"):
        stream({"labeled": pools["unlabeled"]})


def test_loader_processes_by_cores():
    assert [loader_processes(None, cores) for cores in (0, 1, 2, 4, 5, 16)] == [0, 0, 1, 3, 4, 4]
    assert loader_processes(7, 1) == 7


def test_remote_pools_are_not_forked(tmp_path, pools):
    remote = type(pools["labeled"]).open("l", fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))
    assert loader._start_method([pools["labeled"], remote]) == "forkserver"


def test_a_dead_loader_process_is_explained(pools, monkeypatch):
    make = steps.Steps._batch

    def dies_at_two(self, step, skipped):
        return os.kill(os.getpid(), signal.SIGKILL) if step == 2 else make(self, step, skipped)

    monkeypatch.setattr(steps.Steps, "_batch", dies_at_two)
    with pytest.raises(DataFailure, match=r"loader processes must stay alive.*data\.loader_processes") as caught:
        list(stream(pools, 0, 20, loader_processes=2))
    assert multiprocessing.active_children() == [], caught


@pytest.mark.parametrize("processes", [0, 1])
def test_a_store_that_does_not_answer_stays_the_cause(pools, monkeypatch, processes):
    """Whether a run starts again depends on it, and pickling drops causes."""

    def fail(self, row, offset, length, what):
        raise DataError("shard must be readable") from ConnectionError("timed out")

    monkeypatch.setattr(steps.Reader, "_payload", fail)
    with pytest.raises(DataError) as caught:
        list(stream(pools, loader_processes=processes))
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_labeled_images_come_with_others_when_asked(pools):
    """Half of the time, another random one in another size; everything else stays to the last bit."""
    config = DataConfig(crop=SIDE)

    def made(given, start=0, stop=60, rank=0, world=1):
        return list(Stream(config, pools, 7, 2, 4, rank, world, 2, True, start, stop, given=given))

    plain, asked = made(0.0), made(0.5)
    for one, other in zip(plain, asked, strict=True):
        assert one.given_L3HW is one.given_label_LHW is None
        assert_same(one, dataclasses.replace(other, given_L3HW=None, given_label_LHW=None))
    image_N3HW = torch.cat([batch.given_L3HW for batch in asked])
    label_NHW = torch.cat([batch.given_label_LHW for batch in asked])
    assert (image_N3HW.dtype, label_NHW.dtype) == (torch.uint8, torch.uint8)
    there_N = (label_NHW != 255).flatten(1).any(dim=1)
    assert there_N.float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert not image_N3HW[~there_N].any()
    # a third of the pixels of these masks is not annotated; beside an image that was made smaller nothing is
    shown_N = (label_NHW[there_N] != 255).flatten(1).float().mean(dim=1)
    assert (shown_N < 0.4).float().mean() > 0.1
    assert (shown_N > 0.55).float().mean() > 0.3
    assert all((label != 255).any() for batch in made(1.0, 0, 5) for label in batch.given_label_LHW)
    for one, *parts in zip(made(0.5, 5, 9), *(made(0.5, 5, 9, rank, 2) for rank in (0, 1)), strict=True):
        assert torch.equal(one.given_L3HW, torch.cat([part.given_L3HW for part in parts]))
        assert torch.equal(one.given_label_LHW, torch.cat([part.given_label_LHW for part in parts]))
