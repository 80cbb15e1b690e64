"""A sweep's settings -> its space, by the methods' own declarations, tried out; and all that is wrong with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raysemi import catalogue, config_io
from raysemi.config import RunConfig, check_world
from raysemi.config_faults import did_you_mean
from raysemi.errors import ConfigError, DataError
from raysemi.launch.restore import open_pools
from raysemi.tune.spaces import Cell, Draw, Parameter, Space, label_of, short
from raysemi.tune.sweep import Range, SweepConfig

_OURS = {
    "run": "--out",
    "seed": "seeds",
    "method": "methods",
    "weighting": "weightings",
    "gradients": "gradients",
    "ray": "resources",
    "train.stop_at": "prune",
}
"""Settings of a run that a sweep sets itself, or their `.name`, and what to use in their place."""
_DRAWS = 20
"""Draws of each cell that the config must take before a sweep starts."""


def build(sweep: SweepConfig, *, tried: bool = True) -> Space:
    """The space of a sweep.

    Args:
        sweep: its settings.
        tried: against its pools and by draws, as before a start; False: to show it, wherever the pools are now.

    Raises:
        ConfigError: with everything that is wrong: names, ranges, conditions, what the config refuses, data that cannot
            serve a method.
        DataError: a pool that cannot be read.
    """
    faults = [*_wrong_names(sweep), *_wrong_set(sweep)]
    if faults:
        raise ConfigError(faults)
    empty = Space(sweep.recipes, sweep.set, {}, (), tuple(sweep.rows), tuple(sweep.seeds))
    bases: dict[Cell, Mapping[str, Any]] = {}
    configs: list[RunConfig] = []
    for cell in _cells(sweep):
        try:
            config = _config(empty, Draw(cell, {}), sweep)
        except ConfigError as error:
            faults += error.faults
            continue
        configs.append(config)
        bases[cell] = config_io.leaves(config)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    if not bases:
        raise ConfigError(
            f"weightings and gradients must go with one of the methods; got {', '.join(sweep.weightings)} and "
            f"{', '.join(sweep.gradients)}. `raysemi methods` says which do."
        )
    parameters: list[Parameter] = []
    for name, given in sweep.space.items():
        try:
            parameters += _parameters(name, given, bases)
        except ConfigError as error:
            faults += error.faults
    for parameter in parameters:
        if parameter.path in sweep.set:
            faults.append(
                f"space.{parameter.name} must not be fixed as well; got set.{parameter.path}. Remove one of the two."
            )
    ordered = _conditions_first(parameters)
    space = Space(sweep.recipes, sweep.set, bases, tuple(ordered), tuple(sweep.rows), tuple(sweep.seeds))
    faults += _never_held(space)
    faults += _pruned_at_all(sweep, configs)
    for config in configs if tried else []:
        try:
            open_pools(config)
        except (ConfigError, DataError) as error:
            faults += [str(error)] if isinstance(error, DataError) else list(error.faults)
    faults += _refused_values(space, sweep) if tried and not faults else []
    faults += _refused_draws(space, sweep) if tried and not faults else []
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return space


def _config(space: Space, draw: Draw, sweep: SweepConfig) -> RunConfig:
    """A trial's, for as many ranks as it will have. Raises ConfigError."""
    workers = sweep.resources.workers
    config = space.config(draw, "run=run", f"ray={{num_workers: {workers}}}")
    check_world(config, workers, gpu=sweep.resources.gpus > 0)
    return config


def _wrong_names(sweep: SweepConfig) -> Iterator[str]:
    for setting, given, known in (
        ("methods", sweep.methods, catalogue.names()),
        ("weightings", sweep.weightings, catalogue.values("weighting")),
        ("gradients", sweep.gradients, catalogue.values("gradients")),
    ):
        for name in given:
            if name not in known:
                guess = did_you_mean(name, known) or "Choose of these."
                yield f"{setting} must be among {', '.join(known)}; got {name}. {guess}"


