"""Lines for people: numbers of a step, time left, results."""

from __future__ import annotations

import time

import pytest

from raysemi.launch import terminal

LOG_LINE = {
    "loss/total": 0.75,
    "loss/supervised": 0.5,
    "loss/consistency": 1.0,
    "images_per_s": 12.34,
    "method/kept_ratio": 0.456,
    "skipped_steps": 0.0,
    "lr": 0.1,
}


def test_numbers() -> None:
    assert terminal.numbers(LOG_LINE) == ("12.3 images/s  loss 0.750 (supervised 0.500, consistency 1.000)  kept 46 %")
    assert terminal.numbers({"loss/total": 2.0, "loss/supervised": 2.0}) == "loss 2.000"
    assert terminal.numbers({"loss/total": 2.0, "skipped_steps": 3.0}) == "loss 2.000  skipped steps 3"


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with terminal.TrainingProgress(100) as progress:
        progress(10, LOG_LINE)
        progress(20, LOG_LINE)
        progress(20, {"eval/miou": 33.333, "eval/pixel_accuracy": 70.0})
    first, second, evaluation = capsys.readouterr().err.splitlines()
    assert first.startswith("step 10/100  12.3 images/s")
    assert second.endswith("kept 46 %  4 min 00 s left")  # 80 steps at 3 s
    assert evaluation == "step 20/100  evaluation  mIoU 33.3 %  pixel accuracy 70.0 %"
    assert progress.step == 20


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.TrainingProgress(100, quiet=True) as progress:
        progress(10, LOG_LINE)
    assert capsys.readouterr().err == ""
    assert progress.step == 10


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (61, "1 min 01 s"), (7325, "2 h 02 min")])
def test_duration(seconds: float, text: str) -> None:
    assert terminal._duration(seconds) == text


def test_results(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"method": "derprop", "miou": 41.256, "pixel_accuracy": 80.0, "steps": 40, "iou": {"sky": 90.5}}
    terminal.print_results({"runs/a": result, "runs/b": {}}, classes=False)
    output = capsys.readouterr().out
    assert "41.26" in output
    assert "runs/b" not in output
    terminal.print_results({"runs/a": result}, classes=True)
    assert "sky" in capsys.readouterr().out
    terminal.print_results({"runs/b": {}})
    assert "no evaluation yet" in capsys.readouterr().out
