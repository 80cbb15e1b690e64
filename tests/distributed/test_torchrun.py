"""The same commands under torchrun, without Ray: train, evaluate and predict as two ranks of one machine.

Torchrun itself starts two of them; the others get its environment in forked processes that have their imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import FORKS, start
from makers import tiny_run
from object_store import free_port

from raysemi import api, cli, config_io
from raysemi.data.pool import Pool

pytestmark = pytest.mark.timeout(900)  # of a busy machine: torchrun and both ranks import all


def rank(place: dict[str, str], said: Path, arguments: list[str]) -> None:
    os.environ.update(place)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    cli.main(arguments)


def two_ranks(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`raysemi ARGUMENTS` in the environment that torchrun gives to two ranks; the larger exit code."""
    said = folder / "said"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start()
    processes = [
        FORKS.Process(
            target=rank, args=(place | {"RANK": number, "LOCAL_RANK": number}, said, [str(one) for one in arguments])
        )
        for number in "01"
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(600)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert None not in codes
    out, err = (Path(f"{said}.{stream}").read_text(encoding="utf-8") for stream in ("out", "err"))
    return subprocess.CompletedProcess(arguments, max(codes), out, err)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`raysemi ARGUMENTS` as two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "raysemi"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=600, env=environment
    )


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two steps on two ranks."""
    folder = tmp_path_factory.mktemp("torchrun")
    settings = ["train.steps=2", "train.batch.unlabeled=4", "model.batch_norm=frozen"]
    recipe = folder / "two-steps.yaml"
    recipe.write_text(config_io.dump(tiny_run(scenes, folder / "run", "fixmatch", *settings)), encoding="utf-8")
    done = torchrun("train", recipe, "ray=none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU") == 1  # rank 0 alone speaks
    return folder / "run"


def test_training_ends_with_a_result(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert (result["steps"], result["labeled"], result["unlabeled"]) == (2, 8, 16)


def test_evaluating_on_two_ranks_gives_the_numbers_of_the_run(trained: Path, tmp_path: Path) -> None:
    done = two_ranks(tmp_path, "evaluate", trained, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((trained / "result.json").read_text())  # the same bits


def test_predicting_on_two_ranks_writes_each_image_once(trained: Path, scenes: Path, tmp_path: Path) -> None:
    """The files are those of one process; each was written by one rank, whose files the other's progress leaves out."""
    done = two_ranks(tmp_path, "predict", trained, "--pool", scenes / "val", "--out", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images: ") == 1
    assert "images 3/3" in done.stderr  # rank 0 has every other image of five
    assert api.predict(trained, pool=scenes / "val", out=tmp_path / "alone") == 5
    val = Pool.open(scenes / "val")
    for name in (f"{kind}/{val.key(row)}.png" for kind in ("labels", "overlays") for row in range(5)):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_an_unreadable_image_of_one_rank_is_told_by_all(trained: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    for name in ("a", "c"):
        Image.new("RGB", (50, 40)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "b.png").write_text("not an image")  # rank 1 has this one alone
    done = torchrun("predict", trained, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("all 3 images must be readable; got 1 that are not") == 2
    assert sorted(path.name for path in (tmp_path / "out" / "labels").iterdir()) == ["a.png", "c.png"]
