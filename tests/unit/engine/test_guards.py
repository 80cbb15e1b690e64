"""Skipped steps are counted, named and limited; a collapse is told once, and again when it comes back."""

from __future__ import annotations

import pytest
import torch

from raysemi.engine.guards import Guards, GuardsConfig, SkippedSteps


def noted(limit: int, *finite: bool) -> SkippedSteps:
    skips = SkippedSteps(limit, torch.device("cpu"))
    for number, one in enumerate(finite):
        skips.add(number + 1, torch.tensor(one), [f"key-{number + 1}"])
    return skips


def test_skipped_steps_are_read_once_and_the_last_names_its_batch() -> None:
    skips = noted(2, True, False, True, False, True)
    assert skips.read() == [2, 4]
    assert skips.last == (4, ["key-4"])
    assert skips.read() == []
    assert float(skips.total) == 2
    assert skips.tell([2, 4], ["key-4"], log=False) is None
    skips.add(6, torch.tensor(False), ["a", "b"])
    error = skips.tell(skips.read(), ["a", "b", "c"], log=False)
    assert "train.skip_limit, 2; got 3, lately 6. The batch of the last: a, b, c. " in str(error)


def test_a_run_that_goes_on_counts_on(caplog: pytest.LogCaptureFixture) -> None:
    skips = SkippedSteps(20, torch.device("cpu"))
    skips.restore(7)
    for step in range(1, 13):
        skips.add(step, torch.tensor(False), ["a"])
    assert skips.tell(skips.read(), ["a"], log=True) is None
    assert "steps ..., 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 (19 of 20 allowed). The last batch: a" in caplog.text


def kept(config: GuardsConfig, *ratios: float, start: int = 0) -> list[str]:
    told: list[str] = []
    guards = Guards(config, start, 1000, lambda template, text: told.append(template % text))
    for number, ratio in enumerate(ratios):
        guards.training(start + 20 * (number + 1), {"method/kept_ratio": ratio})
    return told


def test_a_kept_ratio_at_an_end_is_told_when_it_lasts_and_when_it_comes_back() -> None:
    """A tenth of 1000 steps is five log lines."""
    assert kept(GuardsConfig(), *[0.0] * 4, 0.3, *[0.0] * 4) == []
    (text,) = kept(GuardsConfig(), *[0.0] * 9)
    assert text.startswith(
        "step 100: 0.0 % of the unlabeled pixels were kept for 100 steps. The unlabeled images teach"
    )
    assert len(kept(GuardsConfig(), *[0.0] * 6, 0.2, *[0.0] * 6)) == 2
    (text,) = kept(GuardsConfig(kept_steps=40), 0.5, 1.0, 1.0, 1.0)
    assert text.startswith("step 60: 100.0 % of the unlabeled pixels were kept for 40 steps. Every pseudo-label counts")
    assert kept(GuardsConfig(), *[1.0] * 20) == []  # by design, as in mean teacher
    assert kept(GuardsConfig(), *[0.0] * 4, start=700) == []  # it counts from where this launch began
    assert kept(GuardsConfig(warn=False), *[0.0] * 20) == []


@pytest.mark.parametrize(
    ("step", "matrix", "behind", "words"),
    [
        (500, [[50, 0], [50, 0]], None, ["predicts sky on 100.0 %", "is it on 50.0 %"]),
        (500, [[50, 0], [47, 3]], None, ["predicts sky on 97.0 %"]),
        (500, [[50, 0], [44, 6]], None, []),  # 6 of 50 is more than a tenth
        (500, [[990, 0], [5, 5]], None, []),  # nearly everything is sky
        (99, [[50, 0], [50, 0]], 50.0, []),  # too early to tell
        (500, [[50, 0], [0, 50]], 10.5, ["10.5 points of mIoU behind the student"]),
        (500, [[50, 0], [0, 50]], 9.5, []),
        (500, [[0, 0], [0, 0]], None, []),
    ],
)
def test_an_evaluation_shows_a_collapse(step: int, matrix: list, behind: float | None, words: list[str]) -> None:
    told: list[str] = []
    guards = Guards(GuardsConfig(), 0, 1000, lambda template, text: told.append(template % text))
    for _ in range(2):
        guards.evaluation(step, torch.tensor(matrix), ("sky", "tree"), behind)
    assert len(told) == bool(words)
    for word in words:
        assert word.replace("is it on", "are it on") in told[0]
    guards.evaluation(step, torch.eye(2) * 50, ("sky", "tree"), 0.0)
    guards.evaluation(step, torch.tensor(matrix), ("sky", "tree"), behind)
    assert len(told) == 2 * bool(words)
