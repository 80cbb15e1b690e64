"""What the command line tells without a run."""

from __future__ import annotations

from pathlib import Path

from makers import call

from raysemi.cli.exits import MISTAKE


def test_mistakes_in_weights_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    result = call("weights", "resnet50", "--out", tmp_path / "w.pth")
    assert (result.exit_code, "--out must end in .safetensors; got" in result.output) == (MISTAKE, True)
    result = call("weights", "resnet50", "--stem", "7x7", "--out", tmp_path / "w.safetensors")
    assert (result.exit_code, "--stem must be deep or plain; got 7x7" in result.output) == (MISTAKE, True)
    result = call("weights", "resnet11", "--out", tmp_path / "w.safetensors")
    assert (result.exit_code, "model.encoder must be" in result.output) == (MISTAKE, True)
