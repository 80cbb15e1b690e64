"""What a sweep's YAML file says, typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from raysemi.base import Config
from raysemi.bounded import YAMLFault, parse_yaml
from raysemi.config_faults import did_you_mean, texts
from raysemi.config_io import Loader, apply_overrides
from raysemi.errors import ConfigError

SWEEPS = Path(__file__).parent / "sweeps"


class Range(Config):
    """What a parameter is drawn from: an interval or a list."""

    low: float | None = None
    """Least value; whole numbers for a setting that is one."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Draw uniformly in the logarithm."""
    choices: list[Any] | None = None
    """In place of an interval: all values."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Range:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("must have low and high, or choices; got neither or both. Give one of the two.")
        if self.choices is not None and not self.choices:
            raise ValueError("choices must hold at least one value; got []. Add some, or remove the parameter.")
        if self.low is not None and self.high is not None:
            if self.low > self.high:
                raise ValueError(
                    f"low must be at most high; got {self.low} and {self.high}: an empty range. Swap them."
                )
            if self.log and self.low <= 0:
                raise ValueError(f"low must be above 0 with log; got {self.low}. Raise it, or set log to false.")
        return self


class Row(Config):
    """One line of a table that a grid fills."""

    label: str
    """As in the table."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted path -> value; `method`, `weighting` and `gradients` may be words."""
    published: float | None = None
    """mIoU that the paper reports, percent."""


class SearchConfig(Config):
    """`search.*`: how values are drawn, and how many."""

    name: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: Optuna's, with constant liar, over the joint space. random. grid: `rows`, or all combinations of choices."""
    trials: int = Field(24, ge=1)
    """Trials at most; a grid has its own number."""
    hours: float | None = Field(None, gt=0.0)
    """Hours of wall-clock time at most, over all starts of the sweep; None = no limit."""
    seed: int = Field(0, ge=0)
    """Of the draws."""
    defaults_first: bool = True
    """The first trials are the recipes as they are, one a method, weighting and gradient rule, while they are at most
    half of all trials."""


class PruneConfig(Config):
    """`prune.*`: trials that are stopped early, by mIoU at evaluations."""

    name: Literal["none", "asha", "median"] = "none"
    """asha: at steps grace, grace * reduction, ..., the best 1 / reduction of the trials go on. median: a trial ends
    whose best mIoU is below the median of the others' means so far."""
    grace: int | None = Field(None, ge=1)
    """Steps before which no trial is stopped; None = the first evaluation."""
    reduction: float = Field(3.0, gt=1.0)
    """asha: of how many trials one goes on."""
    min_trials: int = Field(3, ge=1)
    """median: trials that must have got as far."""


class RepeatConfig(Config):
    """`repeat.*`: the best trials once more, on seeds that no trial has had."""

    best: int = Field(1, ge=1)
    """How many of the best."""
    of: Literal["all", "method"] = "all"
    """all: the best of all trials. method: the best of each method, with the weighting and gradient rule that it had;
    where no trial of a method finished, the one that got furthest before it was stopped."""
    seeds: int = Field(0, ge=0)
    """Runs of each; 0 = none."""
    defaults: bool = True
    """The recipes of the best ones' methods as they are, on the same seeds."""


