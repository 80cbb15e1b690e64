"""What a sweep remembers: no trial lost, none twice, none left running, whatever its driver met."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from sweeps import write_sweep

from raysemi.errors import ConfigError
from raysemi.tune import checks, driver, sweep
from raysemi.tune.search import Search, scheduler
from raysemi.tune.spaces import Cell, Draw
from raysemi.tune.study import Study, Trial, best_of, best_of_each, is_driven, only_driver, read
from raysemi.tune.winner import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own code


Opened = Callable[..., Study]


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest) -> str:
    """A sweep's `storage`, with nothing in it."""
    if request.param == "sqlite":
        return "sqlite"
    url: str = request.getfixturevalue("postgres").database(f"study-{time.time_ns()}")
    return url


@pytest.fixture
def opened(storage: str, tmp_path: Path, scenes: Path) -> Iterator[Opened]:
    """opened("a.b=value", ...) -> the study of a sweep, as each start of its driver opens it."""

    def open_study(*overrides: str) -> Study:
        config = sweep.load(write_sweep(tmp_path, scenes), [f"storage={storage}", *overrides])
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / "sweep.yaml").write_text(sweep.dump(config))
        studies.append(Study(config, checks.build(config, tried=False), tmp_path / "sweep"))
        return studies[-1]

    studies: list[Study] = []
    yield open_study
    for study in studies:
        study.close()


@pytest.fixture
def study(opened: Opened) -> Study:
    return opened()


def searching(study: Study, limit: int) -> Search:
    return Search(study, lambda trial: {"number": trial.number, "draw": study.draw(trial)}, limit)


def result(step: int, miou: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "miou": miou, "hours": 0.25, "first_step_s": 1.5, **more}


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.history()]


def test_every_end_of_a_trial_has_its_state_and_reason(study: Study) -> None:
    search = searching(study, 6)
    for name in "abcdef":
        search.suggest(name)
    search.on_trial_result("a", result(2, 30.0))
    search.on_trial_complete("a", result(6, 41.0, finished=True))
    search.on_trial_complete("b", result(2, 20.0))  # stopped by the scheduler
    search.on_trial_complete("c", {"step": 0, "failed": "loss must be finite"})
    search.on_trial_complete("d", result(6, math.nan, finished=True))
    search.on_trial_complete("e", None, error=True)
    search.out_of_time = True
    search.on_trial_complete("f", result(4, 25.0))
    assert states(study) == ["finished", "pruned", "failed", "failed", "failed", "pruned"]
    first, stopped, own, endless, dead, late = study.history()
    assert first.curve == {2: 30.0, 6: 41.0}
    assert (first.miou, first.step, first.hours, first.first_step_s) == (41.0, 6, 0.25, 1.5)
    assert first.seconds >= 0.0
    assert stopped.reason == "stopped at step 2"
    assert own.reason == "loss must be finite"
    assert "must be finite" in endless.reason
    assert "died" in dead.reason
    assert late.reason == "the sweep's hours were over"
    assert best_of(study.history(), 3) == [first]


def test_a_new_driver_takes_up_what_was_running(opened: Opened) -> None:
    before = opened()
    search = searching(before, 4)
    given = {name: search.suggest(name) for name in "abc"}
    search.on_trial_result("b", result(2, 33.0))
    search.on_trial_complete("a", result(6, 40.0, finished=True))
    # its driver dies; another one comes
    after = opened()
    search = searching(after, 4)
    again = [search.suggest(name) for name in "xyz"]
    assert again[:2] == [given["b"], given["c"]]  # the same numbers with the same draws
    assert again[2]["number"] == 3
    assert search.suggest("w") == Searcher.FINISHED
    for name in "xyz":
        search.on_trial_complete(name, result(6, 35.0, finished=True))
    assert states(after) == ["finished"] * 4
    assert after.history()[1].curve == {2: 33.0, 6: 35.0}
    drawn = [trial.draw for trial in after.history()]
    assert all(one != other for i, one in enumerate(drawn) for other in drawn[:i])


def test_what_is_planned_is_planned_once(opened: Opened) -> None:
    draw = Draw(Cell("fixmatch", "none", "uniform"), {"optim.lr": 0.02})
    for _ in range(2):
        study = opened()
        study.enqueue(draw, 5, label="a row")
    assert states(study) == ["waiting"]
    assert searching(study, 1).suggest("a")["draw"] == draw
    assert (study.history()[0].seed, study.history()[0].label) == (5, "a row")


def test_another_sweep_is_refused_and_more_trials_are_not(opened: Opened) -> None:
    opened()
    opened("search.trials=50", "prune.name=asha")
    with pytest.raises(ConfigError, match=r"differs in space\.optim\.lr\.high"):
        opened("space.optim.lr={low: 0.001, high: 0.2, log: true}")


