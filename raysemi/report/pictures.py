"""Pictures of several runs, arranged for comparison: one table an image, a row a group of runs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from raysemi.report.runs import Group, Panel

MOST_IMAGES = 8
"""Images of a kind that are shown."""
_ORDER = ("image", "pseudo-label", "after propagation", "kept pixels", "prediction", "truth")


def comparisons(groups: Sequence[Group], num_series: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each kind and image, a table: a column a title, a row a group; what is equal in all groups stands once.

    Of a group, the first run with pictures is shown.

    Args:
        groups: the rows.
        num_series: colours of the page; more groups begin anew.

    Returns:
        (heading, images) of each kind that any run has.
    """
    kinds = []
    for kind, heading in (("unlabeled", "Unlabeled images"), ("val", "Validation images")):
        by_group = []
        for position, group in enumerate(groups):
            run = next((run for run in group.runs if any(picture.kind == kind for picture in run.pictures)), None)
            if run is not None:
                own = {picture.key: picture for picture in run.pictures if picture.kind == kind}
                by_group.append((position % num_series, group.name, own))
        keys = list(dict.fromkeys(key for _, _, own in by_group for key in own))
        # images that most groups show come first: they can be compared
        keys.sort(key=lambda key: -sum(key in own for _, _, own in by_group))
        images = []
        for key in keys[:MOST_IMAGES]:
            rows = [
                (series, name, {p.title: p for p in own[key].panels}) for series, name, own in by_group if key in own
            ]
            images.append({"key": key, **_grid(rows)})
        if images:
            kinds.append((heading, images))
    return kinds


def _grid(rows: Sequence[tuple[int, str, dict[str, Panel]]]) -> dict[str, Any]:
    titles = list(dict.fromkeys(title for _, _, panels in rows for title in panels))
    titles.sort(key=lambda title: _ORDER.index(title) if title in _ORDER else _ORDER.index("prediction") - 0.5)
    shared = {
        title
        for title in titles
        if len(rows) > 1 and len({panels[title].content if title in panels else b"" for _, _, panels in rows}) == 1
    }
    own = [title for title in titles if title not in shared]
    if len(rows) > 1 and len(own) == 1:  # the groups differ in one picture alone: side by side in one row
        columns: list[dict[str, Any]] = []
        for title in titles:
            for series, name, panels in rows[:1] if title in shared else rows:
                heading = {"text": title} if title in shared else {"text": name, "series": series}
                columns.append(heading | {"src": _data_url(panels[title]) if title in panels else None})
        return {"titles": columns, "rows": [{"cells": [{"src": c["src"], "span": 1} for c in columns]}], "named": False}
    lines = []
    for position, (series, name, panels) in enumerate(rows):
        cells = [
            {"src": _data_url(panels[title]) if title in panels else None, "span": len(rows) if title in shared else 1}
            for title in titles
            if position == 0 or title not in shared
        ]
        lines.append({"series": series, "name": name, "cells": cells})
    return {"titles": [{"text": title} for title in titles], "rows": lines, "named": True}


def _data_url(panel: Panel) -> str:
    return f"data:{panel.media};base64,{base64.b64encode(panel.content).decode()}"
