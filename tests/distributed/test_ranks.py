"""N ranks equal one rank: real gloo processes, no Ray. The comparison must fail when the sum over ranks is lost."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ranks
from makers import tiny_run, true_boxes

from raysemi.data.loader import Stream
from raysemi.data.pool import Pool
from raysemi.engine import distributed
from raysemi.engine.gradients import GradientRule, GradientsConfig, SideLosses
from raysemi.engine.trainer import Trainer
from raysemi.launch.restore import build, open_pools
from raysemi.methods.base import SingleRank
from raysemi.ops.photometric import PARAMETERS

pytestmark = pytest.mark.timeout(900)  # of a busy machine: three processes make all cases

RANK = [
    "weighting=rank",
    "weighting.confidence=0.145",
    "weighting.memory=5",
    "weighting.unlabeled=true",
    "weighting.per_step=4",
]
CASES = {
    "supervised": ["supervised"],
    "fixmatch": ["fixmatch", "method.threshold=0.145"],
    "mean_teacher": ["mean_teacher"],
    "unimatch": ["unimatch", "method.threshold=0.145"],
    "unimatch_v2": ["unimatch_v2", "method.threshold=0.145"],
    "corrmatch": ["corrmatch", "method.threshold.initial=0.145"],
    "fixmatch-compiled": ["fixmatch", "method.threshold=0.145", "train.compile=true"],
    "derprop": ["derprop", "method.threshold.initial=0.145"],
    "derprop-momentum": [
        "derprop", "method.threshold.initial=0.145", "method.labeler=momentum", "method.fp.weight=0",
    ],
    "u2pl": [
        "u2pl", "method.group=2", "method.cutmix=1", "method.warmup_periods=0", "method.contrast.delta_p=0.1",
        "method.representation.hidden=6", "method.representation.dim=8", "method.queue.size=150",
        "method.queue.first_size=250", "method.queue.max_new=20",
    ],
    "augseg": ["augseg", "method.threshold=0.145", "method.group=2"],
    "ael": [
        "ael", "method.threshold=0.145", "method.group=2", "method.paste.p=0.8", "method.paste.classes=3",
        "method.momentum=0.9", "method.cutmix.per_class=2", "method.cutmix.object_area=0.01",
    ],
    "fixmatch-rank": ["fixmatch", "method.threshold=0.145", *RANK],
    "fixmatch-rank-boxes": [
        "fixmatch", "method.threshold=0.145", *RANK, "weighting.unlabeled=null", "weighting.detector=masks",
    ],
    "unimatch-rank-pareto": [
        "unimatch", "method.threshold=0.145", *RANK, "weighting.preset=released", "gradients=pareto",
    ],
    "fixmatch-measured": ["fixmatch", "method.threshold=0.145", "gradients.measure_every=1"],
    "fixmatch-pareto": ["fixmatch", "method.threshold=0.145", "gradients=pareto", "gradients.measure_every=1"],
    "fixmatch-lagged": [  # by turns two backwards of our own and one of the wrapper's
        "fixmatch", "method.threshold=0.145", "gradients=pareto", "gradients.every=2", "gradients.exclusive=alpha",
    ],
    "derprop-pareto": [
        "derprop", "method.threshold.initial=0.145", "gradients=pareto", "gradients.warmup=1",
        "gradients.measure_every=1",
    ],
    "derprop-rank-pareto": ["derprop", "method.threshold.initial=0.145", *RANK, "gradients=pareto"],
    "corrmatch-rank-pareto": [
        "corrmatch", "method.threshold.initial=0.145", *RANK, "gradients=pareto", "gradients.measure_every=1",
    ],
    "corrmatch-second": [
        "corrmatch", "method.threshold.initial=0.145", "method.cutmix.partner=second_view",
    ],
}  # fmt: skip
"""Method, and settings beside those of `trace`."""
STEPS = 3
Trace = dict[str, Any]


class Deaf(distributed.ProcessGroup):
    """Ranks that do not hear each other: what a forgotten sum over ranks would look like."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value


MICRO = ("fixmatch", "unimatch-rank-pareto", "derprop-pareto")
"""Cases that two ranks also make in two micro-batches each, of a batch of 8."""


