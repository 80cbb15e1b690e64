"""What there is to choose from: the methods and all of their settings, read from registry and config classes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from raysemi.base import Config
from raysemi.config import RunConfig
from raysemi.config_faults import did_you_mean, settings
from raysemi.config_io import load, recipe_file, recipes
from raysemi.errors import ConfigError
from raysemi.methods import METHODS
from raysemi.methods.base import Method
from raysemi.models.segmentor import Channels

_CLASSES = 21
_CHANNELS = Channels(maps=(256, 2048), middle=1024, joined=304, penultimate=256, pyramid=256)
"""Of a ResNet: for methods that must be asked which heads they need."""


def names() -> list[str]:
    """Methods by name, in the order of the registry."""
    return list(METHODS)


def describe(name: str) -> dict[str, Any]:
    """A method: what it does, what it needs, and its settings with default, meaning and search range.

    Args:
        name: as in `method.name`.

    Returns:
        Plain data: `name, idea, source, unlabeled (needed | optional | unused), strong_views, second_view, heads,
        average` (kind of the averaged copy), `weighting, gradients` (names that go with it), `settings`; of each
        setting `path, default, meaning, unit, search` (None where `raysemi tune` leaves it alone), `requires` (path ->
        values: the search makes sense where each of these settings has one of its values). A search has `low, high,
        log`, or `choices`, all of which the method takes, and where some of them need other settings `beside` (choice
        -> path -> value).

    Raises:
        ConfigError: no such method.
    """
    config, method = _method(name)
    uses_unlabeled = "unused" if not method.uses_unlabeled else "optional" if method.unlabeled_optional else "needed"
    return {
        "name": name,
        "idea": _idea(type(method)),
        "source": _source(type(method)),
        "unlabeled": uses_unlabeled,
        "strong_views": method.strong_views,
        "second_view": method.second_view,
        "heads": sorted(method.heads(_CHANNELS)),
        "average": method.average.kind,
        "weighting": _accepted(name, "weighting"),
        "gradients": _accepted(name, "gradients"),
        "settings": _settings(config, "method"),
    }


def describe_section(section: str, name: str) -> list[dict[str, Any]]:
    """Settings of `weighting` or `gradients` under one of their names, as `describe` gives those of a method.

    Raises:
        ConfigError: no such name.
    """
    known = values(section)
    if name not in known:
        raise ConfigError(
            f"{section} must be one of {', '.join(known)}; got {name}. "
            f"{did_you_mean(name, known) or 'Choose one of these.'}"
        )
    annotation = RunConfig.model_fields[section].annotation
    kinds = [annotation] if isinstance(annotation, type) else get_args(annotation)
    kind = next(kind for kind in kinds if name in _names_in(kind))
    return _settings(kind(name=name), section)


def _settings(config: Config, section: str) -> list[dict[str, Any]]:
    return [
        {
            "path": path,
            "default": _plain(_at(config, path)),
            "meaning": " ".join((field.description or "").split()),
            "unit": _extra(field).get("unit", ""),
            **_searched(type(config), path, _extra(field)),
        }
        for path, field in settings(type(config), {}, f"{section}.")
        if path != f"{section}.name"
    ]


def table() -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a line a method."""
    columns = [
        "method", "what it does", "unlabeled", "strong views", "heads", "averaged copy", "weighting", "gradients",
        "source",
    ]  # fmt: skip
    rows = []
    for name in names():
        about = describe(name)
        views = f"{about['strong_views']}{' + second view' if about['second_view'] else ''}"
        lists = (", ".join(about[part]) for part in ("weighting", "gradients"))
        heads = ", ".join(about["heads"])
        rows.append([name, about["idea"], about["unlabeled"], views, heads, about["average"], *lists, about["source"]])
    return columns, rows


