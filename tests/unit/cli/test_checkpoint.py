"""`raysemi checkpoint`: what a run holds, what is broken in it, and its network as a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from makers import call
from object_store import upload
from safetensors.torch import load_file

from raysemi.cli.exits import MISTAKE


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The trained run, with checkpoints of the steps 1 and 2, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_show_lists_the_checkpoints_of_a_run_and_the_files_of_one(trained):
    shown = json.loads(call("checkpoint", "show", trained, "--json").output)
    assert [one["step"] for one in shown["checkpoints"]] == [1, 2]
    assert shown["best"] == {
        "step": 2,
        "miou": json.loads((trained / "result.json").read_text())["miou"],
        "fault": None,
    }
    newest = shown["checkpoints"][-1]
    assert (newest["world"], newest["format"], newest["fault"]) == (1, 2, None)
    assert newest["bytes"] == sum(entry["bytes"] for entry in newest["files"].values())
    lines = call("checkpoint", "show", trained).output.splitlines()
    assert [line.split("│")[1].strip() for line in lines if "MiB" in line] == ["1", "2"]
    assert "best" in lines[-2]
    one = call("checkpoint", "show", trained / "checkpoints" / "step-000001").output
    assert all(name in one for name in ("student.safetensors", "optimizer.safetensors", "of 1 ranks"))


def test_verify_names_each_fault_and_ends_with_2(copy):
    assert call("checkpoint", "verify", copy).output == "step 1: whole\nstep 2: whole\n"
    path = copy / "checkpoints" / "step-000002"
    for name in ("student.safetensors", "teacher.safetensors"):
        content = bytearray((path / name).read_bytes())
        content[-9] ^= 4
        (path / name).write_bytes(content)
    (copy / "checkpoints" / ".writing-ab-000003").mkdir()
    (copy / "checkpoints" / "step-000001" / "mine.txt").write_text("note")
    result = call("checkpoint", "verify", copy)
    assert result.exit_code == MISTAKE
    lines = result.output.splitlines()
    assert lines[:3] == ["step 1: whole", "  mine.txt: not of the checkpoint, never read", "step 2: broken"]
    assert [line.split(" must ")[0].rpartition("/")[2] for line in lines[3:5]] == [
        "student.safetensors", "teacher.safetensors"
    ]  # fmt: skip
    assert lines[5:] == ["checkpoints/.writing-ab-000003: unfinished; the next start of the run sweeps it"]
    told = json.loads(call("checkpoint", "verify", copy, "--json").output)
    assert (told["ok"], [one["ok"] for one in told["checkpoints"]]) == (False, [True, False])
    assert call("checkpoint", "verify", copy / "checkpoints" / "step-000001").exit_code == 0
    assert call("checkpoint", "verify", path).exit_code == MISTAKE
    assert "broken: " not in call("checkpoint", "show", copy).output  # sizes are as they should be
    (path / "student.safetensors").unlink()
    assert "broken: student.safetensors" in call("checkpoint", "show", copy).output
    (copy / "best.json").write_text('{"step": 7, "miou": 1.0}')
    assert "got step 7, of none" in call("checkpoint", "verify", copy).output


@pytest.mark.parametrize("path", ["nowhere", "run/checkpoints/step-000009"])
def test_where_there_is_no_checkpoint_is_a_mistake(copy, path):
    result = call("checkpoint", "verify", copy.parent / path)
    assert result.exit_code == MISTAKE
    assert "must hold a checkpoint; got none" in result.output


def test_a_run_in_a_store(trained, s3, tmp_path):
    upload(trained, s3, "cli/run")
    where = f"s3://cli/run?endpoint_override={s3}&scheme=http&region=us-east-1"
    assert call("checkpoint", "verify", where).output == "step 1: whole\nstep 2: whole\n"
    one = where.replace("run?", "run/checkpoints/step-000001?")
    assert len(json.loads(call("checkpoint", "show", one, "--json").output)["checkpoints"]) == 1
    out = tmp_path / "net.safetensors"
    assert json.loads(call("checkpoint", "export", one, "--out", out, "--json").output)["step"] == 1
    near = tmp_path / "near.safetensors"
    assert call("checkpoint", "export", trained, "--which", "1", "--out", near).exit_code == 0
    one, other = load_file(out), load_file(near)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--out", "net.pt"], "--out must end in .safetensors or .onnx; got net.pt"),
        (["--out", "net.onnx", "--which", "worst"], "--which must be best, last or a step; got worst"),
        (["--out", "net.onnx", "--size", "12"], "--size must be HEIGHTxWIDTH, and come with an .onnx; got 12"),
        (["--out", "net.safetensors", "--size", "12x12"], "--size must be HEIGHTxWIDTH, and come with an .onnx"),
        (["--out", "net.safetensors", "--which", "9"], "step-000009"),
    ],
)
def test_mistakes_of_export_are_one_line(trained, arguments, text):
    result = call("checkpoint", "export", trained, *arguments)
    assert result.exit_code == MISTAKE
    assert text in result.output
    assert result.output.count("error: ") == 1


def test_export_of_onnx_says_how_it_compares_with_torch(trained, tmp_path):
    pytest.importorskip("onnxruntime")
    result = call("checkpoint", "export", trained, "--which", "best", "--out", tmp_path / "net.onnx")
    assert result.exit_code == 0, result.output
    assert "onnxruntime against torch on images 1x97x129, 2x130x75, 1x64x200: logits up to " in result.output
    assert (tmp_path / "net.onnx").exists()