class ResourcesConfig(Config):
    """`resources.*`: what a trial takes."""

    workers: int = Field(1, ge=1)
    """Ranks of a trial. 1: the trial's own process. More: Ray Train's workers, one GPU each where there are some."""
    cpus: int = Field(1, ge=1)
    """CPU cores, and so threads, of each rank."""
    gpus: float = Field(0.0, ge=0.0)
    """GPUs of each rank; a part of one (0.5) with a single worker: that many trials share it."""
    concurrent: int | None = Field(None, ge=1)
    """Trials at a time; None = as many as the cluster has room for."""
    max_failures: int = Field(2, ge=0)
    """Times that a trial whose process died is started again, from its last checkpoint."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourcesConfig:
        if self.workers > 1 and self.gpus not in (0.0, 1.0):
            raise ValueError(f"gpus must be 0 or 1 with several workers; got {self.gpus}. Change it, or workers to 1.")
        return self


class SweepConfig(Config):
    """A sweep."""

    question: str = ""
    """What it answers, in a sentence."""
    recipes: str = "scenes"
    """What the recipes' names, or files, begin with: `scenes` stands for scenes-METHOD."""
    methods: list[str] = Field(min_length=1)
    """Methods, as in `raysemi methods`."""
    weightings: list[str] = Field(["none"], min_length=1)
    """Of each method those that go with it."""
    gradients: list[str] = Field(["uniform"], min_length=1)
    """Gradient rules, likewise."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted path -> value: settings of every trial."""
    space: dict[str, Literal["declared"] | Range] = Field(default_factory=dict)
    """Parameter -> its range; `declared`: the range that the component itself declares (`raysemi methods METHOD`).
    `method.X` is X of every method that has it, `METHOD.X` of one; any other setting needs a range."""
    rows: list[Row] = Field(default_factory=list)
    """grid: the lines of a table."""
    seeds: list[int] = Field([0], min_length=1)
    """Seeds of the trials, in turn; a grid runs each row with each."""
    objectives: list[Literal["miou", "hours"]] = Field(["miou"], min_length=1)
    """miou: of the last evaluation, percent, to be large. hours: of GPUs, or of CPU cores without, to be small."""
    search: SearchConfig = SearchConfig()
    """How values are drawn."""
    prune: PruneConfig = PruneConfig()
    """Trials that are stopped early."""
    repeat: RepeatConfig = RepeatConfig()
    """The best ones once more."""
    resources: ResourcesConfig = ResourcesConfig()
    """What a trial takes."""
    runs: str | None = None
    """Folder or URL for the trials' run folders, where nodes share no file system; None = the sweep's own folder."""
    storage: str = "sqlite"
    """sqlite: a file in the sweep's folder. Or the URL of a PostgreSQL database without a password, which libpq finds
    in PGPASSWORD or its password file."""

    @field_validator("storage")
    @classmethod
    def _known_storage(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        if ":" in rest.rpartition("@")[0] or "password=" in rest:
            raise ValueError(
                "must not hold a password, because sweep.yaml is written out; got a URL with one. Set PGPASSWORD."
            )
        if value != "sqlite" and scheme not in ("postgresql", "postgresql+psycopg"):
            raise ValueError(f"must be sqlite or a postgresql:// URL; got {value}. Change it.")
        return value

    @model_validator(mode="after")
    def _grid_or_space(self) -> SweepConfig:
        faults = []
        if self.rows and self.search.name != "grid":
            faults.append(f"search.name must be grid with rows; got {self.search.name}. Set it, or remove rows.")
        if self.rows and self.space:
            faults.append("space must be empty with rows, which say each trial; got both. Remove one.")
        if len(self.objectives) != len(dict.fromkeys(self.objectives)) or "miou" not in self.objectives:
            faults.append(f"objectives must be [miou] or [miou, hours]; got {self.objectives}. Change them.")
        if faults:
            raise ConfigError(faults)
        return self


def num_repeats(sweep: SweepConfig) -> int:
    """Repeats of a sweep, at most; a method whose best trial is its recipe needs no second run of it."""
    repeat = sweep.repeat
    if sweep.search.name == "grid":
        return 0
    groups = len(dict.fromkeys(sweep.methods)) if repeat.of == "method" else 1
    return groups * repeat.best * repeat.seeds * (2 if repeat.defaults else 1)


MAY_CHANGE = ("question", "search.trials", "search.hours", "prune.", "repeat.", "resources.", "storage")
"""Settings that may differ when a sweep goes on."""


def names() -> list[str]:
    """Sweeps that come along, sorted."""
    return sorted(file.stem for file in SWEEPS.glob("*.yaml"))


def load(sweep: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads a sweep.

    Args:
        sweep: YAML file, or the name of one that comes along.
        overrides: `a.b=value` each, of the sweep's own settings; `set.PATH=value` for one of the runs,
            `space.NAME=null` to search without a parameter.

    Raises:
        ConfigError: with every fault that was found.
    """
    return parse(_text(sweep), str(sweep), overrides)


def parse(text: str, source: str = "sweep.yaml", overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads what `dump` wrote."""
    try:
        tree = parse_yaml(text, Loader)
    except YAMLFault as error:
        raise ConfigError(f"{source} must be YAML with each key once; got {error}. Correct the file.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must be a YAML map of settings; got {tree!r:.200}. See docs/sweeps.md.")
    maps = {name: tree.setdefault(name, {}) for name in ("set", "space")}
    own = [text for text in overrides if not text.startswith(tuple(f"{name}." for name in maps))]
    faults = apply_overrides(tree, own)
    for name, values in maps.items():  # their keys are dotted paths themselves
        for given in (text.removeprefix(f"{name}.") for text in overrides if text.startswith(f"{name}.")):
            path, equals, value = given.partition("=")
            held: dict[str, Any] = {}
            faults += (
                apply_overrides(held, [f"value={value}"])
                if equals
                else [f"override must read a.b=value; got {name}.{given}. Write the path, `=` and its value."]
            )
            if isinstance(values, dict) and held:
                values[path] = held["value"]
    if isinstance(maps["space"], dict):
        tree["space"] = {path: given for path, given in maps["space"].items() if given is not None}
    try:
        config = SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([*faults, *texts(error, tree, SweepConfig)]) from error
    if faults:
        raise ConfigError(faults)
    return config


def dump(config: SweepConfig) -> str:
    """As YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _text(sweep: str | Path) -> str:
    path = Path(sweep).expanduser()
    if not path.is_file():
        if str(sweep) not in names():
            raise ConfigError(
                f"sweep must be a YAML file or the name of one that comes along; got {sweep}. "
                f"{did_you_mean(str(sweep), names()) or 'Check the path.'} `raysemi tune run --list` names them all."
            )
        path = SWEEPS / f"{sweep}.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sweep must be a readable YAML file; got {path}: {error}. Check the file.") from error
