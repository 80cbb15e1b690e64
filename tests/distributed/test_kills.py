"""Ranks that are killed: the same command goes on to the same bits. `make soak` has more kill points."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import Kill, soak


@pytest.mark.slow
def test_a_run_killed_in_a_step_a_save_and_an_evaluation_ends_with_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    kills = [Kill("step", 5, 0.03, (0, 1)), Kill("save", 10, 0.01, (0,)), Kill("evaluation", 12, 0.05, (1,))]
    assert len(soak(tmp_path, kills, 20, scenes, fresh=False)) == len(kills)
