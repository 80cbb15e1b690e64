"""A whole run in one process: it learns nothing here, but it must stop, go on and refuse exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from makers import tiny_run

from raysemi import api, config_io
from raysemi.data.pack import pack
from raysemi.data.sources.scenes import Scenes
from raysemi.engine import checkpoint, retention
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, ConfigError, DataError
from raysemi.launch import worker
from raysemi.launch.restore import load_network, open_pools
from raysemi.launch.worker import run
from raysemi.methods import METHODS
from raysemi.models.segmentor import build_segmentor
from raysemi.models.weights import save_tensors
from raysemi.ops.photometric import PARAMETERS
from raysemi.report.page import build_report


def newest(folder: Path) -> checkpoint.Snapshot:
    return checkpoint.load_newest(RunFolder(folder))


def assert_same_bits(a: checkpoint.Snapshot, b: checkpoint.Snapshot) -> None:
    assert a.step == b.step
    assert a.tensors.keys() == b.tensors.keys()
    for stem, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[stem].keys()
        for name, value in tensors.items():
            assert torch.equal(value, b.tensors[stem][name]), f"{stem}/{name}"


OF_METHOD = {
    "fixmatch": ["method.threshold=0.2"],
    "derprop": ["method.threshold.initial=0.25"],
    "augseg": ["method.threshold=0.2"],
    "ael": ["method.threshold=0.2", "method.cutmix.per_class=2", "method.momentum=0.9"],
    "unimatch": ["method.threshold=0.2"],
    "unimatch_v2": ["method.threshold=0.2"],
    "mean_teacher": ["method.ramp=0.6"],
    "corrmatch": ["method.threshold.initial=0.25"],
    "u2pl": [
        "method.contrast.delta_p=0.1", "method.representation.hidden=6", "method.representation.dim=8",
        "method.queue.size=90", "method.queue.first_size=110",
    ],
}  # fmt: skip


def rows(folder: Path, name: str) -> dict[int, float]:
    table = pq.read_table(folder / "metrics.parquet").to_pylist()
    assert len({(row["step"], row["name"]) for row in table}) == len(table)
    return {row["step"]: row["value"] for row in table if row["name"] == name}


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        *((method, []) for method in METHODS),
        ("unimatch", ["weighting=rank", "weighting.confidence=0.2", "weighting.memory=9", "weighting.unlabeled=true"]),
        ("derprop", ["gradients=pareto", "gradients.warmup=3"]),
        ("fixmatch", ["gradients=pareto", "gradients.every=4", "gradients.exclusive=alpha"]),
    ],
)
def test_continued_equals_never_stopped(scenes, tmp_path, method, rule):
    """All steps, against half and half: weights, averaged copy, thresholds and moments to the last bit.

    It stops in the middle of a period (7 to 13, 28 to 34), between two updates of the averaged copy, and of four steps
    that share their Pareto weights. The second run also evaluates, looks at pseudo-labels and measures gradients more
    often, which must not change it.
    """
    steps = 60 if rule else 24  # until unlabeled images have gradients that rules differ on
    settings = [f"train.steps={steps}", "train.period=7", *OF_METHOD.get(method, []), *rule]
    run(tiny_run(scenes, tmp_path / "whole", method, *settings))
    run(tiny_run(scenes, tmp_path / "parts", method, *settings, f"train.stop_at={steps // 2}"))
    assert newest(tmp_path / "parts").step == steps // 2
    looks = ["eval.every=7", "eval.pseudo_images=4", "eval.pictures=2"]
    looks += ["gradients.measure_every=3"] if METHODS[method][1].uses_unlabeled else []
    run(tiny_run(scenes, tmp_path / "parts", method, *settings, *looks))
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    weights = rows(tmp_path / "parts", "gradients/weight_unsupervised")
    assert list(weights) == list(range(steps // 2 + 3, steps + 1, 3)) or method == "supervised"
    # a step whose unsupervised gradient vanishes is uniform under pareto too
    assert (set(weights.values()) != {0.5}) == ("gradients=pareto" in rule or method == "supervised")
    if method == "derprop":
        assert newest(tmp_path / "parts").tensors["method"]["threshold"] != torch.tensor(0.25)


def test_the_run_folder_holds_what_a_run_promises(scenes, tmp_path):
    config = tiny_run(
        scenes, tmp_path / "run", "derprop", "train.steps=6", "eval.every=3", "eval.pseudo_images=3", "eval.pictures=2"
    )
    seen = []
    result = run(config, lambda step, metrics: seen.append((step, metrics)))
    folder = tmp_path / "run"
    assert json.loads((folder / "result.json").read_text()) == result
    assert result.keys() == {
        "method", "miou", "iou", "pixel_accuracy", "steps", "labeled", "unlabeled", "seconds"
    }  # fmt: skip
    assert (result["steps"], result["labeled"], result["unlabeled"]) == (6, 8, 16)
    rows = pq.read_table(folder / "metrics.parquet").to_pylist()
    names = {row["name"] for row in rows}
    assert {"loss/total", "lr", "method/threshold", "eval/miou", "eval/student_miou"} <= names
    assert {"pseudo/accuracy_before", "pseudo/mining_after", "pseudo/effective_after"} <= names
    assert {row["step"] for row in rows if row["name"] == "eval/miou"} == {3, 6}
    assert [step for step, metrics in seen if "loss/total" in metrics] == [1, 2, 3, 4, 5, 6]
    # 2 of 8 labeled and 2 of 16 unlabeled images a step
    assert [m["data/labeled_passes"] for _, m in seen if "loss/total" in m] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    assert [m["data/unlabeled_passes"] for _, m in seen if "loss/total" in m] == [0.125 * step for step in range(1, 7)]
    pictures = json.loads((folder / "pictures" / "pictures.json").read_text())
    assert [picture["kind"] for picture in pictures] == ["unlabeled"] * 2 + ["val"] * 2
    assert all((folder / "pictures" / p["file"]).exists() for picture in pictures for p in picture["panels"])
    trained = load_network(folder)
    assert trained.config == config
    assert trained.step == 6
    assert len(trained.classes) == len(trained.palette) == trained.network.num_classes == 7
    assert not trained.network.training


def test_first_weights_are_read_once(scenes, tmp_path):
    """A run that goes on, and whoever reads it, needs neither the file of the first weights nor a hub."""
    file = tmp_path / "first.safetensors"
    config = tiny_run(scenes, tmp_path / "run", "fixmatch")
    encoder = build_segmentor(config.model, 7, None, seed=5).encoder
    published = encoder.published_names()
    save_tensors({published[name]: value for name, value in encoder.net.state_dict().items()}, file)
    settings = [f"model.weights={file}", "train.steps=4", "eval.every=4"]
    run(tiny_run(scenes, tmp_path / "whole", "fixmatch", *settings))
    run(tiny_run(scenes, tmp_path / "run", "fixmatch", *settings, "train.stop_at=2"))
    file.unlink()
    with pytest.raises(ConfigError, match=r"model\.weights must be .*an existing file"):
        run(tiny_run(scenes, tmp_path / "other", "fixmatch", *settings))
    result = run(tiny_run(scenes, tmp_path / "run", "fixmatch", *settings))
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "run"))
    assert api.evaluate(tmp_path / "run")["miou"] == result["miou"]
    assert api.predict(tmp_path / "run", pool=scenes / "val", out=tmp_path / "maps") == 5
    assert build_report([tmp_path / "run"], tmp_path / "report.html").exists()


def test_a_finished_run_does_nothing_more(scenes, tmp_path):
    config = tiny_run(scenes, tmp_path / "run", "supervised", "train.steps=2")
    first = run(config)
    assert run(config) == first


def test_rows_of_a_cut_off_run_are_dropped(scenes, tmp_path):
    """Killed after step 5 with a checkpoint at 4: the metrics of step 5 are made again, not doubled."""
    config = tiny_run(scenes, tmp_path / "run", "supervised", "train.steps=8", "train.stop_at=5", "train.keep=9")
    run(config)
    run_folder = tmp_path / "run"
    assert checkpoint.steps(RunFolder(run_folder)) == [1, 2, 3, 4, 5]
    shutil.rmtree(run_folder / "checkpoints" / "step-000005")
    run(tiny_run(scenes, run_folder, "supervised", "train.steps=8", "train.keep=9"))
    rows = pq.read_table(run_folder / "metrics.parquet").to_pylist()
    assert [row["step"] for row in rows if row["name"] == "loss/total"] == list(range(1, 9))


def test_a_run_heals_after_a_broken_newest_checkpoint(scenes, tmp_path):
    """Step 4 is the newest and the best, and its file is cut: the run goes back, and both are found anew."""
    settings = ["train.steps=8", "train.keep=1", "train.checkpoint_every=2", "eval.every=8"]
    folder = RunFolder(tmp_path / "run")
    run(tiny_run(scenes, tmp_path / "run", "supervised", *settings, "train.keep=9", "train.stop_at=4"))
    retention.mark_best(folder, 4, 99.0)
    cut = tmp_path / "run" / "checkpoints" / "step-000004" / "student.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    run(tiny_run(scenes, tmp_path / "run", "supervised", *settings, "train.stop_at=3"))
    assert newest(tmp_path / "run").step == 3
    result = run(tiny_run(scenes, tmp_path / "run", "supervised", *settings))
    assert retention.best_step(folder) == 8
    assert retention.best_miou(folder) == result["miou"] < 99.0
    assert checkpoint.steps(folder) == [8]


def test_another_config_in_the_same_folder_is_refused_with_the_difference(scenes, tmp_path):
    run(tiny_run(scenes, tmp_path / "run", "supervised", "train.steps=2", "train.stop_at=1"))
    with pytest.raises(ConfigError, match=r"optim\.lr, seed"):
        run(tiny_run(scenes, tmp_path / "run", "supervised", "train.steps=2", "optim.lr=0.5", "seed=3"))
    assert newest(tmp_path / "run").step == 1


def test_other_pools_are_refused(scenes, tmp_path):
    pools = tmp_path / "pools"
    shutil.copytree(scenes, pools)
    run(tiny_run(pools, tmp_path / "run", "supervised", "train.steps=2", "train.stop_at=1"))
    shutil.rmtree(pools / "labeled")
    shutil.copytree(scenes / "val", pools / "labeled")
    with pytest.raises(CheckpointError, match="pools and boxes that it began with"):
        run(tiny_run(pools, tmp_path / "run", "supervised", "train.steps=2"))


def test_two_unlabeled_pools_are_one(scenes, tmp_path):
    more = tmp_path / "more"
    pack(Scenes(train=5, val=1, size=64, seed=4), more, split=1, pools=["unlabeled"], processes=1)
    both = f"data.unlabeled=[{scenes / 'unlabeled'}, {more / 'unlabeled'}]"
    config = tiny_run(scenes, tmp_path / "run", "fixmatch", "train.steps=2", both)
    assert config_io.parse(config_io.dump(config)) == config
    assert run(config)["unlabeled"] == 16 + 4
    digests = newest(tmp_path / "run").state["digests"]
    assert digests["unlabeled"] == open_pools(config).unlabeled.digest
    with pytest.raises(ConfigError, match=r"differs in data\.unlabeled"):
        run(tiny_run(scenes, tmp_path / "run", "fixmatch", "train.steps=2"))
    with pytest.raises(DataError, match=r"data\.unlabeled: pool must be a folder"):
        run(tiny_run(scenes, tmp_path / "other", "fixmatch", f"data.unlabeled=[{scenes / 'unlabeled'}, nowhere]"))


def test_a_mixture_goes_on_as_it_would_have(scenes, tmp_path, caplog):
    more = tmp_path / "more"
    pack(Scenes(train=5, val=1, size=64, seed=4), more, split=1, pools=["unlabeled"], processes=1)
    listed = [{"path": str(scenes / "unlabeled"), "weight": 3}, {"path": str(more / "unlabeled"), "weight": 1}]
    mixture = f"data.unlabeled={json.dumps(listed)}", "train.steps=6", "train.batch.unlabeled=4"
    seen = {}
    whole = tiny_run(scenes, tmp_path / "whole", "fixmatch", *mixture)
    with caplog.at_level("INFO", logger="raysemi"):
        run(whole, lambda step, metrics: seen.setdefault(step, {}).update(metrics))
    assert f"1.12 of {scenes / 'unlabeled'}, 1.5 of {more / 'unlabeled'}" in caplog.text
    passes = {name: seen[6][name] for name in seen[6] if name.startswith("data/unlabeled")}
    assert passes == {
        "data/unlabeled_passes": 24 / 20, "data/unlabeled_passes/0": 18 / 16, "data/unlabeled_passes/1": 1.5,
    }  # fmt: skip
    for stop in (2, 6):
        run(tiny_run(scenes, tmp_path / "parts", "fixmatch", *mixture, f"train.stop_at={stop}"))
    one, two = newest(tmp_path / "whole").tensors["student"], newest(tmp_path / "parts").tensors["student"]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_of_another_class_count_is_refused(scenes, tmp_path):
    run(tiny_run(scenes, tmp_path / "run", "supervised", "train.steps=1"))
    folder = RunFolder(tmp_path / "run")
    snapshot = checkpoint.load(folder, 1)
    snapshot.state["classes"] = snapshot.state["classes"][:-2]
    checkpoint.save(folder, snapshot)
    with pytest.raises(CheckpointError, match=r"step-000001 must hold weights for the 5 classes .* got 7\. ") as caught:
        load_network(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_network_is_refused_in_one_line(scenes, tmp_path):
    run(tiny_run(scenes, tmp_path / "run", "supervised", "train.steps=1"))
    written = tmp_path / "run" / "config.yaml"
    written.write_text(written.read_text().replace("channels: 16", "channels: 24"))
    with pytest.raises(CheckpointError, match="weights of its own config") as caught:
        load_network(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_each_measuring_step_has_a_row_of_its_own(scenes, tmp_path):
    """Not a mean over a log line's steps; and none is lost where a run stops between two lines."""
    settings = ["train.steps=12", "train.log_every=5", "train.checkpoint_every=5", "method.threshold=0.145"]
    settings += ["gradients=pareto", "gradients.measure_every=2"]
    run(tiny_run(scenes, tmp_path / "run", "fixmatch", *settings, "train.stop_at=8"))
    run(tiny_run(scenes, tmp_path / "run", "fixmatch", *settings))
    for name in ("norm_supervised", "norm_unsupervised", "cosine", "scale", "least_cosine"):
        assert list(rows(tmp_path / "run", f"gradients/{name}")) == [2, 4, 6, 8, 10, 12]
    assert all(value > -1e-6 for value in rows(tmp_path / "run", "gradients/least_cosine").values())
    assert rows(tmp_path / "run", "gradients/capped").keys() == {5, 10, 12}  # shares of a log line's steps