def _wrong_set(sweep: SweepConfig) -> Iterator[str]:
    given = [(f"set.{path}", path) for path in sweep.set] + [(f"space.{name}", name) for name in sweep.space]
    for row in sweep.rows:
        words = ("method", "weighting", "gradients")
        given += [(f"rows: {row.label}: {path}", path) for path in row.set if path not in words]
    for where, path in given:
        bare = path.removesuffix(".name")
        if (
            ours := _OURS.get(bare) or _OURS.get(bare.partition(".")[0] if bare.startswith("ray.") else "")
        ) is not None:
            yield f"{where} must not be given, since a sweep sets it itself; got {path}. Use {ours}."


def _cells(sweep: SweepConfig) -> list[Cell]:
    """Those of the product that go together, and those of the rows."""
    found: dict[Cell, None] = {}
    for method in dict.fromkeys(sweep.methods):
        about = catalogue.describe(method)
        for weighting, rule in itertools.product(sweep.weightings, sweep.gradients):
            if weighting in about["weighting"] and rule in about["gradients"]:
                found[Cell(method, weighting, rule)] = None
    for row in sweep.rows:
        found[Space(sweep.recipes, {}, {cell: {} for cell in found}, ()).row(row)[0]] = None
    return list(found)


def _parameters(name: str, given: str | Range, bases: Mapping[Cell, Mapping[str, Any]]) -> Iterator[Parameter]:
    """The parameters that one key of `space` stands for: one of each method that has it."""
    head, _, rest = name.partition(".")
    methods = list(dict.fromkeys(cell.method for cell in bases))
    if head == "method" or head in catalogue.names():
        chosen = methods if head == "method" else [method for method in methods if method == head]
        by_method = {method: _declared(catalogue.describe(method)["settings"], f"method.{rest}") for method in chosen}
        having = {method: found for method, found in by_method.items() if found is not None}
        if not having:
            known = [s["path"].removeprefix("method.") for m in chosen for s in catalogue.describe(m)["settings"]]
            guess = did_you_mean(rest, known) or f"`raysemi methods {(chosen or [head])[0]}` lists them."
            raise ConfigError(
                f"space.{name} must be a setting of a method of this sweep ({', '.join(methods)}); got one that none "
                f"has. {guess}"
            )
        faults: list[str] = []
        for method, found in having.items():
            cells = tuple(cell for cell in bases if cell.method == method)
            try:
                yield _parameter(f"{method}.{rest}", f"method.{rest}", cells, given, found, bases)
            except ConfigError as error:
                faults += error.faults
        if faults and (len(faults) == len(having) or given != "declared"):
            raise ConfigError(list(dict.fromkeys(faults)))
        return
    if head in ("weighting", "gradients"):
        cells = tuple(cell for cell in bases if getattr(cell, head) not in ("none", "uniform") and name in bases[cell])
        words = dict.fromkeys(getattr(cell, head) for cell in cells)
        declared = next((s for word in words if (s := _declared(catalogue.describe_section(head, word), name))), None)
    else:
        cells, declared = tuple(cell for cell in bases if name in bases[cell]), None
    if not cells:
        known = sorted({path for base in bases.values() for path in base})
        raise ConfigError(
            f"space.{name} must be a setting that a run of this sweep has; got none. "
            f"{did_you_mean(name, known) or 'Check it, and `weightings` and `gradients`.'}"
        )
    yield _parameter(name, name, cells, given, declared, bases)


def _declared(settings: list[dict[str, Any]], path: str) -> dict[str, Any] | None:
    return next((one for one in settings if one["path"] == path), None)


def _parameter(
    name: str,
    path: str,
    cells: tuple[Cell, ...],
    given: str | Range,
    declared: Mapping[str, Any] | None,
    bases: Mapping[Cell, Mapping[str, Any]],
) -> Parameter:
    requires = dict(declared["requires"]) if declared is not None else {}
    own = declared["search"] if declared is not None else None
    beside = (own or {}).get("beside", {})
    value = bases[cells[0]].get(path)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(given, Range):
        if given.choices is not None:
            return Parameter(
                name, path, cells, choices=tuple(_listed(v) for v in given.choices), requires=requires, beside=beside
            )
        assert given.low is not None  # Range takes nothing else
        assert given.high is not None
        return Parameter(name, path, cells, given.low, given.high, given.log, whole, requires=requires)
    if own is None:
        raise ConfigError(
            f"space.{name} must have a range of its own, since {path} declares none; got declared. Give low and high, "
            "or choices."
        )
    if "choices" in own:
        choices = tuple(_listed(choice) for choice in own["choices"])
        return Parameter(name, path, cells, choices=choices, requires=requires, beside=beside)
    return Parameter(name, path, cells, own["low"], own["high"], own["log"], whole, requires=requires)


