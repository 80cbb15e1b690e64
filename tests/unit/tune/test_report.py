from __future__ import annotations

import csv
import json
import math
import random
import re
import statistics
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from raysemi.errors import ConfigError
from raysemi.tune import checks, sweep
from raysemi.tune.report import as_json, write_report
from raysemi.tune.spaces import Cell, Draw
from raysemi.tune.study import read

SECTIONS = {
    "numbers": None,
    "again": "Train the winner again",
    "searched": None,
    "grid": "Grid",
    "best": "Best trials",
    "methods": "Methods",
    "repeats": "Repeats on new seeds",
    "history": "History",
    "importance": "Importance",
    "parallel": "Parallel coordinates",
    "slices": "Slices",
    "pareto": "Pareto front",
    "cost": "Cost",
    "failed": "Failed trials",
    "settings": None,
}
"""Section -> what the page's end calls it where it is left out."""
TWO_METHODS = """
question: Which threshold & weight <suit> both?
recipes: scenes
methods: [derprop, fixmatch]
weightings: [none, rank]
set: {train.steps: 300, eval.every: 100, data.pools: pools/that/are/gone}
space:
  method.threshold: {low: 0.5, high: 0.98}
  derprop.sparsity: declared
  derprop.order: {choices: [0, 1, 2, 3]}
  derprop.kernel: declared
  weighting.memory: declared
search: {trials: 24}
prune: {name: asha, grace: 100}
repeat: {seeds: 3}
"""
GRID = """
question: Does k matter?
recipes: scenes
methods: [fixmatch]
set: {train.steps: 300}
rows:
  - {label: k = 1, set: {method.threshold: 0.5}, published: 71.25}
  - {label: k = 2, set: {method.threshold: 0.7}, published: 72.5}
  - {label: k = 4, set: {method.threshold: 0.9}}
seeds: [0, 1, 2]
search: {name: grid}
"""


class Sweep:
    """A sweep's folder, written with Optuna alone."""

    def __init__(self, folder: Path, text: str):
        folder.mkdir(parents=True)
        (folder / "sweep.yaml").write_text(text)
        self.folder, self.config = folder, sweep.parse(text)
        self.space = checks.build(self.config, tried=False)
        self.random = random.Random(3)
        self.studies = {}

    def study(self, name="trials"):
        if name in self.studies:
            return self.studies[name]
        objectives = self.config.objectives if name == "trials" else ["miou"]
        self.studies[name] = optuna.create_study(
            storage=f"sqlite:///{self.folder / 'study.db'}",
            study_name=f"{self.folder.name}.{name}",
            directions=["maximize" if one == "miou" else "minimize" for one in objectives],
            sampler=optuna.samplers.RandomSampler(seed=4),
        )
        return self.studies[name]

    def add(self, state="finished", *, to="trials", given=None, seed=0, miou=None, **noted):
        """A trial that has ended or runs; returns its number and mIoU."""
        study = self.study(to)
        if given is not None:
            study.enqueue_trial({}, user_attrs={"given": {"cell": list(given[0]), "settings": given[1]}, "seed": seed})
        trial = study.ask()
        draw = self.space.draw(trial) if given is None else Draw(Cell(*given[0]), given[1])
        if miou is None:
            miou = 40 + 10 * draw.settings.get("method.threshold", 0.7) - 2 * draw.settings.get("method.order", 1)
            miou += self.random.gauss(0, 1)
        steps = {"finished": 3, "pruned": 1, "running": 2, "failed": 0}[state]
        curve = [[100 * n, miou * (0.6 + 0.4 * n / 3)] for n in range(1, steps + 1)]
        hours = 0.011 * (steps + 0.3) * self.random.uniform(0.8, 1.2)
        attributes = {"cell": list(draw.cell), "settings": draw.settings, "seed": seed, "curve": curve, "hours": hours}
        attributes |= {"seconds": hours * 3600, "first_step_s": self.random.uniform(3, 5), **noted}
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if state != "running":
            ends = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
            values = [{"miou": miou, "hours": hours}[one] for one in self.config.objectives]
            values = values if to == "trials" else [miou]
            study.tell(trial, values if state == "finished" else None, state=ends[state])
        return trial.number, miou


