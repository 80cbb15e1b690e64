"""YAML and `a.b=value` overrides <-> RunConfig; every fault at once, each under the path that the user wrote."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from raysemi.bounded import BoundedLoader, YAMLFault, parse_yaml
from raysemi.config import RunConfig
from raysemi.config_faults import did_you_mean, texts
from raysemi.engine.detect import DetectConfig
from raysemi.errors import ConfigError

Tree = TypeVar("Tree", bound=BaseModel)

_NAMED = ("method", "weighting", "gradients")
"""Sections whose short form, a word, stands for their `name`."""
_POOLS = ("labeled", "unlabeled", "val")
"""What `data.pools: DIR` stands for: DIR/labeled, DIR/unlabeled, DIR/val, as `raysemi pack --out DIR` writes them."""


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies overrides.

    Args:
        recipe: path of a YAML file, or the name of a recipe that comes with raysemi; None: the overrides are all. With
            `base: NAME` it changes another one, which has no base of its own.
        overrides: `a.b=value` each, the value as YAML; a later one wins.

    Raises:
        ConfigError: with every fault that was found.
    """
    return _load(RunConfig, recipe, overrides)


def load_detector(recipe: str | Path | None, overrides: Sequence[str] = ()) -> DetectConfig:
    """`load` for the recipe of a detector."""
    return _load(DetectConfig, recipe, overrides)


def _load(kind: type[Tree], recipe: str | Path | None, overrides: Sequence[str]) -> Tree:
    tree = {} if recipe is None else _recipe(str(recipe), kind)
    return _validate(tree, apply_overrides(tree, overrides), kind)


def change(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A config with overrides applied, as `load` applies them.

    Raises:
        ConfigError: with every fault that was found.
    """
    tree = _mapping(dump(config), "config")
    return _validate(tree, apply_overrides(tree, overrides), RunConfig)


def parse(text: str, source: str = "config.yaml") -> RunConfig:
    """Reads what `dump` wrote.

    Args:
        text: YAML.
        source: where it comes from, for error texts.
    """
    return _validate(_mapping(text, source), [], RunConfig)


def parse_detector(text: str, source: str = "config.yaml") -> DetectConfig:
    """`parse` for the config of a detector."""
    return _validate(_mapping(text, source), [], DetectConfig)


def dump(config: RunConfig | DetectConfig) -> str:
    """The resolved config as YAML, in the order of the classes' fields."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def difference(a: Tree, b: Tree) -> list[str]:
    """Dotted paths of the settings that differ, or that only one of the two has, sorted."""
    left, right = dict(_leaves(a.model_dump(mode="json"))), dict(_leaves(b.model_dump(mode="json")))
    paths = {path for path in left.keys() | right.keys() if left.get(path, _ABSENT) != right.get(path, _ABSENT)}
    # A section against a word (`ray: none`): its keys say it, the word adds nothing.
    return sorted(path for path in paths if not any(other.startswith(f"{path}.") for other in paths))


def leaves(config: BaseModel) -> dict[str, Any]:
    """Dotted path -> value of every setting, as `dump` writes them."""
    return dict(_leaves(config.model_dump(mode="json")))


def recipes() -> list[str]:
    """Names of the recipes that come with raysemi, sorted."""
    return _names(_RECIPES)


def recipe_file(name: str) -> Path:
    """The file of a recipe that comes with raysemi."""
    return _RECIPES / f"{name}.yaml"


def detector_recipes() -> list[str]:
    """Names of the recipes of detectors, sorted."""
    return _names(_RECIPES / "detectors")


def _names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


_ABSENT = object()
_RECIPES = Path(__file__).parent / "recipes"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


class Loader(BoundedLoader):
    """YAML 1.2's words and numbers (1e-3 is a number, `no` and 2026-01-31 are texts); a key twice is refused."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read as a text."""


for _class in (Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
    _class.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
        list("-+.0123456789"),
    )


def _mapping_without_duplicates(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} must be a text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _yaml(text: str) -> Any:
    return parse_yaml(text, Loader)


def _recipe(recipe: str, kind: type[BaseModel]) -> dict[str, Any]:
    """A recipe's tree, with its base below it."""
    path = _recipe_path(recipe, kind)
    tree = _mapping(_text(path), recipe)
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str) or not base:
        raise ConfigError(f"base of {recipe} must name a recipe; got {base!r}. Correct or remove it.")
    below = path.parent / base  # a file beside this one; an absolute path stays what it is
    tree_below = _mapping(_text(_recipe_path(str(below) if below.is_file() else base, kind)), base)
    if "base" in tree_below:
        raise ConfigError(f"base of {recipe} must have no base itself; got {base}, which has one. Name that one.")
    # as with overrides: another method starts from its defaults, and pools replace pools
    for name in _NAMED:
        own, other = (_section(of, name).get("name") for of in (tree, tree_below))
        if own is not None and other is not None and own != other:
            del tree_below[name]
    if "pools" in _section(tree, "data"):
        tree_below["data"] = {key: value for key, value in _section(tree_below, "data").items() if key not in _POOLS}
    return _over(tree_below, tree)


