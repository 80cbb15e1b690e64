"""All ranks stop after the same step, and a run that was cut off says what that has cost."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from raysemi.engine.folder import RunFolder
from raysemi.launch import stop
from raysemi.launch.progress import Progress
from raysemi.launch.stop import StopVote
from raysemi.methods.base import SingleRank


class Threads:
    """Ranks as threads, which wait for each other in `max`."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, votes: list[torch.Tensor]) -> None:
        self.rank, self.world, self._barrier, self._votes = rank, world, barrier, votes
        self.asked = 0

    def max(self, value: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        self._votes[self.rank] = value
        self._barrier.wait(20)
        result = torch.stack(self._votes).max(dim=0).values
        self._barrier.wait(20)
        return result


def test_ranks_of_unequal_pace_stop_after_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "ASKED_EVERY_S", 0.2)
    barrier, votes = threading.Barrier(3), [torch.zeros(2)] * 3
    ranks = [Threads(rank, 3, barrier, votes) for rank in range(3)]
    ended: dict[int, int] = {}

    def train(across: Threads) -> None:
        step = 0
        vote = StopVote(across, torch.device("cpu"), lambda: across.rank == 1 and step >= 100)
        while not vote():
            time.sleep(0.001 * (1 + across.rank))
            step += 1
        ended[across.rank] = step

    threads = [threading.Thread(target=train, args=(across,)) for across in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(ended) == {0, 1, 2}
    assert len(set(ended.values())) == 1
    assert ended[0] >= 100
    assert ranks[0].asked < 0.3 * ended[0]  # most steps ask nobody


def test_one_rank_stops_at_once_on_a_signal_and_asks_the_launcher_seldom() -> None:
    asked: list[int] = []
    vote = StopVote(SingleRank(), torch.device("cpu"), lambda: False, lambda: bool(asked.append(1)))
    assert not any(vote() for _ in range(1000))
    assert len(asked) <= 11  # each time after twice as many, as the steps take no time
    assert StopVote(SingleRank(), torch.device("cpu"), lambda: True)()


def test_what_a_failure_has_cost(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = Progress(folder, 0)
    assert first.first_step() is None
    first.note(17)
    again = Progress(folder, 10)  # killed; the checkpoint is that of step 10
    lost = again.first_step()
    assert lost is not None
    assert lost.steps == 7
    assert 0 <= lost.seconds < 60
    assert again.first_step() is None
    again.end(20)
    assert Progress(folder, 20).first_step() is None
    (tmp_path / "progress.json").write_text("broken")
    assert Progress(folder, 20).first_step() is None
