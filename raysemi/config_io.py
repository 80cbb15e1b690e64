"""YAML and `a.b=value` overrides <-> RunConfig; every fault at once, each under the path that the user wrote."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from raysemi.config import RunConfig, broken_rules
from raysemi.errors import ConfigError

_NAMED = ("method", "weighting", "gradients")
"""Sections whose short form, a word, stands for their `name`."""
_POOLS = ("labeled", "unlabeled", "val")
"""What `data.pools: DIR` stands for: DIR/labeled, DIR/unlabeled, DIR/val, as `raysemi pack --out DIR` writes them."""


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies overrides.

    Args:
        recipe: path of a YAML file, or the name of a recipe that comes with raysemi.
        overrides: `a.b=value` each, the value as YAML; a later one wins.

    Raises:
        ConfigError: with every fault that was found.
    """
    tree = _mapping(_recipe_text(str(recipe)), str(recipe))
    faults = [fault for text in overrides for fault in _override(tree, text)]
    return _validate(tree, faults)


def change(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A config with overrides applied, as `load` applies them.

    Raises:
        ConfigError: with every fault that was found.
    """
    tree = _mapping(dump(config), "config")
    return _validate(tree, [fault for text in overrides for fault in _override(tree, text)])


def parse(text: str, source: str = "config.yaml") -> RunConfig:
    """Reads what `dump` wrote.

    Args:
        text: YAML.
        source: where it comes from, for error texts.
    """
    return _validate(_mapping(text, source), [])


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, in the order of the classes' fields."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def difference(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted paths of the settings that differ, or that only one of the two has, sorted."""
    left, right = dict(_leaves(a.model_dump(mode="json"))), dict(_leaves(b.model_dump(mode="json")))
    paths = {path for path in left.keys() | right.keys() if left.get(path, _ABSENT) != right.get(path, _ABSENT)}
    # A section against a word (`ray: none`): its keys say it, the word adds nothing.
    return sorted(path for path in paths if not any(other.startswith(f"{path}.") for other in paths))


def recipes() -> list[str]:
    """Names of the recipes that come with raysemi, sorted."""
    return sorted(file.stem for file in _RECIPES.glob("*.yaml"))


_ABSENT = object()
_RECIPES = Path(__file__).parent / "recipes"


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


class _Loader(yaml.SafeLoader):
    """YAML 1.2's words and numbers (1e-3 is a number, `no` and 2026-01-31 are texts); a key twice is refused."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a text."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
    _class.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:null|~|)$"), ["n", "~", ""])
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
        list("-+.0123456789"),
    )


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} must be a text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def _recipe_text(recipe: str) -> str:
    path = Path(recipe).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe must be a readable YAML file; got {recipe}: {error}. Check the file.") from error
    names = recipes()
    if recipe in names:
        return (_RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    raise ConfigError(
        f"recipe must be a YAML file or one of {', '.join(names)}; got {recipe}. "
        f"{_did_you_mean(recipe, names) or 'Check the path.'}"
    )


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        tree = _yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise ConfigError(
            f"{source} must be YAML with each key once; got {reason}{place}. Correct the file."
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must be a YAML map of settings; got {tree!r}. See `raysemi train --help`.")
    for name in _NAMED:
        if isinstance(tree.get(name), str):
            tree[name] = {"name": tree[name]}
    if isinstance(tree.get("data"), dict) and isinstance(folder := tree["data"].pop("pools", None), str):
        tree["data"] = _pools_in(folder) | tree["data"]
    return tree


def _pools_in(folder: str) -> dict[str, str]:
    return {name: f"{folder.rstrip('/')}/{name}" for name in _POOLS}


def _override(tree: dict[str, Any], text: str) -> Iterator[str]:
    """Sets one value in the tree; yields its faults."""
    path, equals, value_text = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(re.fullmatch(r"\w+", key) for key in keys):
        yield f"override must read a.b=value; got {text!r}. Write the setting's dotted path, `=` and its value."
        return
    try:
        value = _yaml(value_text)
    except yaml.YAMLError:
        yield f"{path} must be a YAML value; got {value_text!r}. Quote it if it is a text with special signs."
        return
    if len(keys) == 1 and keys[0] in _NAMED and isinstance(value, str):
        # A word means `.name`: with the same name the recipe's other keys stay, another name starts from defaults.
        if not isinstance(tree.get(keys[0]), dict) or tree[keys[0]].get("name") != value:
            tree[keys[0]] = {"name": value}
        return
    section = tree
    for key in keys[:-1]:
        if not isinstance(section.get(key), dict):
            section[key] = {}
        section = section[key]
    if keys == ["data", "pools"]:
        section.update(_pools_in(str(value)))
    else:
        section[keys[-1]] = value


def _validate(tree: dict[str, Any], faults: list[str]) -> RunConfig:
    config = None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        faults = [*faults, *(fault for item in error.errors() for fault in _texts(item, tree))]
        if any(item["loc"] for item in error.errors()):
            faults += broken_rules(dict(_valid_sections(tree)))  # pydantic stops before the rules; the user should not
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    assert config is not None  # no fault was found
    return config


def _valid_sections(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, field in RunConfig.model_fields.items():
        if name not in tree:
            if not field.is_required():
                yield name, field.get_default(call_default_factory=True)
            continue
        adapter: TypeAdapter[Any] = TypeAdapter(_annotation(field))
        try:
            yield name, adapter.validate_python(tree[name])
        except ValidationError:
            continue


def _annotation(field: Any) -> Any:
    # Of a FieldInfo, the annotation alone has lost the discriminator; pydantic's error would then name every member.
    return Annotated[field.annotation, field] if field.discriminator else field.annotation


def _texts(error: Any, tree: dict[str, Any]) -> Iterator[str]:
    """One fault of pydantic as the texts that the user reads."""
    path, value = _place(error, tree)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        raised = context["error"]
        for fault in raised.faults if isinstance(raised, ConfigError) else (str(raised),):
            yield _with_path(fault, path)
    elif kind == "extra_forbidden":
        yield _unknown_key(path, value, tree)
    elif kind in ("missing", "union_tag_not_found"):
        name = ".".join([*path, "name"] if kind == "union_tag_not_found" else path)
        yield f"{name} must be given; got nothing. Add {name}=VALUE or write it into the recipe."
    elif kind == "union_tag_invalid":
        names = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        yield _one_of([*path, "name"], names, context["tag"])
    elif kind == "literal_error":
        yield _one_of(path, re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]], value)
    else:
        rule = _RULE_OF.get(kind, "be valid ({msg})").format(msg=error["msg"], **context)
        yield f"{'.'.join(path)} must {rule}; got {value!r}. Change it in the recipe or on the command line."


_RULE_OF = {
    "greater_than": "be greater than {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be less than {lt}",
    "less_than_equal": "be at most {le}",
    "multiple_of": "be a multiple of {multiple_of}",
    "finite_number": "be a finite number",
    "int_parsing": "be a whole number",
    "int_type": "be a whole number",
    "int_from_float": "be a whole number",
    "float_parsing": "be a number",
    "float_type": "be a number",
    "bool_parsing": "be true or false",
    "bool_type": "be true or false",
    "string_type": "be a text (quote it)",
    "string_too_short": "not be empty",
    "model_type": "be a section with keys of its own",
    "model_attributes_type": "be a section with keys of its own",
    "dict_type": "be a section with keys of its own",
    "tuple_type": "be a list",
    "list_type": "be a list",
    "too_short": "have at least {min_length} values",
    "too_long": "have at most {max_length} values",
}


def _place(error: Any, tree: dict[str, Any]) -> tuple[list[str], Any]:
    """Path as the user writes it, and the value there: pydantic's location without the tags of unions."""
    path: list[str] = []
    value: Any = tree
    for position, element in enumerate(error["loc"]):
        if isinstance(value, Mapping) and element in value:
            value = value[element]
        elif isinstance(value, Sequence) and not isinstance(value, str) and isinstance(element, int):
            value = value[element] if element < len(value) else None
        elif not (error["type"] == "missing" and position == len(error["loc"]) - 1):
            continue
        path.append(str(element))
    return path, value


def _with_path(fault: str, path: list[str]) -> str:
    first = re.split(r"[. ]", fault, maxsplit=1)[0]
    text = fault if fault.endswith(".") else f"{fault}."
    if first in RunConfig.model_fields or not path:
        return text
    if first == "must":
        return f"{'.'.join(path)} {text}"
    return f"{'.'.join(path)}.{text}" if re.match(r"[\w.]+ must ", text) else f"{'.'.join(path)}: {text}"


def _one_of(path: list[str], names: list[str], value: Any) -> str:
    advice = _did_you_mean(str(value), names) or "Choose one of these."
    rule = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    if len(path) == 1 and _section_of(RunConfig.model_fields[path[0]].annotation, None) is not None:
        rule += f", or have keys of its own ({path[0]}.*)"
    return f"{'.'.join(path)} must be {rule}; got {value!r}. {advice}"


def _did_you_mean(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _unknown_key(path: list[str], value: Any, tree: dict[str, Any]) -> str:
    *parents, key = path
    section: Any = RunConfig
    at: Any = tree
    for parent in parents:
        at = at.get(parent) if isinstance(at, Mapping) else None
        section = _section_of(section.model_fields[parent].annotation, at)
    names = list(section.model_fields)
    near = difflib.get_close_matches(key, names, n=1)
    elsewhere = [known for known, _ in _settings(RunConfig, tree) if known.split(".")[-1] == key]
    best = [".".join([*parents, near[0]])] if near else elsewhere[:1]
    advice = f"Did you mean {best[0]}? " if best else ""
    where = f"{'.'.join(parents)}.*" if parents else "the top"
    return (
        f"{'.'.join(path)} must be a known setting; got {value!r}. {advice}Valid keys of {where}: {', '.join(names)}."
    )


def _settings(section: type[BaseModel], tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path of a section, with its field; of a union, the member that the tree names."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation, tree.get(name) if isinstance(tree, Mapping) else None)
        if inner is None:
            yield f"{path}{name}", field
        else:
            yield from _settings(inner, tree.get(name) if isinstance(tree, Mapping) else None, f"{path}{name}.")


def _section_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The config class inside an annotation; among several, the one whose `name` the value holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [inner for part in get_args(annotation) if (inner := _section_of(part, value)) is not None]
    name = value.get("name") if isinstance(value, Mapping) else None
    named = [inner for inner in found if "name" in inner.model_fields and inner.model_fields["name"].default == name]
    return next(iter(named or found), None)
