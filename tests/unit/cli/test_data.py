"""Pools from the command line: packed, indexed, verified, and the plan of what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from makers import call
from PIL import Image

from raysemi.cli.exits import MISTAKE


def plan(pool: Path, *options: object) -> list[list[str]]:
    result = call("plan", pool, *options)
    assert result.exit_code == 0, result.output
    return [line.split("\t") for line in result.stdout.splitlines()]


def test_plan_is_the_same_on_any_number_of_ranks_from_any_start(scenes: Path) -> None:
    """16 samples in batches of 4: step 4 begins the second pass."""
    pool = scenes / "unlabeled"
    whole = plan(pool, "--batch", 4, "--stop", 12)
    assert [len(line) for line in whole] == [4] * 12
    for start in (0, 4, 8):
        assert len({key for line in whole[start : start + 4] for key in line}) == 16
    assert whole[:4] != whole[4:8]
    for world in (1, 2, 4):
        for start in (0, 3, 11):
            options = ("--batch", 4, "--world", world, "--start", start, "--stop", 12)
            shares = [plan(pool, *options, "--rank", rank) for rank in range(world)]
            joined = [[key for share in parts for key in share] for parts in zip(*shares, strict=True)]
            assert joined == whole[start:]
    assert plan(pool, "--batch", 4, "--stop", 12, "--seed", 1) != whole


def test_plan_tells_keys_with_spaces_apart(tmp_path: Path) -> None:
    for kind, mode in (("images", "RGB"), ("labels", "L")):
        for number in range(3):
            path = tmp_path / f"{kind}/val/my city {number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (5 + number, 4)).save(path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    packed = call("pack", "folder", "--root", tmp_path, "--pools", "val", "--out", tmp_path, "--processes", 1)
    assert packed.exit_code == 0, packed.output
    (keys,) = plan(tmp_path / "val", "--batch", 3, "--stop", 1)
    assert sorted(keys) == ["my city 0", "my city 1", "my city 2"]


def test_plan_refuses_what_cannot_be_divided(scenes: Path) -> None:
    result = call("plan", scenes / "val", "--batch", 4, "--world", 3)
    assert result.exit_code == MISTAKE
    assert "--world, which divides --batch; got 0, 3 and 4" in result.output


def test_pack_verify_and_index(tmp_path: Path) -> None:
    out = tmp_path / "pools"
    result = call("pack", "scenes", "train=6", "val=2", "size=40", "--split", 2, "--out", out, "--processes", 1)
    assert result.exit_code == 0, result.output
    assert "labeled images: 2 drawn at random, seed 0\nlabeled: 2 images, 1 shards" in result.stdout
    assert "unlabeled: 4 images" in result.stdout
    assert call("verify", out / "val").exit_code == 0
    shard = next((out / "val").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    damaged = call("verify", out / "val")
    assert damaged.exit_code == MISTAKE
    assert shard.name in damaged.output

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a.tar").write_bytes(next((out / "labeled").glob("*.tar")).read_bytes())
    names = json.loads((out / "labeled/pool.json").read_text())["classes"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    indexed = call("index", foreign, "--classes", tmp_path / "classes.txt", "--processes", 1)
    assert indexed.exit_code == 0, indexed.output
    assert "2 images" in indexed.stdout


def test_pack_says_that_a_list_was_used(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "train", "train", "val")):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            path = tmp_path / f"{kind}/{part}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (5 + number, 4)).save(path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/2.txt").write_text("0\n")
    result = call("pack", "folder", "--root", tmp_path, "--split", 2, "--out", tmp_path / "pools", "--processes", 1)
    assert result.exit_code == 0, result.output
    assert "labeled images: those of the list splits/2.txt\nlabeled: 1 images" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["scenes", "trian=4"], "options of source scenes must be among train=..., val=..., seed=..., size=...; got"),
        (["scenes", "size=large"], "option size of source scenes must be a int; got 'large'"),
        (["nothing"], "source must be one of folder, voc, cityscapes, coco, scenes; got 'nothing'"),
        (["folder"], "--root must name the folder of the data set"),
        (["folder", "--root", "/no/such/folder"], "--root must be a folder that exists; got /no/such/folder"),
    ],
)
def test_mistakes_in_pack(tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = call("pack", *arguments, "--out", tmp_path)
    assert result.exit_code == MISTAKE
    assert expected in result.output