def test_weight_decay_is_no_part_of_the_weights_and_clipping_is_of_the_step(scenes, tmp_path):
    found = []
    for decay in ("0", "0.1"):
        settings = ["train.steps=1", "method.threshold=0.145", "gradients=pareto", "gradients.measure_every=1"]
        settings += [f"optim.weight_decay={decay}", "train.max_grad_norm=0.01"]
        run(tiny_run(scenes, tmp_path / decay, "fixmatch", *settings))
        found.append(rows(tmp_path / decay, "gradients/weight_unsupervised")[1])
    assert found[0] == found[1] != 0.5
    moments = newest(tmp_path / "0").tensors["optimizer"].values()  # after one step: the gradient that it took
    assert torch.stack([value.norm() for value in moments]).norm() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("masks", [0, 15])
def test_measuring_needs_masks_that_were_kept(scenes, tmp_path, masks):
    """Told before any worker starts; a pool of 16 with 15 masks does not do either."""
    pools = tmp_path / "pools"
    shutil.copytree(scenes, pools)
    content = json.loads((pools / "unlabeled" / "pool.json").read_text())
    assert content["masks"] == 16
    content["masks"] = masks
    (pools / "unlabeled" / "pool.json").write_text(json.dumps(content))
    config = tiny_run(pools, tmp_path / "run", "fixmatch", "train.steps=2", "eval.pseudo_images=2")
    with pytest.raises(ConfigError, match=f"got 2 with {masks} masks for 16 images.*--keep-unlabeled-masks"):
        open_pools(config)