def trace(
    pools: Path,
    folder: Path,
    case: str,
    across: Any,
    broken_rank: int | None = None,
    norm: str = "frozen",
    batch: int = 4,
    micro: int | None = None,
) -> Trace:
    """Global losses and the gradient of the first steps of a run on this rank's share.

    With `broken_rank`, the strong views of that rank are NaN in the last step.
    """
    folder.mkdir(exist_ok=True)
    # weight decay 0: SGD's momentum buffer after the first step is then the gradient itself
    config = tiny_run(
        pools, folder / f"{case}-{across.rank}-{across.world}", *CASES[case],
        f"model.batch_norm={norm}", f"train.batch.labeled={batch}", f"train.batch.unlabeled={batch}",
        "optim.weight_decay=0", "optim.lr=0.001", "train.steps=20",
        *([] if micro is None else [f"train.micro_batch={micro}"]),
    )  # fmt: skip
    student, learner = build(config, 7)
    trainer = Trainer(
        student, learner, config.train, config.optim,
        across=across, device=torch.device("cpu"), period=1, seed=config.seed, gradients=config.gradients,
    )  # fmt: skip
    read = ("labeled", "unlabeled") if learner.uses_unlabeled else ("labeled",)
    stream = Stream(
        config.data, {name: Pool.open(pools / name) for name in read}, config.seed, batch, batch,
        across.rank, across.world, learner.strong_views, learner.second_view, 0, STEPS,
        strong=learner.strong, given=learner.given, boxes=open_pools(config).boxes,
    )  # fmt: skip
    losses, gradient = [], None
    for host in stream:
        if trainer.step == STEPS - 1:
            before = {name: value.clone() for name, value in student.state_dict().items()}
            if broken_rank == across.rank:
                host.photometric_VUP[..., PARAMETERS.index("brightness")] = math.nan
        values = trainer.train_step(host)
        names = [name for name in values if name.startswith("loss/")]
        mean = across.sum(torch.stack([values[name] for name in names])) / across.world
        losses.append(dict(zip(names, mean.tolist(), strict=True)))
        if gradient is None:
            gradient = {name: value.clone() for name, value in trainer.optimizer.tensors().items()}
    return {
        "losses": losses,
        "gradient": gradient,
        "buffers": learner.state_dict(),
        "weights": {name: value.clone() for name, value in student.state_dict().items()},
        "before": before,
        "skipped": float(trainer.skipped),
        "measured": dict(trainer._samples.read()),
        "teacher": None if trainer.average is None else trainer.average.model.state_dict(),
    }


def counterexample(number: int, across: Any) -> Trace:
    """Two ranks whose own weights, or own mixes, would make a step that climbs (the specification's vectors)."""
    x = torch.nn.Parameter(torch.zeros(2))
    supervised, unsupervised = torch.tensor([[[-1.0, 1.0], [-1.0, 0.0]], [[1.0, 0.0], [-1.0, -1.0]]])[number]
    measured: dict[int, dict[str, torch.Tensor]] = {}
    config = GradientsConfig(name="pareto", meo=False, measure_every=1)
    rule = GradientRule(config, {x: 1.0}, across, measured.__setitem__)
    found: Trace = {"steps": []}
    for step in range(2):
        x.grad = None
        side_s, side_u = (supervised * x).sum(), (unsupervised * x).sum()
        if step == 1 and number == 1:
            side_u = side_u + (0 * x).sum().abs().sqrt()  # the loss is 0, its gradient is not a number
        rule.backward(SideLosses((side_s + side_u) / 2, side_s, side_u, {}), step)
        assert x.grad is not None
        found["steps"].append(x.grad.clone())
    return found | {"alpha_u": measured[1]["gradients/weight_unsupervised"]}


def rank(number: int, pools: Path, folder: Path) -> None:
    across = distributed.ProcessGroup()
    traces = {case: trace(pools, folder, case, across) for case in CASES}
    for name, case in (("deaf", "supervised"), ("deaf-pareto", "fixmatch-pareto")):
        traces[name] = trace(pools, folder / name, case, Deaf())
    traces["statistics"] = trace(pools, folder / "trained", "u2pl", across, norm="train")
    traces |= {f"{case}-micro": trace(pools, folder / "micro", case, across, batch=8, micro=2) for case in MICRO}
    traces["broken"] = trace(pools, folder / "broken", "fixmatch-pareto", across, broken_rank=1)
    traces["counterexample"] = counterexample(number, across)
    torch.save(traces, folder / f"rank-{number}.pt")