def _over(below: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """One tree over another, section by section."""
    both = {key for key in tree if isinstance(tree[key], dict) and isinstance(below.get(key), dict)}
    return {**below, **tree, **{key: _over(below[key], tree[key]) for key in both}}


def _section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a tree; empty where there is none, or something else in its place."""
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def _recipe_path(recipe: str, kind: type[BaseModel]) -> Path:
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    folder = _RECIPES if kind is RunConfig else _RECIPES / "detectors"
    names = _names(folder)
    if recipe in names:
        return folder / f"{recipe}.yaml"
    listed = "`raysemi train --list` names them all." if kind is RunConfig else f"They are {', '.join(names)}."
    raise ConfigError(
        f"recipe must be a YAML file or the name of one that comes along; got {recipe}. "
        f"{did_you_mean(recipe, names) or 'Check the path.'} {listed}"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe must be a readable YAML file; got {path}: {error}. Check the file.") from error


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        tree = _yaml(text)
    except YAMLFault as error:
        raise ConfigError(f"{source} must be YAML with each key once; got {error}. Correct the file.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must be a YAML map of settings; got {tree!r:.200}. See `raysemi train --help`.")
    for name in _NAMED:
        if isinstance(tree.get(name), str):
            tree[name] = {"name": tree[name]}
    return tree


def _expand_pools(tree: dict[str, Any]) -> Iterator[str]:
    """Replaces `data.pools` by what it stands for; yields its fault."""
    section = tree.get("data")
    if not isinstance(section, dict) or "pools" not in section:
        return
    folder = section.pop("pools")
    if isinstance(folder, str) and folder:
        tree["data"] = {name: f"{folder.rstrip('/')}/{name}" for name in _POOLS} | section
    else:
        yield f"data.pools must name the folder that `raysemi pack --out` wrote; got {folder!r}. Correct or remove it."


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Sets values `a.b=value` in a tree, one after another; returns the faults."""
    faults, given = [], dict[str, Any]()
    for text in overrides:
        path, equals, value_text = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(re.fullmatch(r"\w+", key) for key in keys):
            faults.append(
                f"override must read a.b=value; got {text!r:.200}. Write the setting's dotted path, `=` and its value."
            )
            continue
        try:
            value = _yaml(value_text)
        except YAMLFault:
            faults.append(
                f"{path} must be a YAML value; got {value_text!r:.200}. Quote it if it is a text with special signs."
            )
            continue
        if len(keys) == 1 and keys[0] in _NAMED and isinstance(value, str):
            _rename(tree, given, keys[0], value)
        else:
            for below in (tree, given):
                _set(below, keys, value)
    return faults


def _rename(tree: dict[str, Any], given: dict[str, Any], section: str, name: str) -> None:
    """A word for a section means `.name`: with the same name the recipe's other keys stay, another name starts from
    defaults and from what overrides have set so far, wherever they stand."""
    _set(given, [section, "name"], name)
    if not isinstance(tree.get(section), dict) or tree[section].get("name") != name:
        tree[section] = copy.deepcopy(given[section])


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    section = tree
    for key in keys[:-1]:
        if not isinstance(section.get(key), dict):
            section[key] = {}
        section = section[key]
    if list(keys) == ["data", "pools"]:
        for name in _POOLS:
            section.pop(name, None)  # the recipe's; an override after this one counts again
    section[keys[-1]] = copy.deepcopy(value)


def _validate(tree: dict[str, Any], faults: list[str], kind: type[Tree]) -> Tree:
    faults = [*faults, *_expand_pools(tree)]
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([*faults, *texts(error, tree, kind)]) from error
    if faults:
        raise ConfigError(faults)
    return config
