"""`raysemi bench step --all`: every method's step against its floor; what is measured is kept, a JSON file each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raysemi import catalogue
from raysemi.bench.step import StepResult, StepSettings, measure_step
from raysemi.engine.folder import RunFolder
from raysemi.errors import ConfigError, DataError

USUAL: dict[str, Any] = {"encoder": "resnet50", "crop": 321, "batch": 2}
"""Size at which the goals of `bench.step.GOALS` are set."""
OF_METHOD: dict[str, dict[str, Any]] = {"unimatch_v2": {"encoder": "vit_small_patch14_dinov2.lvd142m", "crop": 322}}
"""What differs from it."""


def settings_of_all(*, weighting: str, gradients: str, **rest: Any) -> list[StepSettings]:
    """Of every method that goes with a weighting and a gradient rule.

    Args:
        weighting: name.
        gradients: name of the rule.
        rest: other fields of `StepSettings`, in place of the usual ones.

    Raises:
        ConfigError: no method goes with them.
    """
    settings = []
    for name in catalogue.names():
        about = catalogue.describe(name)
        if weighting in about["weighting"] and gradients in about["gradients"]:
            size = USUAL | OF_METHOD.get(name, {}) | rest
            settings.append(StepSettings(method=name, weighting=weighting, gradients=gradients, **size))
    if not settings:
        raise ConfigError(
            f"--weighting and --gradients must be known words; got {weighting} and {gradients}. See `raysemi methods`."
        )
    for one in settings:
        one.config()
    return settings


def measure_all(
    settings: Sequence[StepSettings], folder: Path, pairs: int, progress: Callable[[int, int], None] | None = None
) -> list[StepResult]:
    """Measures what the folder does not hold yet.

    Args:
        settings: one each.
        folder: METHOD-WEIGHTING-GRADIENTS.json for each.
        pairs: as in `measure_step`.
        progress: (done, in all) after each.

    Raises:
        ConfigError: a file of other settings.
        DataError: a broken file.
    """
    results = []
    for number, one in enumerate(settings):
        name = f"{one.method}-{one.weighting}-{one.gradients}.json"
        about = json.loads(json.dumps({"settings": asdict(one), "pairs": pairs}))
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                result = StepResult(**found.pop("result"))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{folder / name} must be as `raysemi bench step --all` writes it; got {type(error).__name__}: "
                    f"{error}. Remove it to measure again."
                ) from error
            if found != about:
                raise ConfigError(
                    f"--out must be a folder of these settings or a new one; got {folder / name}, measured with "
                    f"{found} instead of {about}. Give another folder."
                )
        else:
            result = measure_step(one, pairs)
            RunFolder(folder).write_bytes(name, json.dumps(about | {"result": result.as_json()}, indent=1).encode())
        results.append(result)
        if progress is not None:
            progress(number + 1, len(settings))
    return results


def as_markdown(results: Sequence[StepResult]) -> str:
    """A table, and under it what all have in common."""
    rows = [
        ["method", "backbone", "crop", "step, s", "floor, s", "step / floor", "of CPU time", "goal", "step, MB",
         "floor, MB", "more, MB"],
        ["---"] * 11,
    ]  # fmt: skip
    for one in results:
        low, high = one.ratio_quartiles
        memory = one.peak_bytes, one.peak_floor_bytes, one.peak_bytes - one.peak_floor_bytes
        rows.append(
            [
                one.method, one.backbone, str(one.crop), f"{one.step_s:.3f}", f"{one.floor_s:.3f}",
                f"{one.ratio:.3f} ({low:.3f} to {high:.3f})", f"{one.cpu_ratio:.3f}",
                "" if one.goal is None else f"{one.goal:.2f}", *(f"{part / 1e6:.0f}" for part in memory),
            ]
        )  # fmt: skip
    shared = {
        f"weighting {one.weighting}, gradients {one.gradients}; {one.batch} labeled and {one.batch} unlabeled images; "
        f"{one.device}, {one.threads} threads, {one.precision}{', compiled' if one.compile else ''}, "
        f"torch {one.torch}; {one.pairs} pairs"
        for one in results
    }
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *sorted(shared)])
