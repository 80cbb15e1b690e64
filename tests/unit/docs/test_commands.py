"""Every command that the documents show: it exists, its options do, recipes and settings are what the config takes.

Commands are read as their own programs read them, not run. One whose program no check here knows fails; those that
cannot be checked have their reason in `programs.UNCHECKED`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from documents import Block, blocks, commands, simple
from programs import UNCHECKED, check


@pytest.fixture(scope="module")
def folder(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, with the pools that the documents name."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "pools").mkdir()
    for name in ("scenes", "camvid-1_64", "camvid-1_16"):
        (folder / "pools" / name).symlink_to(scenes)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's command line
def test_commands_are_read_by_their_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    wrong = []
    for where, words in commands():
        try:
            check(words)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            wrong.append(f"{where}: {' '.join(words)}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "raysemi trian scenes-derprop",
        "raysemi train scenes-derprop train.stepz=5",
        "raysemi train no-such-recipe",
        "raysemi evaluate runs/a --pols POOL",
        "raysemi tune run derprop-lambdas set.data.pools=pools/scenes search.trails=3",
        "raysemi tune run derprop-lambdas set.data.pools=pools/scenes space.method.ordr=declared",
        "raysemi submit scenes-derprop run=runs/a data.pools=/storage/pools/a",
        "raysemi submit ... --dry-run --overlay cpu",
        "raysemi pack voc --root DIR --split 93a --out pools/a",
        "raysemi bench grid --recipes camvid --out grids/a train.step=4",
        "ray job submit --workingdir . -- python jobs/train.py scenes-derprop",
        "ray job submit -- python jobs/tarin.py scenes-derprop",
        "python tests/bench/scale.py --sample 4 --folders DIR",
        "torchrun --nproc-per-node 2 -m raysemi train scenes-derprop rya=none",
        "kubectl apply -k infra/kuberay/overlays/gpu",
        "make demos",
        'pip install "raysemi[zero]"',
        "curl -O x",
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrong_command_is_found(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (words,) = simple(line)
    with pytest.raises((Exception, SystemExit)):  # each program has its own
        check(words)


def shell_blocks() -> list[Block]:
    return [block for block in blocks() if not block.language]


@pytest.mark.parametrize("block", shell_blocks(), ids=str)
def test_blocks_are_what_the_shell_reads(block: Block) -> None:
    read = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr


def test_each_reason_is_needed() -> None:
    assert {words[0] for _, words in commands()} >= UNCHECKED.keys()