def test_a_missing_pool_names_its_setting(scenes, tmp_path):
    with pytest.raises(DataError, match=r"data\.unlabeled.*nowhere"):
        run(tiny_run(scenes, tmp_path / "run", "fixmatch", f"data.unlabeled={tmp_path}/nowhere"))
    assert not (tmp_path / "run").exists()


def test_an_order_that_leaves_no_channel_is_told_before_any_worker_starts(scenes, tmp_path):
    config = tiny_run(scenes, tmp_path / "run", "derprop", "method.deriv.dim=4", "method.order=4")
    with pytest.raises(ConfigError, match=r"method\.order must leave a channel") as caught:
        open_pools(config)
    assert len(caught.value.faults) == 1


def test_pools_of_one_class_are_refused(scenes, tmp_path):
    """Every loss would be 0: said before any worker starts, without what a method would say of one class."""
    pools = tmp_path / "pools"
    shutil.copytree(scenes, pools)
    for name in ("labeled", "unlabeled", "val"):
        path = pools / name / "pool.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"classes": ["field"], "palette": content["palette"][:1]}))
    for method in ("fixmatch", "u2pl"):
        with pytest.raises(ConfigError, match=r"at least two classes.*got field.*background") as caught:
            open_pools(tiny_run(pools, tmp_path / method, method))
        assert len(caught.value.faults) == 1


