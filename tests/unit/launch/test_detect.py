"""A detector's whole way on drawn scenes: training, going on, boxes beside a pool, the check, a run that reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from makers import tiny_run, true_boxes

from raysemi import api, config_io
from raysemi.data.boxes import read_boxes
from raysemi.data.pool import Pool
from raysemi.engine import checkpoint
from raysemi.engine.detect import agreed
from raysemi.engine.folder import RunFolder
from raysemi.errors import CheckpointError, ConfigError, DataError
from raysemi.launch import detect
from raysemi.launch.worker import run
from raysemi.models.detector import Detections

TINY = [
    "data.crop=64", "data.loader_processes=0", "data.views.scale=[0.8, 1.2]", "model.encoder=test_efficientnet",
    "model.weights=random", "model.channels=16", "model.hidden=24", "model.regions=16", "model.anchors=[8,16,32,48,64]",
    "boxes.min_area=20", "boxes.score=0", "boxes.accepted=0.05", "boxes.most=6", "train.batch=2", "train.log_every=1",
    "optim.name=adamw", "optim.lr=0.002",
]  # fmt: skip


def config(pools: Path, folder: Path, *overrides: str):
    return config_io.load_detector(None, [f"run={folder}", f"data.pools={pools}", *TINY, "train.steps=4", *overrides])


def newest(folder: Path) -> checkpoint.Snapshot:
    snapshot = checkpoint.load_newest(RunFolder(folder))
    assert snapshot is not None
    return snapshot


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("detect") / "things"
    return folder, detect.train_detector(config(scenes, folder))


@pytest.fixture
def pools(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "pools"))


def test_a_run_learns_and_is_checked_at_its_end(trained: tuple[Path, dict]) -> None:
    folder, result = trained
    assert result["steps"] == 4
    assert result["images"] == 5
    assert set(result["classes"]) == {"ball", "fruit", "box", "can", "ring", "star"}
    assert (folder / "metrics.parquet").exists()
    student, teacher = (newest(folder).tensors[name] for name in ("student", "teacher"))
    assert any(not torch.equal(student[name], teacher[name]) for name in student)


def test_going_on_gives_the_same_bits_as_never_stopping(
    trained: tuple[Path, dict], scenes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert detect.train_detector(config(scenes, folder, "train.stop_at=2")) == {"steps": 2}
    result = detect.train_detector(config(scenes, folder))
    whole, parts = newest(trained[0]), newest(folder)
    assert whole.step == parts.step == 4
    for stem, tensors in whole.tensors.items():
        assert tensors
        for name, value in tensors.items():
            assert torch.equal(value, parts.tensors[stem][name]), f"{stem}/{name}"
    assert result == trained[1]
    with pytest.raises(ConfigError, match=r"whose config differs in optim\.lr"):
        detect.train_detector(config(scenes, folder, "optim.lr=0.5"))


def test_boxes_are_written_beside_the_pool_and_checked(trained: tuple[Path, dict], pools: Path) -> None:
    path, count = api.find_boxes(trained[0], pools / "val")
    assert path == f"{pools / 'val'}/boxes-things.parquet"
    table, made = read_boxes(Pool.open(pools / "val"), "things")
    assert table.num_rows == count > 0
    assert made["things"] == ["ball", "fruit", "box", "can", "ring", "star"]
    assert set(table.column("label").to_pylist()) <= set(range(1, 7))
    searched = api.check_boxes(trained[0], pools / "val")
    assert api.check_boxes("things", pools / "val", score=0.05) == searched
    assert {name: trained[1][name] for name in searched} == searched
    fewer = api.find_boxes(trained[0], pools / "val", name="few", score=0.9)
    assert fewer[1] <= count
    with pytest.raises(ConfigError, match=r"--score must be at least boxes\.score of the detector, 0\.0; got -1"):
        api.find_boxes(trained[0], pools / "val", score=-1)


def test_what_says_how_to_search_may_change_afterwards(
    trained: tuple[Path, dict], scenes: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "things"))
    before = newest(folder)
    again = detect.train_detector(config(scenes, folder, "boxes.scale=1.5", "boxes.mirrored=true", "boxes.accepted=0"))
    assert again["accepted"] == 0
    for name, value in newest(folder).tensors["teacher"].items():
        assert torch.equal(value, before.tensors["teacher"][name])
    assert detect.load_detector(str(folder)).config.boxes.scale == 1.5


def test_an_image_and_its_mirror_image_must_agree() -> None:
    """One box on which they do; one that is too far off, one of another class, one that one way alone has."""
    own = Detections(
        torch.tensor(
            [[10.0, 5.0, 30.0, 25.0], [50.0, 5.0, 60.0, 15.0], [0.0, 0.0, 8.0, 8.0], [70.0, 40.0, 90.0, 60.0]]
        ),
        torch.tensor([1, 0, 2, 2]),
        torch.tensor([0.9, 0.9, 0.8, 0.7]),
    )
    mirrored = Detections(
        torch.tensor(
            [[70.0, 5.0, 88.0, 25.0], [38.0, 5.0, 48.0, 15.0], [92.0, 0.0, 100.0, 8.0], [10.0, 40.0, 30.0, 60.0]]
        ),
        torch.tensor([1, 0, 1, 2]),
        torch.tensor([0.6, 0.9, 0.8, 0.95]),
    )
    both = agreed(own, mirrored, 100)
    assert both.boxes_N4.tolist() == [[70, 40, 90, 60], [11, 5, 30, 25]]
    assert both.labels_N.tolist() == [2, 1]
    assert both.scores_N.tolist() == pytest.approx([0.7, 0.6])
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert [len(part) for part in agreed(own, nothing, 100)] == [0, 0, 0]
    assert [len(part) for part in agreed(nothing, own, 100)] == [0, 0, 0]


def test_an_interrupted_search_leaves_what_was_there(trained: tuple[Path, dict], pools: Path) -> None:
    api.find_boxes(trained[0], pools / "val", name="a")
    before = {file.name: file.read_bytes() for file in (pools / "val").iterdir()}

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            api.find_boxes(trained[0], pools / "val", name=name, score=0.5, progress=stop)
    assert {file.name: file.read_bytes() for file in (pools / "val").iterdir()} == before


def test_boxes_of_the_masks_are_all_right(pools: Path) -> None:
    true_boxes(Pool.open(pools / "val"))
    result = api.check_boxes("masks", pools / "val")
    assert result["precision"] == result["recall"] == 100.0
    assert result["boxes_per_image"] == result["true_boxes"] / 5 > 1


def test_a_run_reads_the_boxes_and_remembers_what_they_confirm(pools: Path, tmp_path: Path) -> None:
    settings = [
        "train.steps=2", "method.threshold=0.145", "weighting=rank", "weighting.confidence=0.145",
        "weighting.detector=masks",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"weighting.detector: .*boxes-masks.parquet must exist; got no such file"):
        run(tiny_run(pools, tmp_path / "a", "fixmatch", *settings, "weighting.score=0.9"))
    true_boxes(Pool.open(pools / "unlabeled"))
    remembered = {}
    for share, name in ((1.0, "b"), (0.0, "c")):
        true_boxes(Pool.open(pools / "unlabeled"), share=share)
        run(tiny_run(pools, tmp_path / name, "fixmatch", *settings))
        remembered[name] = newest(tmp_path / name).tensors["method"]["weighting.unlabeled.inserted_K"]
    assert remembered["b"].sum() > 0
    assert remembered["b"][0] == 0  # of the background there is no box
    assert remembered["c"].sum() == 0
    longer = tiny_run(pools, tmp_path / "d", "fixmatch", *settings, "train.stop_at=1")
    run(longer)
    true_boxes(Pool.open(pools / "unlabeled"), share=1.0)
    with pytest.raises(CheckpointError, match="must go on with the pools and boxes that it began with"):
        run(longer.model_copy(update={"train": longer.train.model_copy(update={"stop_at": None})}))


def test_what_is_no_detector_is_refused(trained: tuple[Path, dict], scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be the run folder of a detector; got one without config\.yaml"):
        api.find_boxes(tmp_path, scenes / "val")
    (tmp_path / "config.yaml").write_text(config_io.dump(tiny_run(scenes, tmp_path / "run", "fixmatch")))
    with pytest.raises(CheckpointError, match="must be the run folder of a detector; got another config"):
        api.find_boxes(tmp_path, scenes / "val")
    with pytest.raises(DataError, match="the name of boxes must hold"):
        api.find_boxes(trained[0], scenes / "val", name="../x")
    with pytest.raises(DataError, match=r"boxes-nothing\.parquet must exist"):
        api.check_boxes("nothing", scenes / "val")
    with pytest.raises(ConfigError, match=r"boxes\.classes must name classes of .*; got dragon"):
        detect.train_detector(config(scenes, tmp_path / "new", "boxes.classes=[ball, dragon]"))


def test_faults_of_a_detectors_config_come_at_once(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config(scenes, tmp_path, "boxes.acepted=0.9", "train.batch=0", "optim.name=lion")
    assert [fault.split(" must ")[0] for fault in sorted(error.value.faults)] == [
        "boxes.acepted", "optim.name", "train.batch",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"boxes\.accepted must be at least boxes\.score, 0\.9"):
        config(scenes, tmp_path, "boxes.score=0.9")


@pytest.mark.parametrize("name", config_io.detector_recipes())
def test_every_shipped_recipe_of_a_detector_is_valid(name: str) -> None:
    config = config_io.load_detector(name)
    assert config_io.parse_detector(config_io.dump(config)) == config


@pytest.mark.slow
def test_a_detector_learns_a_few_images_by_heart(scenes: Path, tmp_path: Path) -> None:
    """ImageNet weights, 150 steps on the eight labeled images: most things are found, most boxes are right."""
    settings = [
        "train.steps=150", "train.batch=4", "train.warmup=20", "train.average=0.95", "train.log_every=50",
        "data.views.scale=[1,1]", "data.views.flip=0", "data.views.jitter=0", "model.encoder=tf_efficientnet_lite0",
        "model.weights=auto", "model.channels=32", "model.hidden=128", "model.regions=32", "optim.lr=0.001",
        "boxes.score=0.5", "boxes.accepted=0.85", "boxes.most=20", f"data.val={scenes / 'labeled'}",
    ]  # fmt: skip
    result = detect.train_detector(config(scenes, tmp_path / "run", *settings))
    assert result["precision"] > 70
    assert result["recall"] > 60
