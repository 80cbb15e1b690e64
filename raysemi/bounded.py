"""JSON and YAML of others: whatever the text is, what comes out is small or an error.

A few bytes can name each other into a tree of billions of nodes, nest deeper than an interpreter can follow, or hold a
number of a million digits. Both readers raise ValueError for all of that, and nothing else.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

LARGEST_YAML = 1 << 18
"""Characters of a YAML file: settings and lists of classes are far smaller."""
MOST_NODES = 50_000
"""Values of a YAML file, those that an alias repeats counted each time."""


DEEPEST = 40
"""Brackets of a YAML file that stand in one another; PyYAML takes a time that grows with their square."""


class BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which stops at brackets nested too deeply."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """As PyYAML's."""
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "brackets nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


def parse_json(content: bytes | str) -> Any:
    """A JSON text.

    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("lists or maps nested too deeply") from error


def parse_yaml(text: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """A YAML text.

    Raises:
        YAMLFault: no YAML, too long, nested too deeply, more values than `MOST_NODES`, or a value that its tag cannot
            take.
    """
    if len(text) > LARGEST_YAML:
        raise YAMLFault(f"{len(text)} characters, more than {LARGEST_YAML}")
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise YAMLFault(str(getattr(error, "problem", None) or error), mark.line + 1 if mark else None) from error
    except RecursionError as error:
        raise YAMLFault("lists or maps nested too deeply") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # `!!int x`, `!!bool 3`
        raise YAMLFault(f"a value that its tag cannot take ({error})") from error


class YAMLFault(ValueError):
    """Why a text is no usable YAML.

    Args:
        reason: in a few words.
        line: where, from 1.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason + (f" in line {line}" if line else ""))


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below and with a node, as often as they will stand in the tree."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in sizes:
        size = sizes[id(node)]
        if not size:
            raise yaml.composer.ComposerError(None, None, "an alias of what it stands in", node.start_mark)
        return size
    sizes[id(node)] = 0  # until it is known
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    size = 1
    for part in parts:
        size += _count(part, sizes)
        if size > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES} values", node.start_mark)
    sizes[id(node)] = size
    return size