def test_labeled_images_alone_need_no_unlabeled_pool(scenes, tmp_path):
    pools = tmp_path / "pools"
    for name in ("labeled", "val"):
        shutil.copytree(scenes / name, pools / name)
    result = run(tiny_run(pools, tmp_path / "run", "supervised", "train.steps=2"))
    assert (result["steps"], result["unlabeled"]) == (2, 0)
    with pytest.raises(DataError, match=r"data\.unlabeled"):
        open_pools(tiny_run(pools, tmp_path / "run", "fixmatch"))


def test_ctrl_c_saves_and_the_same_command_goes_on(scenes, tmp_path, monkeypatch):
    """SIGINT arrives in the middle of the run: a checkpoint of that very step is there, and nothing is lost."""
    import os
    import signal

    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config = tiny_run(scenes, tmp_path / "run", "fixmatch", "train.steps=6")
    with pytest.raises(KeyboardInterrupt):
        run(config, interrupt)
    assert newest(tmp_path / "run").step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(config)["steps"] == 6


@pytest.mark.parametrize("rule", ["uniform", "pareto"])
def test_a_step_that_is_not_finite_is_skipped_whole(scenes, tmp_path, monkeypatch, rule):
    """A NaN in one image's pixels: weights, moments, averaged copy and running statistics stay as they were."""
    settings = ["train.steps=3", "train.period=3", "train.log_every=3", f"gradients={rule}"]
    config = tiny_run(scenes, tmp_path / "run", "derprop", *settings)
    before: dict[str, torch.Tensor] = {}
    real = worker.Trainer.train_step

    def poisoned(trainer, host):
        if trainer.step == 1:
            before.update({k: v.clone() for k, v in trainer.student.state_dict().items()})
            before.update({f"average/{k}": v.clone() for k, v in trainer.average.model.state_dict().items()})
            before["threshold"] = trainer.method.threshold.clone()
            host.photometric_VUP[..., PARAMETERS.index("brightness")] = float("nan")
        values = real(trainer, host)
        if trainer.step == 2:
            after = trainer.student.state_dict()
            after |= {f"average/{k}": v for k, v in trainer.average.model.state_dict().items()}
            after["threshold"] = trainer.method.threshold
            # BatchNorm counts batches that it saw; nothing reads that counter here
            changed = [k for k, v in before.items() if not torch.equal(v, after[k]) and "num_batches" not in k]
            assert changed == []
            assert values["skipped_steps"] == 1
        return values

    monkeypatch.setattr(worker.Trainer, "train_step", poisoned)
    logged = []
    assert run(config, lambda step, metrics: logged.append(metrics.get("skipped_steps")))["steps"] == 3
    assert logged[0] == 1  # the count so far, not its mean over the steps of the log line


@pytest.mark.parametrize(
    ("method", "settings", "measured"),
    [
        ("fixmatch", ["train.rampup=0.5"], 5),
        ("mean_teacher", ["method.ramp=0.7"], 7),
        ("fixmatch", ["gradients.warmup=8", "train.rampup=0.2"], 8),
    ],
)
def test_pareto_weights_wait_for_ramps(scenes, tmp_path, method, settings, measured):
    """They would undo a small weight by a large one: uniform until the weight of the unsupervised side has risen."""
    rule = ["gradients=pareto", "gradients.measure_every=1", "method.threshold=0"]
    rule = rule[:2] if method == "mean_teacher" else rule
    run(tiny_run(scenes, tmp_path / "run", method, "train.steps=10", *rule, *settings))
    weights = rows(tmp_path / "run", "gradients/weight_unsupervised")
    assert [step for step, weight in weights.items() if weight == 0.5] == list(range(1, measured + 1))
