"""N ranks equal one rank: real gloo processes, no Ray. The comparison must fail when the sum over ranks is lost."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import tiny_run

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine import distributed
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build
from raysemi.methods.base import SingleRank

CASES = {
    "supervised": ["supervised"],
    "fixmatch": ["fixmatch", "method.threshold=0.145"],
    "fixmatch-compiled": ["fixmatch", "method.threshold=0.145", "train.compile=true"],
    "derprop": ["derprop", "method.threshold.initial=0.145"],
    "derprop-momentum": [
        "derprop", "method.threshold.initial=0.145", "method.labeler=momentum", "method.fp.weight=0",
    ],
}  # fmt: skip
"""Method, and settings beside those of `trace`."""
STEPS = 3
Trace = dict[str, Any]


class Deaf(distributed.ProcessGroup):
    """Ranks that do not hear each other: what a forgotten sum over ranks would look like."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value


def trace(pools: Path, folder: Path, case: str, across: Any) -> Trace:
    """Global losses and the gradient of the first steps of a run on this rank's share."""
    # weight decay 0: SGD's momentum buffer after the first step is then the gradient itself
    config = tiny_run(
        pools, folder / f"{case}-{across.rank}-{across.world}", *CASES[case],
        "model.batch_norm=frozen", "train.batch.labeled=4", "train.batch.unlabeled=4", "optim.weight_decay=0",
        "optim.lr=0.001", "train.steps=20",
    )  # fmt: skip
    student, learner = build(config, 7)
    trainer = Trainer(
        student, learner, config.train, config.optim,
        across=across, device=torch.device("cpu"), period=1, seed=config.seed,
    )  # fmt: skip
    stream = Stream(
        config.data, {name: Pool.open(pools / name) for name in ("labeled", "unlabeled")}, config.seed, 4, 4,
        across.rank, across.world, learner.strong_views, learner.second_view, 0, STEPS,
    )  # fmt: skip
    losses, gradient = [], None
    for host in stream:
        values = trainer.train_step(host)
        names = [name for name in values if name.startswith("loss/")]
        mean = across.sum(torch.stack([values[name] for name in names])) / across.world
        losses.append(dict(zip(names, mean.tolist(), strict=True)))
        if gradient is None:
            gradient = {name: value.clone() for name, value in trainer.optimizer.tensors().items()}
    return {"losses": losses, "gradient": gradient, "buffers": learner.state_dict()}


def rank(number: int, world: int, pools: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=number, world_size=world)
    across = distributed.ProcessGroup()
    traces = {case: trace(pools, folder, case, across) for case in CASES}
    (folder / "deaf").mkdir(exist_ok=True)
    traces["deaf"] = trace(pools, folder / "deaf", "supervised", Deaf())
    torch.save(traces, folder / f"rank-{number}.pt")
    distributed.leave()


@pytest.fixture(scope="module")
def traces(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trace]]:
    """Traces by case: one rank alone, then each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=rank, args=(number, 2, scenes, folder)) for number in range(2)]
    for process in ranks:
        process.start()
    (folder / "alone").mkdir()
    alone = {case: trace(scenes, folder / "alone", case, SingleRank()) for case in CASES}
    alone["deaf"] = alone["supervised"]
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    both = [torch.load(folder / f"rank-{number}.pt", weights_only=True) for number in range(2)]
    return {case: [alone[case], *(one[case] for one in both)] for case in alone}


def largest_difference(a: Trace, b: Trace) -> float:
    """Over all losses and the whole first gradient, relative to the largest entry of each."""
    differences = [abs(x[name] - y[name]) for x, y in zip(a["losses"], b["losses"], strict=True) for name in x]
    for name, value in a["gradient"].items():
        differences.append(((value - b["gradient"][name]).abs().max() / a["scale"]).item())
    return max(differences)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(traces, case):
    one, first, second = traces[case]
    one["scale"] = max(value.abs().max() for value in one["gradient"].values()).clamp(min=1.0)
    assert any(value.abs().max() > 1e-3 for value in one["gradient"].values())  # else nothing is compared
    assert largest_difference(one, first) < 1e-5
    assert largest_difference(one, second) < 1e-5
    assert one["buffers"].keys() == first["buffers"].keys() == ({"threshold"} if case.startswith("derprop") else set())
    for name, value in first["buffers"].items():
        assert torch.allclose(one["buffers"][name], value, atol=1e-6)
        assert torch.equal(value, second["buffers"][name])  # a number that decides is the same on all ranks


def test_the_comparison_fails_without_the_sum_over_ranks(traces):
    """Ranks ignore different numbers of pixels, so a mean of means is another number."""
    one, first, _ = traces["deaf"]
    one["scale"] = max(value.abs().max() for value in one["gradient"].values()).clamp(min=1.0)
    assert largest_difference(one, first) > 1e-3


def test_unsupervised_terms_take_part(traces):
    for case, term in (
        ("fixmatch", "loss/consistency"),
        ("fixmatch-compiled", "loss/consistency"),
        ("derprop", "loss/strong"),
        ("derprop-momentum", "loss/strong"),
    ):
        assert all(losses[term] > 1e-4 for losses in traces[case][0]["losses"])
