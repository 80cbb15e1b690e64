"""Recipes, overrides, and the texts of every fault that they can have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raysemi import config_io
from raysemi.config import RunConfig
from raysemi.config_faults import settings
from raysemi.errors import ConfigError
from raysemi.methods import METHODS

BASE = """
run: runs/a
data: {labeled: p/l, unlabeled: p/u, val: p/v}
method: {name: fixmatch, threshold: 0.8}
train: {steps: 40, batch: {labeled: 2, unlabeled: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


def faults(recipe: Path | str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config_io.load(recipe, overrides)
    return caught.value.faults


def test_overrides_are_yaml_and_later_ones_win(recipe: Path) -> None:
    config = config_io.load(
        recipe, ["optim.lr=1e-3", "train.stop_at=7", "train.stop_at=9", "data.views.scale=[0.5, 1.5]", "run=2026-01-31"]
    )
    assert config.optim.lr == 0.001
    assert config.train.stop_at == 9
    assert config.data.views.scale == (0.5, 1.5)
    assert config.run == "2026-01-31"  # YAML 1.1 would make it a date
    assert config.method.threshold == 0.8


def test_an_override_may_begin_a_section(recipe: Path) -> None:
    assert config_io.load(recipe, ["eval.every=3", "model.channels=32"]).model.channels == 32


def test_a_section_given_in_part_keeps_what_its_method_sets(recipe: Path) -> None:
    average = config_io.load(recipe, ["method.average.decay=0.5"]).method.average
    assert (average.kind, average.decay) == ("ema", 0.5)  # the class's own default of `kind` is none


def test_null_and_an_empty_value_unset(recipe: Path) -> None:
    assert config_io.load(recipe, ["method=supervised", "data.unlabeled=null"]).data.unlabeled is None
    assert config_io.load(recipe, ["method=supervised", "data.unlabeled="]).data.unlabeled is None


def test_short_forms(recipe: Path) -> None:
    config = config_io.load(recipe, ["gradients=pareto", "gradients.max_scale=null", "gradients.weights=[1, 0.5]"])
    assert (config.gradients.name, config.gradients.max_scale, config.gradients.weights) == ("pareto", None, (1, 0.5))
    config = config_io.load(recipe, ["weighting=none", "gradients=uniform", "ray=none"])
    assert (config.weighting.name, config.gradients.name, config.ray) == ("none", "uniform", "none")
    assert config_io.load(recipe, ["ray=none", "ray.num_workers=2"]).ray.num_workers == 2
    assert config_io.load(recipe, ["method=fixmatch"]).method.threshold == 0.8  # same name: the recipe's keys stay
    assert config_io.load(recipe, ["method=derprop"]).method.name == "derprop"  # another name: its own defaults


def test_the_order_of_a_name_and_its_keys_does_not_matter(recipe: Path) -> None:
    for order in (1, -1):
        config = config_io.load(recipe, ["gradients.measure_every=2", "gradients=pareto"][::order])
        assert (config.gradients.name, config.gradients.measure_every) == ("pareto", 2)
        config = config_io.load(recipe, ["method.region.segments=7", "method.order=2", "method=derprop"][::order])
        assert (config.method.name, config.method.region.segments, config.method.order) == ("derprop", 7, 2)
    again = config_io.load(recipe, ["gradients.name=fixed", "gradients.measure_every=3", "gradients=pareto"])
    assert (again.gradients.name, again.gradients.measure_every) == ("pareto", 3)  # of two names the later one
    recipe.write_text(BASE + "gradients: {name: fixed, weights: [1, 1], measure_every: 9}\n", encoding="utf-8")
    given = config_io.load(recipe, ["gradients.every=1", "gradients=pareto"]).gradients
    assert (given.name, given.measure_every, given.weights) == ("pareto", 0, (0.5, 0.5))  # the recipe's keys go


def test_a_key_of_a_method_that_is_then_replaced_is_refused(recipe: Path) -> None:
    (fault,) = faults(recipe, "method.order=2", "method=fixmatch")
    assert fault.startswith("method.order must be a known setting; got 2")


def test_pools_is_short_for_three_pools(recipe: Path) -> None:
    data = config_io.load(recipe, ["data.pools=s3://b/mine/", "data.val=other"]).data
    assert (data.labeled, data.unlabeled, data.val) == ("s3://b/mine/labeled", "s3://b/mine/unlabeled", "other")
    assert "data.pools must name the folder" in faults(recipe, "data.pools=3")[0]
    assert config_io.load(recipe, ["data.val=other", "data.pools=mine"]).data.val == "mine/val"  # the later one wins


def test_what_is_dumped_reads_back_the_same(recipe: Path) -> None:
    for overrides in ([], ["ray=none", "run='1e-3'"], ["method=derprop", "method.preset=paper"], ["run='null'"]):
        config = config_io.load(recipe, overrides)
        assert config_io.parse(config_io.dump(config)) == config


@pytest.mark.parametrize("name", [name for name in config_io.recipes() if name.split("-")[1] in METHODS])
def test_every_shipped_recipe_is_valid(name: str) -> None:
    needs_pools = ["data.pools=pools/mine"] if name.startswith("folder-") else []
    config = config_io.load(name, needs_pools)
    assert config.method.name == name.split("-")[1]
    assert name.split("-")[0] in config.run


def test_camvids_recipes_are_those_of_own_images_on_its_pools() -> None:
    for name in (name for name in config_io.recipes() if name.startswith("camvid-")):
        camvid = config_io.load(name)
        pasted = ["method.paste={classes: 3, exclude: [0, 1, 3]}"] if name == "camvid-ael" else []  # stuff by index
        where = ["data.pools=pools/camvid-1_64", f"run={camvid.run}"]
        own = config_io.load(name.replace("camvid", "folder"), [*where, *pasted])
        assert camvid == own


def test_recipes_of_the_issue_are_there() -> None:
    wanted = {f"{data}-{method}" for data in ("scenes", "camvid") for method in ("supervised", "fixmatch", "derprop")}
    assert wanted <= set(config_io.recipes())


def test_unlabeled_images_may_be_those_of_several_pools(recipe: Path) -> None:
    data = config_io.load(recipe, ["data.unlabeled=[p/u, s3://b/more]"]).data
    assert data.unlabeled == data.unlabeled_pools == ("p/u", "s3://b/more")
    assert config_io.load(recipe).data.unlabeled_pools == ("p/u",)
    assert config_io.load(recipe, ["method=supervised", "data.unlabeled=null"]).data.unlabeled_pools == ()
    assert "data.unlabeled must name at least one pool; got none" in " ".join(faults(recipe, "data.unlabeled=[]"))


def test_a_mixture_of_pools_has_a_weight_each(recipe):
    config = config_io.load(recipe, ["data.unlabeled=[{path: p/u, weight: 3}, {path: s3://b/more, weight: 1}]"])
    assert config.data.unlabeled_pools == ("p/u", "s3://b/more")
    assert config.data.unlabeled_weights == (3.0, 1.0)
    assert config_io.parse(config_io.dump(config)) == config
    assert config_io.load(recipe).data.unlabeled_weights is None
    for given, expected in {
        "[{path: a, weight: 2}, b]": "data.unlabeled must give a weight to all of its pools or to none; got none for b",
        "[{path: a, weight: 0}]": "data.unlabeled.0.weight must be greater than 0.0; got 0",
        "[{path: a, weight: 1, wieght: 1}]": "data.unlabeled.0.wieght must be a known setting; got 1. Did you mean "
        "data.unlabeled.0.weight?",
        "[{path: a, weight: 99}, {path: b, weight: 1}]": "train.batch.unlabeled must give every pool",
        "[{path: a, weight: 1}, {path: s3://u:pw@b/p, weight: 1}]": "data.unlabeled.path must not hold a password",
        "7": "data.unlabeled must be a list; got 7",
    }.items():
        (fault,) = faults(recipe, f"data.unlabeled={given}")
        assert fault.startswith(expected), fault


@pytest.fixture
def on_base(recipe: Path) -> Callable[[str], Path]:
    """Writes a recipe that stands on `recipe`, in a file beside it."""

    def write(text: str) -> Path:
        path = recipe.with_name("other.yaml")
        path.write_text(f"base: recipe.yaml\n{text}", encoding="utf-8")
        return path

    return write


def test_a_recipe_changes_its_base_and_overrides_change_both(on_base: Callable[[str], Path]) -> None:
    path = on_base("run: runs/b\ntrain: {batch: {unlabeled: 6}}\noptim: {lr: 0.1}\nmethod: {average: {decay: 0.9}}\n")
    config = config_io.load(path, ["train.steps=50", "method.average.decay=0.8"])
    assert (config.run, config.optim.lr, config.data.labeled) == ("runs/b", 0.1, "p/l")
    assert (config.train.batch.labeled, config.train.batch.unlabeled, config.train.steps) == (2, 6, 50)
    assert (config.method.threshold, config.method.average.decay) == (0.8, 0.8)
    assert "base" not in config_io.dump(config)  # what is written out is whole


def test_another_method_than_the_bases_starts_from_its_defaults(on_base: Callable[[str], Path]) -> None:
    assert config_io.load(on_base("method: unimatch")).method.threshold == 0.95
    assert config_io.load(on_base("method: fixmatch")).method.threshold == 0.8
    assert config_io.load(on_base("gradients: pareto")).gradients.name == "pareto"


def test_pools_replace_the_bases_pools(on_base: Callable[[str], Path]) -> None:
    data = config_io.load(on_base("data: {pools: mine, val: other}")).data
    assert (data.labeled, data.unlabeled, data.val) == ("mine/labeled", "mine/unlabeled", "other")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: 3", "must name a recipe; got 3"),
        ("base: scenes-fixmach", "got scenes-fixmach. Did you mean scenes-fixmatch?"),
        ("base: camvid-fixmatch", "must have no base itself; got camvid-fixmatch"),
        ("base: scenes-fixmatch\nbases: 1", "bases must be a known setting"),
        ("base: scenes-fixmatch\ndata: 7", "data must be a section"),
    ],
)
def test_wrong_bases_are_told(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"run: a\n{text}\n", encoding="utf-8")
    (fault,) = faults(path)
    assert expected in fault


def test_a_base_is_no_setting_of_the_command_line(recipe: Path) -> None:
    assert faults(recipe, "base=scenes-fixmatch")[0].startswith("base must be a known setting")


def test_all_faults_come_at_once_under_the_paths_that_the_user_wrote(recipe: Path) -> None:
    found = faults(
        recipe,
        "train.stepz=10",
        "method.treshold=0.3",
        "method.threshold=3",
        "method.average.decay=one",
        "optim.name=sgdd",
        "ray.num_workers=0",
        "data.crop=2.5",
        "no value",
        "trian.steps=3",
        "data.val=",
    )
    assert len(found) == 10
    expected = [
        "override must read a.b=value; got 'no value'.",
        "data.crop must be a whole number; got 2.5.",
        "method.threshold must be less than 1.0; got 3.",
        "method.average.decay must be a number; got 'one'.",
        "method.treshold must be a known setting; got 0.3. Did you mean method.threshold? Valid keys of method.*: ",
        "train.stepz must be a known setting; got 10. Did you mean train.steps? Valid keys of train.*: steps,",
        "optim.name must be one of sgd, adamw; got 'sgdd'. Did you mean sgd?",
        "ray.num_workers must be at least 1; got 0.",
        "data.val must name a pool; got nothing.",
        "trian must be a known setting; got {'steps': 3}. Did you mean train? Valid keys of the top: run,",
    ]
    for text in expected:
        assert any(fault.startswith(text) for fault in found), text


def test_rules_across_components_are_reported_beside_other_faults(recipe: Path) -> None:
    found = faults(recipe, "optim.lr=-1", "train.stop_at=41", "ray.num_workers=4")
    assert [fault.split(" must ")[0] for fault in found] == [
        "optim.lr",
        "train.stop_at",
        "train.batch.labeled",
        "train.batch.unlabeled",
    ]


def test_a_rule_is_silent_about_a_setting_that_is_faulty_itself(recipe: Path) -> None:
    assert [fault.split(" must ")[0] for fault in faults(recipe, "train.steps=x", "train.stop_at=2000")] == [
        "train.steps"
    ]
    typo = faults(recipe, "train.batch.labelled=3", "ray.num_workers=3", "train.batch.unlabeled=6")
    assert [fault.split(" must ")[0] for fault in typo] == ["train.batch.labelled"]


def test_a_key_of_another_section_is_pointed_out(recipe: Path) -> None:
    assert "Did you mean data.crop?" in faults(recipe, "train.crop=64")[0]


def test_a_wrong_method_gets_the_nearest(recipe: Path) -> None:
    for override in ("method=derprob", "method.name=derprob"):
        (fault,) = faults(recipe, override)
        assert fault.startswith("method.name must be one of supervised, fixmatch, ")
        assert fault.endswith("got 'derprob'. Did you mean derprop?")


def test_rules_inside_a_component_carry_its_path(recipe: Path) -> None:
    assert faults(recipe, "method.average.kind=none")[0].startswith("method.average must be ema or period")
    assert faults(recipe, "eval.mode=sliding_window")[0].startswith("eval.window must be given for mode sliding_window")
    nested = faults(recipe, "method=derprop", "method.kernel=[0, 0]")[0]
    assert nested.startswith("method.kernel must have a coefficient other than 0; got [0.0, 0.0]")


def test_ray_is_a_section_or_none(recipe: Path) -> None:
    (fault,) = faults(recipe, "ray=nonne")
    assert fault.startswith("ray must be none, or have keys of its own (ray.*); got 'nonne'.")


def test_missing_settings(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("method: {threshold: 0.5}\n", encoding="utf-8")
    found = faults(path)
    assert found[0].startswith("run must be given; got nothing.")
    assert found[1].startswith("method.name must be given; got nothing.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: a\nrun: b\n", "must be YAML with each key once; got the key 'run' stands twice in line 2."),
        ("train: {steps: 1, steps: 2}\n", "got the key 'steps' stands twice in line 1."),
        ("run: [\n", "must be YAML with each key once; got "),
        ("- run\n", "must be a YAML map of settings; got ['run']."),
        ("1: run\n", "got the key 1 must be a text in line 1."),
        ("run: !!python/object/apply:os.system [ls]\n", "must be YAML with each key once; got "),
    ],
)
def test_broken_recipes(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    (fault,) = faults(path)
    assert expected in fault


def test_an_unknown_recipe_gets_the_nearest() -> None:
    (fault,) = faults("scenes-fixmach")
    assert fault.startswith("recipe must be a YAML file or the name of one that comes along; got scenes-fixmach. Did")
    assert fault.endswith("Did you mean scenes-fixmatch? `raysemi train --list` names them all.")


def test_difference_names_the_leaves(recipe: Path) -> None:
    def changed(*overrides: str) -> list[str]:
        return config_io.difference(config_io.load(recipe), config_io.load(recipe, overrides))

    assert changed() == []
    assert changed("train.stop_at=3", "data.views.flip=0.1") == ["data.views.flip", "train.stop_at"]
    assert all(path.startswith("ray.") for path in changed("ray=none"))
    assert "method.name" in changed("method=supervised")
    assert "method.threshold" in changed("method=supervised")


def test_change_applies_overrides_to_a_config(recipe: Path) -> None:
    config = config_io.load(recipe)
    assert config_io.difference(config, config_io.change(config, ["eval.batch=7"])) == ["eval.batch"]
    with pytest.raises(ConfigError, match=r"eval\.bach must be a known setting"):
        config_io.change(config, ["eval.bach=7"])


def test_every_setting_has_a_description() -> None:
    for path, field in settings(RunConfig, {"method": {"name": "fixmatch"}}):
        if not path.endswith(".name"):
            assert field.description, path