def recipes_table() -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a line a recipe that comes with raysemi, with the first sentence of its header."""
    rows = []
    for name in recipes():
        header = recipe_file(name).read_text(encoding="utf-8").partition("\n#   ")[0]
        words = " ".join(header.replace("\n#", " ").removeprefix("#").split())
        rows.append([name, re.split(r"(?<=[.])\s|:\s", words)[0].rstrip(".")])
    return ["recipe", "what it is"], rows


def summary(name: str) -> list[str]:
    """Lines about one method."""
    about = describe(name)
    lines = [f"{name}: {about['idea']}", f"source: {about['source']}" if about["source"] else ""]
    lines.append(
        f"unlabeled images: {about['unlabeled']}; strong views: {about['strong_views']}; second view: "
        f"{'yes' if about['second_view'] else 'no'}; heads: {', '.join(about['heads']) or 'none'}; averaged copy: "
        f"{about['average']}; weighting: {', '.join(about['weighting'])}; gradients: {', '.join(about['gradients'])}"
    )
    return [line for line in lines if line]


def settings_table(name: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a line a setting."""
    rows = []
    for setting in describe(name)["settings"]:
        meaning = setting["meaning"] + (f" ({setting['unit']})" if setting["unit"] else "")
        needed = "; ".join(f"{path}={' or '.join(map(_short, v))}" for path, v in setting["requires"].items())
        searched = _range(setting["search"]) + (f" (with {needed})" if needed else "")
        rows.append([setting["path"], _short(setting["default"]), meaning, searched])
    return ["setting", "default", "meaning", "search"], rows


def _method(name: str) -> tuple[Config, Method]:
    if name not in METHODS:
        known = names()
        raise ConfigError(
            f"method must be one of {', '.join(known)}; got {name}. "
            f"{did_you_mean(name, known) or 'Choose one of these.'}"
        )
    config, kind = METHODS[name]
    return config(), kind(config(), _CLASSES)


def _searched(config: type[Config], path: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`search` and `requires` of a setting, with full paths, without what the method's config refuses."""
    search, requires = extra.get("search"), extra.get("requires", {})
    needed = {_beside(path, key): values for key, values in requires.items()}
    needed = {other: [v for v in values if _takes(config, {other: v})] for other, values in needed.items()}
    if search is None or not all(needed.values()):  # the method has no use for it
        return {"search": None, "requires": {}}
    if "choices" in search:
        along = {
            v: {_beside(path, key): x for key, x in given.items()} for v, given in search.get("beside", {}).items()
        }
        fitting = [v for v in search["choices"] if _takes(config, {path: v} | _of(along, v))]
        search = {"choices": fitting} | ({"beside": along} if along else {})
    return {"search": _plain(search), "requires": _plain(needed)}


def _of(along: Mapping[str, dict[str, Any]], value: Any) -> dict[str, Any]:
    return along.get(value, {}) if isinstance(value, str) else {}


def _beside(path: str, key: str) -> str:
    """Full path of a setting that is named from the section of another one on."""
    return f"{path.rpartition('.')[0]}.{key}"


def _takes(config: type[Config], settings: Mapping[str, Any]) -> bool:
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *sections, key = path.split(".")[1:]  # without `method`
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = value
    try:
        config.model_validate(tree)
    except ValidationError:
        return False
    return True


def _accepted(method: str, section: str) -> list[str]:
    """Names of a section that a run of the method may have: those that the config does not refuse."""
    accepted = []
    for value in values(section):
        try:
            load(None, ["run=run", "data.pools=pools", f"method={method}", f"{section}={value}"])
            accepted.append(value)
        except ConfigError:
            continue
    return accepted


def values(section: str) -> list[str]:
    """Words that a section of the config may be set to: `weighting` or `gradients`."""
    return _names_in(RunConfig.model_fields[section].annotation)


def _names_in(annotation: Any) -> list[str]:
    """Values of the key `name` in a config class, or in each of a union of them."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [str(value) for value in get_args(annotation.model_fields["name"].annotation)]
    return [value for part in get_args(annotation) for value in _names_in(part)]


def _documentation(kind: type[Method]) -> str:
    return inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")


def _idea(kind: type[Method]) -> str:
    return _documentation(kind).partition("\n")[0].rstrip(".")


def _source(kind: type[Method]) -> str:
    """Of its file: the line that begins with `Source:`, up to what differs from it."""
    what = re.compile(r"^Source: (.*?)(?=\s+Differs|\.\s+Where|\n\n|\nAxes|\Z)", re.DOTALL | re.MULTILINE)
    found = what.search(_documentation(kind))
    return " ".join(found[1].split()).rstrip(".") if found else ""


def _at(config: Any, path: str) -> Any:
    for key in path.split(".")[1:]:
        config = getattr(config, key)
    return config


def _extra(field: Any) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _short(value: Any) -> str:
    """As it is written in a recipe."""
    if isinstance(value, list):
        return f"[{', '.join(_short(item) for item in value)}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _range(search: Mapping[str, Any] | None) -> str:
    if search is None:
        return ""
    if "choices" in search:
        return _short(search["choices"])[1:-1]
    return f"{search['low']} to {search['high']}{', log' if search['log'] else ''}"
