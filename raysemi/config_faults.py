"""What pydantic finds wrong with a tree of settings, as the lines that a user reads."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from raysemi.config import RunConfig, broken_rules
from raysemi.errors import ConfigError


def texts(error: ValidationError, tree: dict[str, Any], root: type[BaseModel] = RunConfig) -> list[str]:
    """Every fault once: pydantic's, and those of the rules across components, before which pydantic stops.

    Args:
        error: from validating `tree` as a `root`.
        tree: the user's settings.
        root: the class of the whole config.
    """
    items = error.errors()
    faults = [fault for item in items for fault in _texts(item, tree, root)]
    if root is RunConfig and any(item["loc"] for item in items):
        sound, doubtful = copy.deepcopy(tree), set[str]()
        for item in items:
            path, _ = _place(item, tree)
            _remove(sound, path)
            doubtful.add(".".join(path))
            if item["type"] == "extra_forbidden" and (meant := _meant(path, tree, root)):
                doubtful.add(meant)
        # A rule that reads a faulty setting would now see its default, and say what is not so.
        found = broken_rules(dict(_valid_sections(sound)))
        faults += [fault for fault in found if not any(path in fault for path in doubtful)]
    return list(dict.fromkeys(faults))


def _remove(tree: Any, path: list[str]) -> None:
    for key in path[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(path[-1], None)


def _valid_sections(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, field in RunConfig.model_fields.items():
        if name in tree:
            adapter: TypeAdapter[Any] = TypeAdapter(_annotation(field))
            try:
                yield name, adapter.validate_python(tree[name])
            except ValidationError:
                continue
        elif not field.is_required():
            yield name, field.get_default(call_default_factory=True)


def _annotation(field: Any) -> Any:
    # Of a FieldInfo, the annotation alone has lost the discriminator; pydantic's error would then name every member.
    return Annotated[field.annotation, field] if field.discriminator else field.annotation


def _texts(error: Any, tree: dict[str, Any], root: type[BaseModel]) -> Iterator[str]:
    """One fault of pydantic as the texts that the user reads."""
    path, value = _place(error, tree)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        raised = context["error"]
        for fault in raised.faults if isinstance(raised, ConfigError) else (str(raised),):
            yield _with_path(fault, path, root)
    elif kind == "extra_forbidden":
        yield _unknown_key(path, value, tree, root)
    elif kind in ("missing", "union_tag_not_found"):
        name = ".".join([*path, "name"] if kind == "union_tag_not_found" else path)
        yield f"{name} must be given; got nothing. Add {name}=VALUE or write it into the recipe."
    elif kind == "union_tag_invalid":
        names = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
        yield _one_of([*path, "name"], names, context["tag"], root)
    elif kind == "literal_error":
        yield _one_of(path, re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]], value, root)
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


def _with_path(fault: str, path: list[str], root: type[BaseModel]) -> str:
    first = re.split(r"[. ]", fault, maxsplit=1)[0]
    text = fault if fault.endswith(".") else f"{fault}."
    if first in root.model_fields or not path:
        return text
    if first == "must":
        return f"{'.'.join(path)} {text}"
    return f"{'.'.join(path)}.{text}" if re.match(r"[\w.]+ must ", text) else f"{'.'.join(path)}: {text}"


def _one_of(path: list[str], names: list[str], value: Any, root: type[BaseModel]) -> str:
    advice = did_you_mean(str(value), names) or "Choose one of these."
    rule = f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    if len(path) == 1 and _section_of(root.model_fields[path[0]].annotation, None) is not None:
        rule += f", or have keys of its own ({path[0]}.*)"
    return f"{'.'.join(path)} must be {rule}; got {value!r}. {advice}"


def did_you_mean(word: str, names: Sequence[str]) -> str:
    """Advice with the name that is most like a word; empty when none is."""
    near = difflib.get_close_matches(word, names, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _unknown_key(path: list[str], value: Any, tree: dict[str, Any], root: type[BaseModel]) -> str:
    *parents, _ = path
    names = ", ".join(_parent(path, tree, root).model_fields)
    meant = _meant(path, tree, root)
    where = f"{'.'.join(parents)}.*" if parents else "the top"
    advice = f"Did you mean {meant}? " if meant else ""
    return f"{'.'.join(path)} must be a known setting; got {value!r}. {advice}Valid keys of {where}: {names}."


def _meant(path: list[str], tree: dict[str, Any], root: type[BaseModel]) -> str | None:
    """The setting that an unknown path is most like: in the same section, else of the same name elsewhere."""
    *parents, key = path
    near = difflib.get_close_matches(key, list(_parent(path, tree, root).model_fields), n=1)
    elsewhere = [known for known, _ in settings(root, tree) if known.split(".")[-1] == key]
    return ".".join([*parents, near[0]]) if near else next(iter(elsewhere), None)


def _parent(path: list[str], tree: dict[str, Any], root: type[BaseModel]) -> type[BaseModel]:
    section = root
    at: Any = tree
    annotation: Any = None
    for key in path[:-1]:
        at = at.get(key) if isinstance(at, Mapping) else None
        if not key.isdigit():  # a place in a list: one of its sections
            annotation = section.model_fields[key].annotation
        inner = _section_of(annotation, at, in_lists=True)
        assert inner is not None  # pydantic forbids unknown keys in sections alone
        section = inner
    return section


def settings(section: type[BaseModel], tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path of a section of the config, with its field.

    Args:
        section: a config class.
        tree: the user's settings, which say which member of a union is meant.
        path: what the paths begin with.
    """
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation, tree.get(name) if isinstance(tree, Mapping) else None)
        if inner is None:
            yield f"{path}{name}", field
        else:
            yield from settings(inner, tree.get(name) if isinstance(tree, Mapping) else None, f"{path}{name}.")


def _section_of(annotation: Any, value: Any, *, in_lists: bool = False) -> type[BaseModel] | None:
    """The config class inside an annotation; among several, the one whose `name` the value holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is tuple and not in_lists:
        return None
    parts = get_args(annotation)
    found = [inner for part in parts if (inner := _section_of(part, value, in_lists=in_lists)) is not None]
    name = value.get("name") if isinstance(value, Mapping) else None
    named = [inner for inner in found if "name" in inner.model_fields and inner.model_fields["name"].default == name]
    return next(iter(named or found), None)