def _conditions_first(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Each after those that its conditions read."""
    ordered: list[Parameter] = []
    waiting = list(parameters)
    while waiting:
        paths = {parameter.path for parameter in waiting}
        ready = [p for p in waiting if not (paths - {p.path}) & set(p.requires)] or waiting
        ordered += ready
        waiting = [parameter for parameter in waiting if parameter not in ready]
    return ordered


def _never_held(space: Space) -> Iterator[str]:
    for parameter in space.parameters:
        for path, values in parameter.requires.items():
            met = any(value in values for cell in parameter.cells for value in _possible(space, cell, path))
            if not met:
                got = {short(v) for cell in parameter.cells for v in _possible(space, cell, path)}
                wanted = " or ".join(map(short, values))
                yield (
                    f"space.{parameter.name} must be drawn somewhere, which needs {path}={wanted}; got "
                    f"{', '.join(sorted(got))} alone. Set it, add it to space, or remove {parameter.name}."
                )


def _possible(space: Space, cell: Cell, path: str) -> list[Any]:
    drawn = [p for p in space.parameters if p.path == path and cell in p.cells]
    return [value for p in drawn for value in p.ends] or [space.bases[cell].get(path)]


def _pruned_at_all(sweep: SweepConfig, configs: Sequence[RunConfig]) -> Iterator[str]:
    if sweep.prune.name == "none":
        return
    for steps, every in dict.fromkeys((config.train.steps, config.eval.every) for config in configs):
        first = sweep.prune.grace or every
        if first >= steps:
            yield (
                f"prune.grace must be less than train.steps ({steps}), or no trial is stopped; got {first}. Lower "
                "it, or set.eval.every, or set prune.name to none."
            )
        elif every >= steps:
            yield (
                f"set.eval.every must be less than train.steps ({steps}) with prune, which judges evaluations; got "
                f"{every}. Lower it, or set prune.name to none."
            )


def _refused_values(space: Space, sweep: SweepConfig) -> Iterator[str]:
    """What the config says of each parameter's ends."""
    for parameter in space.parameters:
        met = {path: values[0] for path, values in parameter.requires.items() if path.rpartition(".")[2] != "name"}
        for cell, value in itertools.product(parameter.cells, parameter.ends):
            if not all(space.bases[cell].get(p) in v for p, v in parameter.requires.items() if p not in met):
                continue
            along = parameter.beside.get(value, {}) if isinstance(value, str) else {}
            needed = {path: other for path, other in met.items() if path not in space.fixed}
            try:
                _config(space, Draw(cell, {**needed, **along, parameter.path: value}), sweep)
            except ConfigError as error:
                yield f"space.{parameter.name} must hold what the config takes; got {short(value)}: {error.faults[0]}"


def _refused_draws(space: Space, sweep: SweepConfig) -> Iterator[str]:
    """What the config says of whole trials: all of a grid, otherwise some."""
    draws = [draw for _, draw in space.grid] if sweep.search.name == "grid" else _sampled(space)
    for draw in draws:
        try:
            config = _config(space, draw, sweep)
            if space.rows:  # each may ask for other data
                open_pools(config)
        except ConfigError as error:
            yield f"space must hold only what the config takes; got {label_of(draw)}: {error.faults[0]}"
            return
        except DataError as error:
            yield f"{label_of(draw)}: {error}"
            return


def _sampled(space: Space) -> list[Draw]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.draw(study.ask()) for _ in range(_DRAWS * len(space.bases))]


def _listed(value: Any) -> Any:
    """As the config's own dump has it."""
    return list(value) if isinstance(value, tuple) else value
