"""What a sweep draws, and everything that is refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from sweeps import write_sweep

from raysemi.errors import ConfigError
from raysemi.tune import checks, sweep
from raysemi.tune.spaces import Cell, Draw, Space


def build(folder: Path, pools: Path, *overrides: str, **settings: object) -> Space:
    return checks.build(sweep.load(write_sweep(folder, pools, **settings), overrides))


def draws(space: Space, count: int) -> list[Draw]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    return [space.draw(study.ask()) for _ in range(count)]


def test_each_method_draws_its_own_settings(tmp_path: Path, scenes: Path) -> None:
    space = build(
        tmp_path,
        scenes,
        space={
            "method.strong_weight": "declared",
            "fixmatch.threshold": "declared",
            "optim.lr": {"low": 0.01, "high": 1},
        },
    )
    found = draws(space, 60)
    assert {draw.cell.method for draw in found} == {"supervised", "fixmatch", "derprop"}
    own = {"supervised": set(), "fixmatch": {"method.threshold"}, "derprop": {"method.strong_weight"}}
    for draw in found:
        assert set(draw.settings) == {"optim.lr", *own[draw.cell.method]}
        assert 0.01 <= draw.settings["optim.lr"] <= 1
    thresholds = [draw.settings["method.threshold"] for draw in found if draw.cell.method == "fixmatch"]
    assert 0.7 <= min(thresholds) < max(thresholds) <= 0.99  # as fixmatch declares it


def test_conditions_decide_what_is_drawn(tmp_path: Path, scenes: Path) -> None:
    space = build(
        tmp_path,
        scenes,
        methods=["derprop"],
        weightings=["none", "rank"],
        space={
            "method.threshold.momentum": "declared",  # before the setting that it depends on
            "method.threshold.mode": "declared",
            "weighting.k": {"choices": [3, 5]},
        },
    )
    found = draws(space, 40)
    for draw in found:
        dynamic = draw.settings["method.threshold.mode"] == "dynamic"
        assert ("method.threshold.momentum" in draw.settings) == dynamic
        assert ("weighting.k" in draw.settings) == (draw.cell.weighting == "rank")
    assert len({draw.settings["method.threshold.mode"] for draw in found}) == 2
    assert len({draw.cell for draw in found}) == 2


def test_a_choice_brings_what_must_come_with_it(tmp_path: Path, scenes: Path) -> None:
    space = build(tmp_path, scenes, methods=["derprop"], space={"method.labeler": "declared"})
    found = {draw.settings["method.labeler"]: draw for draw in draws(space, 20)}
    assert found["momentum"].settings["method.fp.weight"] == 0.0
    assert "method.fp.weight" not in found["student"].settings


def test_a_trial_is_the_run_that_its_overrides_make(tmp_path: Path, scenes: Path) -> None:
    space = build(tmp_path, scenes, methods=["derprop"], space={"method.kernel": "declared"}, set={"train.steps": 7})
    draw = Draw(Cell("derprop", "none", "uniform"), {"method.kernel": [-1, 0, 1]})
    config = space.config(draw, "run=here")
    assert (config.method.kernel, config.train.steps) == ((-1.0, 0.0, 1.0), 7)
    assert space.overrides(draw) == ["train.steps=7", "method.kernel=[-1, 0, 1]"]


def test_a_grid_is_every_combination_once(tmp_path: Path, scenes: Path) -> None:
    space = build(
        tmp_path,
        scenes,
        methods=["derprop"],
        search={"name": "grid"},
        space={
            "method.threshold.mode": "declared",
            "method.threshold.momentum": {"choices": [0.9, 0.99]},
            "method.order": {"choices": [0, 1, 2]},
        },
    )
    # dynamic: 2 momenta x 3 orders; fixed: 3 orders, since no momentum is drawn
    assert len(space.grid) == len({json.dumps(draw.settings) for _, draw in space.grid}) == 9


def test_rows_are_a_grid_of_their_own(tmp_path: Path, scenes: Path) -> None:
    rows = [
        {"label": "without", "set": {"method.order": 0}, "published": 71.5},
        {"label": "both", "set": {"method.order": 1, "weighting": "rank"}},
    ]
    space = build(tmp_path, scenes, methods=["derprop"], search={"name": "grid"}, space={}, rows=rows)
    assert [label for label, _ in space.grid] == ["without", "both"]
    assert space.grid[1][1] == Draw(Cell("derprop", "rank", "uniform"), {"method.order": 1})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["methods=[derpop]"], "methods must be among"),
        (["weightings=[rnk]"], "weightings must be among none, rank; got rnk. Did you mean rank?"),
        (["space.method.ordr=declared"], "Did you mean order?"),
        (["space.optim.lrr={low: 1, high: 2}"], "space.optim.lrr must be a setting that a run of this sweep has"),
        (["space.optim.lr={low: 2, high: 1}"], "an empty range"),
        (["space.optim.lr={choices: []}"], "choices must hold at least one value"),
        (["space.optim.lr=declared"], "since optim.lr declares none"),
        (["space.derprop.order={choices: [0, 9]}"], "method.order must be at most 8; got 9"),
        (["space.weighting.k=declared"], "space.weighting.k must be a setting that a run of this sweep has"),
        (
            ["methods=[derprop]", "space.method.threshold.momentum=declared", "set.method.threshold.mode=fixed"],
            "needs method.threshold.mode=dynamic; got fixed alone",
        ),
        (["objectives=[loss]"], "objectives.0 must be one of miou, hours"),
        (["search.trials=0"], "search.trials must be at least 1"),
        (["search.hours=0"], "search.hours must be greater than 0"),
        (["set.seed=3"], "Use seeds"),
        (["set.train.stepss=3"], "train.stepss"),
        (["set.optim.lr=0.1"], "space.optim.lr must not be fixed as well"),
        (["prune.name=asha", "prune.grace=6"], "prune.grace must be less than train.steps (6)"),
        (["set.data.labeled=/nowhere"], "/nowhere"),
        (["set.data.unlabeled=null"], "data.unlabeled must name a pool for method fixmatch"),
        (["methods=[supervised]", "weightings=[rank]"], "weightings and gradients must go with one of the methods"),
        (["resources.gpus=0.5", "resources.workers=2"], "gpus must be 0 or 1 with several workers"),
        (["resources.workers=2"], "train.batch.labeled must give each rank at least 2 images"),
        (["storage=postgresql://me:word@host/db"], "must not hold a password"),
        (["storage=postgresql://me@host/db?password=word"], "must not hold a password"),
        (["storage=postgres://me:word@host/db"], "must not hold a password"),
        (["storage=postgresql+asyncpg://host/db"], "must be sqlite or a postgresql:// URL"),
        (["storage=mysql://host"], "must be sqlite or a postgresql:// URL"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(
    tmp_path: Path, scenes: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, scenes, *overrides)
    assert said in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, scenes, "methods=[derpop,fixmatch]", "gradients=[up]", "set.seed=3")
    assert len(caught.value.faults) == 3