def two_methods(folder, *, count=24, text=TWO_METHODS):
    """Recipes first, then drawn trials: every fifth pruned, every ninth failed, the last one running."""
    made = Sweep(folder, text)
    for cell in made.space.bases:
        made.add(given=(cell, {}), label=f"{cell}: the recipe")
    for place in range(count - len(made.space.bases) - 1):
        if place % 9 == 8:
            made.add("failed", reason="loss must be finite; got nan at step 41. <Lower> the learning rate.")
        elif place % 5 == 4:
            made.add("pruned", reason="stopped at step 100")
        else:
            made.add()
    made.add("running")
    return made


def repeat_best(made, seeds=(5, 6, 7), better=1.5):
    """The best trial and its recipe on new seeds; returns both lists of mIoU."""
    _, trials, _ = read(made.folder)
    best = max((one for one in trials if one.state == "finished" and one.params), key=lambda one: one.miou)
    ours, theirs = [], []
    for place, seed in enumerate(seeds):
        given = (best.draw.cell, best.draw.settings)
        ours.append(made.add(to="repeats", given=given, seed=seed, of=best.number, miou=44.0 + better + place)[1])
        theirs.append(made.add(to="repeats", given=(given[0], {}), seed=seed, of=-1, miou=44.0 + 0.5 * place)[1])
    return best, ours, theirs


def grid(folder):
    made = Sweep(folder, GRID)
    mious = {
        label: [60.0 + 3 * place + 1.5 * seed for seed in (0, 1, 2)] for place, (label, _) in enumerate(made.space.grid)
    }
    for seed in (0, 1, 2):
        for label, draw in made.space.grid:
            if (label, seed) == ("k = 4", 2):
                made.add("failed", given=draw, seed=seed, label=label, reason="CUDA out of memory")
                mious[label].pop()
            else:
                made.add(given=draw, seed=seed, label=label, miou=mious[label][seed])
    return made, mious


