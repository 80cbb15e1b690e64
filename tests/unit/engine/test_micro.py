"""Micro-batches give the step of the whole share: gradient, losses, memories and statistics."""

from __future__ import annotations

import pytest
import torch
from makers import tiny_run

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine import micro
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build
from raysemi.methods.base import SingleRank

RANK = ["weighting=rank", "weighting.confidence=0.145", "weighting.memory=5", "weighting.unlabeled=true"]
SURE, TAU = "method.threshold=0.145", "method.threshold.initial=0.145"
OHEM = ["method.criterion.name=ohem", "method.criterion.threshold=0.1", "method.criterion.min_kept=3000"]
CASES = {
    # what they divide by is in the data
    "supervised": ["supervised"],
    "fixmatch": ["fixmatch", SURE],
    "fixmatch-balanced": ["fixmatch", SURE, "method.criterion.name=balanced"],
    "fixmatch-pareto": ["fixmatch", SURE, "gradients=pareto", "gradients.measure_every=1"],
    "fixmatch-lagged": ["fixmatch", SURE, "gradients=pareto", "gradients.every=2", "gradients.exclusive=alpha"],
    "mean_teacher": ["mean_teacher"],
    "unimatch": ["unimatch", SURE],
    "unimatch-second": ["unimatch", SURE, "method.cutmix.partner=second_view"],
    "unimatch_v2": ["unimatch_v2", SURE],
    "augseg": ["augseg", SURE, "method.group=2"],
    # passes without gradient find the rest
    "augseg-valid": ["augseg", SURE, "method.group=2", "method.normaliser=valid"],
    "fixmatch-ohem": ["fixmatch", SURE, *OHEM],
    "unimatch-rank-pareto": ["unimatch", SURE, *RANK, "weighting.preset=released", "gradients=pareto"],
    "corrmatch": ["corrmatch", TAU],
    "corrmatch-rank": ["corrmatch", TAU, *RANK],
    "derprop-pareto": ["derprop", TAU, "gradients=pareto", "gradients.warmup=1"],
    "u2pl": [
        "u2pl",
        "method.group=2",
        "method.cutmix=1",
        "method.warmup_periods=0",
        "method.contrast.delta_p=0.1",
        "method.representation.hidden=6",
        "method.representation.dim=8",
        "method.queue.size=150",
        "method.queue.first_size=250",
        "method.queue.max_new=20",
    ],
    "ael": [
        "ael",
        SURE,
        "method.group=2",
        "method.paste.p=0.8",
        "method.paste.classes=3",
        "method.momentum=0.9",
        "method.cutmix.per_class=2",
        "method.cutmix.object_area=0.01",
    ],
}
"""Method, and settings beside those of `trace`."""
SLOW = ("u2pl", "ael")
"""Methods of many collectives, each of which is a pass."""
STEPS = 2


def trace(scenes, folder, case, size, *overrides, norm="frozen"):
    """Losses of the first steps, first gradient, all state after them."""
    config = tiny_run(
        scenes, folder / f"{case}-{size}", *CASES[case], *overrides, f"model.batch_norm={norm}",
        "train.batch.labeled=8", "train.batch.unlabeled=8", "optim.weight_decay=0", "optim.lr=0.001", "train.steps=20",
        *([] if size is None else [f"train.micro_batch={size}"]),
    )  # fmt: skip
    student, method = build(config, 7)
    trainer = Trainer(
        student, method, config.train, config.optim,
        across=SingleRank(), device=torch.device("cpu"), period=1, seed=0, gradients=config.gradients,
    )  # fmt: skip
    read = ("labeled", "unlabeled") if method.uses_unlabeled else ("labeled",)
    stream = Stream(
        config.data, {name: Pool.open(scenes / name) for name in read}, 0, 8, 8, 0, 1, method.strong_views,
        method.second_view, 0, STEPS, strong=method.strong, given=method.given,
    )  # fmt: skip
    losses, gradient = [], {}
    for host in stream:
        host.label_LHW[:3, :25] = 255  # of the first part more than of the others
        host.valid_UHW[:2, :, 30:] = False
        values = trainer.train_step(host)
        losses.append({name: float(value) for name, value in values.items() if name.startswith(("loss/", "gradient"))})
        gradient = gradient or {name: value.clone() for name, value in trainer.optimizer.tensors().items()}
    state = {f"{part}/{name}": value for part, tensors in trainer.snapshot().tensors.items()
             for name, value in tensors.items() if not name.endswith("num_batches_tracked")}  # fmt: skip
    return {"losses": losses, "gradient": gradient, "state": state}


