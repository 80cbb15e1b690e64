"""What all pages share: their style sheet, and how numbers read on them."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from raysemi.report.runs import Spread


def render(package: str, **shown: Any) -> str:
    """Fills the `template.html` of a package.

    Args:
        package: with the template among its files.
        shown: what the template names; text is escaped, Markup is not.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "duration": duration}
    template = environment.from_string(resources.files(package).joinpath("template.html").read_text("utf-8"))
    style = resources.files(__package__).joinpath("page.css").read_text("utf-8")
    return template.render(style=Markup(style), **shown)  # noqa: S704 - our own file


def number(spread: Spread | float | None, decimals: int = 1) -> str:
    """With its standard deviation where that does not round to 0."""
    if spread is None:
        return "–"
    mean = spread.mean if isinstance(spread, Spread) else spread
    text = f"{mean:,.{decimals}f}"
    if isinstance(spread, Spread) and spread.deviation is not None and spread.deviation >= 0.5 * 10**-decimals:
        text += f" ± {spread.deviation:,.{decimals}f}"
    return text


def duration(spread: Spread | None) -> str:
    """Seconds in words."""
    if spread is None:
        return "–"
    seconds = round(spread.mean)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"