class Outline(HTMLParser):
    """Ids, links to elsewhere, tags left open, and the text of each table's rows by section."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.outside, self.open, self.rows, self.section, self.cell = [], [], [], {}, "", None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.outside += [given[name] for name in ("src", "href", "srcset") if not given.get(name, "#").startswith("#")]
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "section":
            self.section = given["id"]
            self.rows[self.section] = []
        elif tag == "tr":
            self.rows[self.section].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[self.section][-1].append(" ".join(self.cell.split()))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def written(folder):
    """The page, its outline, and its parts by section; everything that any page must keep to is checked."""
    file = write_report(folder)
    assert file == folder / "report.html"
    page = file.read_text()
    outline = Outline(page)
    assert outline.open == []
    assert outline.outside == []
    assert len(outline.ids) == len(set(outline.ids))
    assert "://" not in page
    assert "<script" not in page
    assert not re.search(r"@import|url\((?!#)|=\"nan|[ ,]nan[ ,]", page.partition('id="failed"')[0])
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(outline.ids)
    parts = {part: page.split(f'<section id="{part}">')[1].split("</section>")[0] for part in outline.rows if part}
    reasons = dict(re.findall(r"<b>([^<]*)</b>: ([^<]*)</p>", parts.get("left-out", "")))
    for section, heading in SECTIONS.items():
        assert (section in parts) != (heading in reasons), section
    return page, outline, parts, reasons


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made = two_methods(tmp_path_factory.mktemp("sweeps") / "both")
    repeated = repeat_best(made)
    return made, repeated, written(made.folder)


def spread(numbers, decimals=1):
    return f"{statistics.mean(numbers):.{decimals}f} ± {statistics.stdev(numbers):.{decimals}f}"


def test_numbers_are_the_study_s(both):
    made, _, (page, outline, _, reasons) = both
    states = [trial.state for trial in made.study().trials]
    ends = [states.count(state) for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)]
    hours = [sum(one.user_attrs["hours"] for one in made.study(name).trials) for name in ("trials", "repeats")]
    assert ends == [18, 3, 2]
    assert outline.rows["numbers"][0][5] == "Interrupted"
    assert outline.rows["numbers"][1:] == [
        ["trials", "24", *map(str, ends), "1", "0", f"{hours[0]:.3g}"],
        ["repeats", "6", "6", "0", "0", "0", "0", f"{hours[1]:.3g}"],
    ]
    assert "Question: Which threshold &amp; weight &lt;suit&gt; both?" in page
    assert set(reasons) == {"Grid", "Pareto front"}
    done = sorted((one for one in made.study().trials if one.values), key=lambda one: -one.value)
    shown = [(row[0], row[4]) for row in outline.rows["best"][1:]]
    assert shown == [(str(one.number), f"{one.value:.2f}") for one in done[:10]]
    starts = [one.user_attrs["first_step_s"] for name in ("trials", "repeats") for one in made.study(name).trials]
    assert outline.rows["cost"][-1][1:] == [
        *("30", f"{statistics.median(starts):.3g}", f"{min(starts):.3g}", f"{max(starts):.3g}")
    ]


def test_what_was_searched_needs_no_pools(both):
    rows = {row[0]: row[1:] for row in both[2][1].rows["searched"]}
    assert rows["fixmatch.threshold"][:2] == ["0.5 to 0.98", "0.95"]
    assert rows["derprop.sparsity"][0] == "0.02 to 1, log"
    assert rows["derprop.order"][:2] == ["0, 1, 2, 3", "1"]
    assert rows["data.pools"] == ["pools/that/are/gone"]
    assert rows["search"] == ["tpe, 24 trials, seed 0"]


def test_repeats_stand_beside_the_defaults_on_the_same_seeds(both):
    _, (best, ours, theirs), (_, outline, _, _) = both
    cell = str(best.draw.cell)
    points = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    assert outline.rows["repeats"][1:] == [
        [
            *(f"trial {best.number}, {cell}", f"{best.miou:.1f}", spread(ours), f"+{spread(points)}", "3 of 3"),
            ", ".join(f"{seed}: {miou:.1f}" for seed, miou in zip((5, 6, 7), ours, strict=True)),
        ],
        [
            *(f"{cell}: the recipe", "–", spread(theirs), "–", "–"),
            ", ".join(f"{seed}: {miou:.1f}" for seed, miou in zip((5, 6, 7), theirs, strict=True)),
        ],
    ]


def test_the_best_of_each_method_stands_beside_its_recipe(both):
    made, (best, ours, theirs), (_, outline, _, _) = both
    points = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    rows = outline.rows["methods"]
    heads = [place for place, row in enumerate(rows) if row[0].startswith("Method")]
    tables = {"method": rows[1 : heads[1]], "cell": rows[heads[1] + 1 :]}
    assert [len(table) for table in tables.values()] == [2, 4]
    finished = [one for one in made.study().trials if one.values]
    for by, table in tables.items():
        for name, count, top, _, miou, *again in table:
            cells = [cell for cell in made.space.bases if name == (cell.method if by == "method" else str(cell))]
            own = [one for one in finished if Cell(*one.user_attrs["cell"]) in cells]
            first = max(own, key=lambda one: one.value)
            assert (count, top.partition(",")[0]) == (str(len(own)), f"trial {first.number}")
            assert miou == f"{first.value:.1f}"
            if first.number == best.number:
                assert again == [f"{spread(ours)} × 3", spread(theirs), f"+{spread(points)}"]
            elif Cell(*first.user_attrs["cell"]) == best.draw.cell and not first.user_attrs["settings"]:
                assert again == [f"{spread(theirs)} × 3", "–", "–"]  # the recipe is its best
            else:
                assert again == ["not repeated", "–", "–"]
    assert any(f"trial {best.number}" in row[2] for row in tables["method"])


def test_a_method_whose_trials_were_all_stopped_shows_how_far_it_got(tmp_path):
    made = Sweep(tmp_path / "stopped", TWO_METHODS)
    number, _ = made.add(given=(("derprop", "none", "uniform"), {"method.order": 2}), miou=51.0)
    far = (("fixmatch", "none", "uniform"), {"method.threshold": 0.7})
    stopped = [made.add("pruned", given=far, curve=[[100, 30.0], [200, 41.5]], reason="stopped at step 200")[0]]
    made.add("pruned", given=(far[0], {"method.threshold": 0.8}), curve=[[100, 44.0]], reason="stopped at step 100")
    for seed in (5, 6):
        made.add(to="repeats", given=far, seed=seed, of=stopped[0], miou=40.0 + seed)
        made.add(to="repeats", given=(far[0], {}), seed=seed, of=-1, miou=44.0)
    _, outline, _, _ = written(made.folder)
    assert [[*row[:3], *row[4:]] for row in outline.rows["methods"][1:]] == [
        [
            *("fixmatch", "0", f"trial {stopped[0]}", "41.5 (stopped at step 200)"),
            *(f"{spread([45, 46])} × 2", "44.0", f"+{spread([1, 2])}"),
        ],
        ["derprop", "1", f"trial {number}", "51.0", "not repeated", "–", "–"],
    ]
    assert outline.rows["repeats"][1][:2] == [f"trial {stopped[0]}, fixmatch", "41.5 (stopped at step 200)"]


def test_importance_is_optuna_s_over_drawn_trials(both):
    made, _, (_, outline, parts, _) = both
    drawn = optuna.create_study(direction="maximize")
    drawn.add_trials([one for one in made.study().trials if one.values and one.params])
    expected = []
    for region in (1.0, 0.5):
        judge = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25, region_quantile=region)
        shares = optuna.importance.get_param_importances(drawn, evaluator=judge)
        expected.append({name: f"{100 * share:.1f} %" for name, share in shares.items()})
    assert {row[0]: row[1] for row in outline.rows["importance"][1:]} == expected[0]
    assert {row[0]: row[2] for row in outline.rows["importance"][1:]} == expected[1]
    assert {"method", "fixmatch.threshold", "derprop.order", "weighting.memory"} <= set(expected[0])
    assert "over 14 finished trials" in parts["importance"]
    assert len(drawn.trials) == 14


def test_drawings_show_each_trial_and_name_each_parameter(both):
    parts = both[2][2]
    captions = re.findall(r"<figcaption>([^<]*)", parts["slices"])
    assert captions == [
        *("method", "fixmatch.threshold", "derprop.sparsity", "derprop.order", "derprop.kernel", "weighting.memory")
    ]
    assert re.findall(r"<figcaption>([^<]*)", parts["parallel"]) in (["derprop", "fixmatch"], ["fixmatch", "derprop"])
    for text in (">threshold<", ">order<", ">not drawn<", ">[-1, 0, 1]<", ">mIoU, %<"):
        assert text in parts["parallel"]
    for colour in range(4):
        assert f"--series-{colour}" in parts["history"]
    assert "#0a0" not in parts["history"] + parts["parallel"] + parts["slices"]  # colours are the page's
    assert parts["history"].count("<svg") == 2
    assert parts["cost"].count("<svg") == 1


def test_failed_trials_have_their_reasons(both):
    made, _, (page, outline, _, _) = both
    failed = [one for one in made.study().trials if one.state == TrialState.FAIL]
    assert [row[0] for row in outline.rows["failed"][1:]] == [f"trial {one.number}" for one in failed]
    assert {row[-1] for row in outline.rows["failed"][1:]} == {failed[0].user_attrs["reason"]}
    assert "<Lower>" not in page


def test_the_winner_s_recipe_holds_its_settings(both):
    made, _, (_, _, parts, _) = both
    best = made.study().best_trial
    recipe = made.folder / "best.yaml"
    text = re.search(r'<pre class="command">(.*?)</pre>', parts["again"]).group(1)
    assert unescape(text) == f"raysemi train {recipe} ray.num_workers=1 ray.cpus_per_worker=1 run=runs/best"
    assert recipe.read_text() in unescape(parts["again"])
    from raysemi import config_io

    settings = config_io.leaves(config_io.load(str(recipe), []))
    assert settings["seed"] == best.user_attrs["seed"]
    assert settings["train.steps"] == 300
    for path, value in best.user_attrs["settings"].items():
        assert settings[path] == value


def test_csv_parses_back(both):
    made = both[0]
    with (made.folder / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    trials = [("trials", one) for one in made.study().trials] + [
        ("repeats", one) for one in made.study("repeats").trials
    ]
    assert [(row["study"], int(row["number"])) for row in rows] == [(name, one.number) for name, one in trials]
    settings = sorted({path for _, one in trials for path in one.user_attrs["settings"]})
    assert list(rows[0])[-len(settings) :] == settings
    for row, (_, one) in zip(rows, trials, strict=True):
        noted = one.user_attrs
        assert [row[part] for part in ("method", "weighting", "gradients")] == noted["cell"]
        assert float(row["hours"]) == noted["hours"]
        assert row["reason"] == noted.get("reason", "")
        assert row["miou"] == ("" if not noted["curve"] else repr(noted["curve"][-1][1]))
        held = {path: row[path] for path in settings if row[path]}
        assert {path: json.loads(text) for path, text in held.items()} == noted["settings"]


def test_front_has_what_none_surpasses(tmp_path):
    made = two_methods(tmp_path / "front", text=f"{TWO_METHODS}objectives: [miou, hours]\n")
    _, outline, parts, reasons = written(made.folder)
    done = [one for one in made.study().trials if one.values]
    front = {one.number for one in made.study().best_trials}  # Optuna's own
    assert {int(row[0]) for row in outline.rows["pareto"][1:]} == front
    assert 1 < len(front) < len(done)
    hours = [float(row[-1]) for row in outline.rows["pareto"][1:]]
    assert hours == sorted(hours)
    assert "Pareto front" not in reasons
    assert "importance" in parts  # of mIoU alone


def test_a_grid_stands_beside_its_published_numbers(tmp_path):
    made, mious = grid(tmp_path / "grid")
    _, outline, parts, reasons = written(made.folder)
    first, second, third = mious.values()
    assert [[row[0], *row[2:]] for row in outline.rows["grid"][1:]] == [
        ["k = 1", "3", spread(first), "71.25", f"−{71.25 - statistics.mean(first):.1f}", "–"],
        ["k = 2", "3", spread(second), "72.50", f"−{72.5 - statistics.mean(second):.1f}", "–"],
        ["k = 4", "2", spread(third), "–", "–", "1"],
    ]
    assert [row[1] for row in outline.rows["grid"][1:]] == [f"method.threshold={value}" for value in (0.5, 0.7, 0.9)]
    assert outline.rows["methods"][1] == ["fixmatch", "8", "k = 4", "method.threshold=0.9", f"{spread(third)} × 2"]
    assert "CUDA out of memory" in parts["failed"]
    assert set(reasons) >= {"Importance", "Repeats on new seeds", "Best trials", "Parallel coordinates"}


def test_an_empty_sweep_says_what_is_missing_and_why(tmp_path):
    made = Sweep(tmp_path / "empty", TWO_METHODS)
    page, _, parts, reasons = written(made.folder)
    assert "No trial has finished yet." in page
    assert list(parts) == ["numbers", "searched", "settings", "left-out"]
    assert "they begin when all trials are over" in reasons["Repeats on new seeds"]
    assert (made.folder / "trials.csv").read_text().startswith("study,number,state,method")
    with pytest.raises(ConfigError, match="folder of one that was begun"):
        write_report(tmp_path)


def test_few_trials_and_a_number_that_is_none(tmp_path):
    made = Sweep(tmp_path / "few", TWO_METHODS)
    for _ in range(3):
        made.add()
    made.add("failed", curve=[[100, 12.5], [200, math.nan]], reason="its result must be finite")
    page, _, _, reasons = written(made.folder)
    assert "there are 3" in reasons["Importance"]
    assert "on one seed" in page
    _, trials, repeats = read(made.folder)
    lines = json.loads(json.dumps(as_json(trials), allow_nan=False))
    assert [line["miou"] is None for line in lines] == [False, False, False, True]
    assert lines[3]["curve"] == [[100, 12.5], [200, None]]
    assert lines[0]["settings"] == trials[0].draw.settings
    assert as_json(repeats) == []


def test_a_sweep_whose_recipes_are_gone_still_has_a_page(tmp_path):
    made = two_methods(tmp_path / "gone", count=12)
    file = made.folder / "sweep.yaml"
    file.write_text(file.read_text().replace("recipes: scenes", "recipes: mine/gone"))
    _, outline, parts, reasons = written(made.folder)
    assert "mine/gone-derprop" in reasons["What was searched"]
    assert {"Parallel coordinates", "Slices"} <= set(reasons)
    assert {"history", "methods", "importance"} <= set(parts)
    assert outline.rows["numbers"][1][1] == "12"