def assert_the_same(one, other):
    scale = max(value.abs().max() for value in one["gradient"].values()).clamp(min=1.0)
    assert max(value.abs().max() for value in one["gradient"].values()) > 1e-3  # else nothing is compared
    assert other["losses"] == [pytest.approx(losses, rel=1e-5, abs=1e-5) for losses in one["losses"]]
    for part in ("gradient", "state"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            atol = 1e-3 if value.dtype == torch.float16 else 1e-5 * scale
            assert (value.double() - other[part][name].double()).abs().max() < atol, name


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_share_give_its_step(scenes, tmp_path, case):
    whole = trace(scenes, tmp_path, case, None)
    for size in (2,) if case in SLOW else (4, 2):
        assert_the_same(whole, trace(scenes, tmp_path, case, size))
    assert any(losses.get("loss/consistency", losses.get("loss/strong", 1.0)) > 1e-4 for losses in whole["losses"])


def test_a_share_at_once_is_the_same_to_the_bit(scenes, tmp_path):
    whole, one = (trace(scenes, tmp_path, "corrmatch", size) for size in (None, 16))
    assert whole["losses"] == one["losses"]
    assert all(torch.equal(value, one["state"][name]) for name, value in whole["state"].items())


@pytest.mark.parametrize("case", ["fixmatch", "corrmatch"])
def test_the_comparison_fails_when_each_part_divides_by_its_own(scenes, tmp_path, case, monkeypatch):
    """Parts ignore different numbers of pixels."""
    whole = trace(scenes, tmp_path, case, None)

    class Deaf(micro.MicroRank):
        def sum(self, value):
            return value * self.world

        def max(self, value):
            return value

    monkeypatch.setattr(micro, "MicroRank", Deaf)
    part = trace(scenes, tmp_path, case, 4)
    assert abs(whole["losses"][0]["loss/total"] - part["losses"][0]["loss/total"]) > 1e-4


def test_a_method_that_asks_otherwise_when_it_trains_is_found():
    rank = micro.MicroRank(SingleRank(), 1, 2, [micro._Answer("sum", torch.ones(3))])
    assert (rank.rank, rank.world) == (1, 2)
    with pytest.raises(RuntimeError, match=r"must make the same collectives .* got max of \(3,\) in place of sum"):
        rank.max(torch.ones(3))
    with pytest.raises(RuntimeError, match="got one more gather"):
        rank.gather(torch.ones(3))


def test_a_step_that_is_not_finite_leaves_no_trace_of_its_parts(scenes, tmp_path, monkeypatch):
    """BatchNorm in train mode, and a memory: both are written in each part."""
    monkeypatch.setattr("raysemi.methods.fixmatch.labeled_loss", lambda *_: (torch.tensor(float("nan")),) * 2)
    settings = [*RANK, "train.stop_at=1"]
    config = tiny_run(
        scenes, tmp_path / "run", "fixmatch", SURE, *settings, "train.batch.labeled=4", "train.batch.unlabeled=4",
        "train.micro_batch=2",
    )  # fmt: skip
    student, method = build(config, 7)
    trainer = Trainer(
        student, method, config.train, config.optim, across=SingleRank(), device=torch.device("cpu"), period=1, seed=0
    )
    before = {name: value.clone() for name, value in [*student.state_dict().items(), *method.state_dict().items()]}
    pools = {name: Pool.open(scenes / name) for name in ("labeled", "unlabeled")}
    (host,) = Stream(config.data, pools, 0, 4, 4, 0, 1, 1, False, 0, 1)
    trainer.train_step(host)
    assert float(trainer.skipped) == 1
    after = {**student.state_dict(), **method.state_dict()}
    for name, value in before.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, after[name]), name