@pytest.fixture(scope="module")
def traces(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trace]]:
    """Traces by case: one rank alone, then each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    scenes = Path(shutil.copytree(scenes, folder / "pools"))  # other tests want theirs without boxes
    true_boxes(Pool.open(scenes / "unlabeled"))
    assert ranks(2, folder, rank, scenes, folder, within=800.0) == [0, 0]
    alone = {case: trace(scenes, folder / "alone", case, SingleRank()) for case in CASES}
    alone |= {"deaf": alone["supervised"], "deaf-pareto": alone["fixmatch-pareto"]}
    alone |= {"broken": alone["fixmatch-pareto"], "counterexample": {}}
    alone["statistics"] = trace(scenes, folder / "parts", "u2pl", SingleRank(), norm="train", micro=2)
    alone |= {f"{case}-micro": trace(scenes, folder / "whole", case, SingleRank(), batch=8) for case in MICRO}
    both = [torch.load(folder / f"rank-{number}.pt", weights_only=True) for number in range(2)]
    return {case: [alone[case], *(one[case] for one in both)] for case in alone}


def largest_difference(a: Trace, b: Trace) -> float:
    """Over all losses and the whole first gradient, relative to the largest entry of each."""
    differences = [abs(x[name] - y[name]) for x, y in zip(a["losses"], b["losses"], strict=True) for name in x]
    for name, value in a["gradient"].items():
        differences.append(((value - b["gradient"][name]).abs().max() / a["scale"]).item())
    return max(differences)


MEMORIES = ("labeled", "unlabeled")
BUFFERS = {
    "derprop": {"threshold"},
    "corrmatch": {"threshold"},
    "u2pl": {"contrast.queues.keys_TD", "contrast.queues.inserted_K"},
    "ael": {"bank_K", "cache.crops_T4SS", "cache.inserted_K", "cache.presence_TK"},
}
"""What a method carries, by the first part of the case."""


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(traces, case):
    one, first, second = traces[case]
    one["scale"] = max(value.abs().max() for value in one["gradient"].values()).clamp(min=1.0)
    assert any(value.abs().max() > 1e-3 for value in one["gradient"].values())  # else nothing is compared
    assert largest_difference(one, first) < 1e-5
    assert largest_difference(one, second) < 1e-5
    held = {"weighting.step", *(f"weighting.{kind}.{what}" for kind in MEMORIES for what in ("keys_TD", "inserted_K"))}
    expected = BUFFERS.get(case.split("-")[0], set()) | (held if "rank" in case else set())
    assert one["buffers"].keys() == first["buffers"].keys() == expected
    for name, value in first["buffers"].items():
        atol = 1e-3 if value.dtype == torch.float16 else 1e-6  # in half precision the last digit may fall either way
        if value.is_floating_point():
            assert torch.allclose(one["buffers"][name], value, atol=atol)
        else:
            assert torch.equal(one["buffers"][name], value), name
        assert torch.equal(value, second["buffers"][name])  # a number that decides is the same on all ranks


@pytest.mark.parametrize("case", MICRO)
def test_two_ranks_of_two_micro_batches_equal_one_of_none(traces, case):
    one, first, second = traces[f"{case}-micro"]
    one["scale"] = max(value.abs().max() for value in one["gradient"].values()).clamp(min=1.0)
    assert any(value.abs().max() > 1e-3 for value in one["gradient"].values())
    assert largest_difference(one, first) < 1e-5
    assert largest_difference(one, second) < 1e-5
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, one["weights"][name], rtol=1e-4, atol=1e-5)
    assert first["measured"] == second["measured"]
    assert list(one["measured"]) == list(first["measured"])


def test_micro_batches_are_ranks_to_batch_norm(traces):
    """In train mode each normalises by itself, and the statistics are their mean: two on one rank equal two ranks."""
    parts, *ranks = traces["statistics"]
    for each in ranks:
        parts["scale"] = max(value.abs().max() for value in parts["gradient"].values()).clamp(min=1.0)
        assert largest_difference(parts, each) < 1e-5
        for network in ("weights", "teacher"):
            for name, value in parts[network].items():
                if not name.endswith("num_batches_tracked"):
                    torch.testing.assert_close(value, each[network][name], rtol=1e-4, atol=1e-5)


def test_the_memories_of_rank_weighting_are_filled(traces):
    for case in ("fixmatch-rank", "derprop-rank-pareto", "corrmatch-rank-pareto"):
        for memory in MEMORIES:
            assert traces[case][0]["buffers"][f"weighting.{memory}.inserted_K"].sum() > 0
    confirmed_K = traces["fixmatch-rank-boxes"][0]["buffers"]["weighting.unlabeled.inserted_K"]
    assert 0 < confirmed_K.sum() < traces["fixmatch-rank"][0]["buffers"]["weighting.unlabeled.inserted_K"].sum()
    weighted, plain = (traces[case][0]["losses"] for case in ("fixmatch-rank", "fixmatch"))
    assert weighted[0]["loss/supervised"] == plain[0]["loss/supervised"]
    assert weighted[0]["loss/consistency"] < 0.9 * plain[0]["loss/consistency"]


def test_the_queues_of_u2pl_are_filled(traces):
    inserted_K = traces["u2pl"][0]["buffers"]["contrast.queues.inserted_K"]
    assert (inserted_K > 0).sum() > 1
    assert traces["u2pl"][0]["losses"][-1]["loss/contrastive"] > 0.1


def test_the_cache_and_the_bank_of_ael_are_filled(traces):
    buffers = traces["ael"][0]["buffers"]
    assert buffers["cache.inserted_K"].sum() == STEPS * 2  # a crop of each group of two
    assert buffers["cache.presence_TK"][:-1].any(dim=1).sum() == buffers["cache.inserted_K"].clamp(max=2).sum()
    assert (buffers["bank_K"] != 0.5).any()


def test_ranks_agree_on_a_teachers_own_statistics(traces):
    """BatchNorm in train mode: each rank normalises by its own share, but the statistics are one after every step."""
    _, first, second = traces["statistics"]
    statistics = [name for name in first["teacher"] if name.endswith(("running_mean", "running_var"))]
    assert statistics
    for name, value in first["teacher"].items():
        assert torch.equal(value, second["teacher"][name]), name


def test_the_comparison_fails_without_the_sum_over_ranks(traces):
    """Ranks ignore different numbers of pixels, so a mean of means is another number."""
    one, first, _ = traces["deaf"]
    one["scale"] = max(value.abs().max() for value in one["gradient"].values()).clamp(min=1.0)
    assert largest_difference(one, first) > 1e-3


def test_unsupervised_terms_take_part(traces):
    for case, term in (
        ("fixmatch", "loss/consistency"),
        ("mean_teacher", "loss/consistency"),
        ("unimatch", "loss/strong_2"),
        ("unimatch_v2", "loss/strong_2"),
        ("corrmatch", "loss/strong"),
        ("corrmatch-second", "loss/strong"),
        ("corrmatch-rank-pareto", "loss/strong"),
        ("derprop-rank-pareto", "loss/strong"),
        ("fixmatch-pareto", "loss/consistency"),
        ("fixmatch-compiled", "loss/consistency"),
        ("derprop", "loss/strong"),
        ("u2pl", "loss/consistency"),
        ("u2pl", "loss/contrastive"),
        ("derprop-momentum", "loss/strong"),
        ("augseg", "loss/consistency"),
        ("ael", "loss/consistency"),
        ("ael", "loss/consistency_labeled"),
    ):
        assert all(losses[term] > 1e-4 for losses in traces[case][0]["losses"])


def test_pareto_weights_come_from_global_gradients(traces):
    """In each step one rank's weights equal two ranks', whose own are the same bits; uniform ones they are not."""
    for case in ("fixmatch-pareto", "derprop-pareto", "corrmatch-rank-pareto"):
        one, first, second = (trace["measured"] for trace in traces[case])
        assert list(one) == [1, 2, 3]
        assert first == second
        for step, values in one.items():
            assert values == pytest.approx(first[step], rel=1e-4, abs=1e-5), (case, step)
        assert one[3]["gradients/weight_unsupervised"] != pytest.approx(0.5, abs=0.01)
        assert one[3]["gradients/least_cosine"] > 0
    assert traces["derprop-pareto"][0]["measured"][1]["gradients/weight_unsupervised"] == 0.5  # warm-up


def test_weights_of_each_rank_are_another_method(traces):
    """Without the sum over ranks the comparison must fail."""
    one, first, _ = traces["deaf-pareto"]
    assert first["measured"][1] != pytest.approx(one["measured"][1], rel=1e-2)


def test_two_ranks_that_would_climb_by_themselves(traces):
    """alpha_u = 1 and 0.4 on their own; 0.25 for the mean gradients (0, 0.5) and (-1, -0.5)."""
    for rank_trace in traces["counterexample"][1:]:
        assert rank_trace["alpha_u"].item() == pytest.approx(0.25, abs=1e-9)
        torch.testing.assert_close(rank_trace["steps"][0], torch.tensor([-0.25, 0.25]))
        assert rank_trace["steps"][1].isnan().all()  # of one rank's gradient alone: all ranks skip the step


def test_a_step_that_is_broken_on_one_rank_is_skipped_on_all(traces):
    for rank_trace in traces["broken"][1:]:
        assert rank_trace["skipped"] == 1
        for name, value in rank_trace["before"].items():
            assert torch.equal(value, rank_trace["weights"][name]), name


def test_measuring_changes_not_a_bit_under_data_parallel_training(traces):
    for plain, measured in zip(traces["fixmatch"], traces["fixmatch-measured"], strict=True):
        assert plain["losses"] == measured["losses"]
        for name, value in plain["weights"].items():
            assert torch.equal(value, measured["weights"][name]), name
        assert len(measured["measured"]) == STEPS
        assert plain["measured"] == {}


def test_replicas_stay_one_under_the_pareto_rule(traces):
    for case in ("fixmatch-pareto", "fixmatch-lagged", "derprop-pareto", "corrmatch-rank-pareto"):
        one, first, second = traces[case]
        for name, value in first["weights"].items():
            assert torch.equal(value, second["weights"][name]), name
            torch.testing.assert_close(value, one["weights"][name], rtol=1e-4, atol=1e-5)