def test_the_best_of_each_method_is_repeated_once(opened: Opened) -> None:
    study = opened("repeat={of: method, seeds: 2}")
    words = {"s": "supervised", "f": "fixmatch", "d": "derprop"}
    planned = [("s", 0.01), ("f", 0.01), ("f", 0.02), ("d", 0.01), ("d", 0.02), ("d", 0.03)]
    for method, lr in planned:
        study.enqueue(Draw(Cell(words[method], "none", "uniform"), {"optim.lr": lr}), 0)
    search = searching(study, len(planned))
    for number in range(len(planned)):
        search.suggest(str(number))
    search.on_trial_complete("0", result(6, 31.0, finished=True))
    search.on_trial_complete("1", result(6, 44.0, finished=True))
    search.on_trial_complete("2", result(6, 47.0, finished=True))
    search.on_trial_complete("3", result(2, 50.0))  # all of derprop are stopped early
    search.on_trial_complete("4", result(4, 33.0))
    search.on_trial_complete("5", {"step": 0, "failed": "loss must be finite"})
    assert [trial.number for trial in best_of_each(study.history())] == [0, 2, 4]
    with contextlib.closing(Study(study.sweep, study.space, study.folder, "repeats")) as repeats:
        for _ in range(2):  # planned once, however often a driver begins
            assert driver._plan_repeats(repeats, study) == sweep.num_repeats(study.sweep) == 12
        plan = [
            (one.of, one.draw.cell.method, one.draw.settings.get("optim.lr"), one.seed) for one in repeats.history()
        ]
    pairs = [(0, "supervised", 0.01), (2, "fixmatch", 0.02), (4, "derprop", 0.02)]
    assert plan == [
        line
        for seed in (1, 2)
        for of, method, lr in pairs
        for line in ((of, method, lr, seed), (-1, method, None, seed))
    ]


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    with only_driver(tmp_path):
        assert is_driven(tmp_path)
        with pytest.raises(ConfigError, match="whose driver is alive"), only_driver(tmp_path):
            pass
    assert not is_driven(tmp_path)


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_scheduler_knows_what_earlier_starts_have_seen(opened: Opened, name: str) -> None:
    study = opened(f"prune.name={name}", "prune.grace=2")
    search = searching(study, 12)
    for number in range(4):
        search.suggest(str(number))
        for step in (2, 4):
            search.on_trial_result(str(number), result(step, 40.0 + number))
        search.on_trial_complete(str(number), result(6, 50.0 + number, finished=True))

    def judged(miou: float) -> str:
        nobody: Any = type("Nobody", (), {"get_live_trials": lambda self: []})()
        fresh = scheduler(study.sweep.prune, study, steps=6, every=2)
        trial: Any = type("New", (), {"trial_id": f"new-{miou}"})()
        fresh.on_trial_add(nobody, trial)
        return fresh.on_trial_result(nobody, trial, result(2, miou))

    assert judged(10.0) == TrialScheduler.STOP
    assert judged(60.0) == TrialScheduler.CONTINUE


def test_the_winner_is_a_recipe(opened: Opened) -> None:
    study = opened()
    search = searching(study, 3)
    for number, miou in enumerate((31.0, 44.0, 38.0)):
        search.suggest(str(number))
        search.on_trial_complete(str(number), result(6, miou, finished=True))
    recipe = write_recipe(study.folder)
    assert recipe.trial.number == 1
    from raysemi import config_io

    trained = study.space.config(recipe.trial.draw, "run=runs/best", "seed=0")
    assert config_io.load(recipe.file) == trained
    with pytest.raises(ConfigError, match="--trial must be a trial of"):
        write_recipe(study.folder, number=3)


def test_reading_changes_nothing(opened: Opened, tmp_path: Path) -> None:
    study = opened()
    searching(study, 2).suggest("a")
    config, trials, repeats = read(study.folder)
    assert (config, repeats) == (study.sweep, [])
    assert [type(trial) for trial in trials] == [Trial]
    assert trials[0].state == "running"
    with pytest.raises(ConfigError, match=r"without sweep\.yaml"):
        read(tmp_path / "none")


def test_reading_before_the_first_driver_makes_no_tables(storage: str, tmp_path: Path, scenes: Path) -> None:
    config = sweep.load(write_sweep(tmp_path, scenes), [f"storage={storage}"])
    (tmp_path / "sweep.yaml").write_text(sweep.dump(config))
    assert read(tmp_path) == (config, [], [])
    assert not (tmp_path / "study.db").exists()
    (tmp_path / "study.db").touch()  # as SQLite's driver begins
    assert read(tmp_path) == (config, [], [])
    assert (tmp_path / "study.db").stat().st_size == 0
