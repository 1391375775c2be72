"""Templates become pages: jinja2, whatever comes from outside escaped, nothing fetched.

Templates lie beside this module and are part of the package.
"""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..vocabulary import number


def render(template: str, **values: Any) -> str:
    """The text of a template of report/templates. Raises jinja2's UndefinedError where it asks for
    a value that is not given."""
    return environment().get_template(template).render(**values)


def part(template: str, **values: Any) -> Markup:
    """The same as a part of a page, not escaped again."""
    return Markup(render(template, **values))


@functools.cache
def environment() -> Environment:
    """Templates of this package; blocks leave no empty lines behind."""
    found = Environment(
        loader=PackageLoader("qncd_cli.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters["number"] = number
    found.filters["together"] = _together
    found.filters["breakable"] = _breakable
    found.globals["as_is"] = _as_is
    return found


def _together(label: str) -> str:
    """A heading whose arrow and unit are not parted from the word before."""
    return label.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓").replace(", dB", ",\u00a0dB")


def _breakable(name: str) -> Markup:
    """A layer's name that may go on in the next line after a dot."""
    return Markup(".<wbr>").join(name.split("."))


def _as_is(name: str) -> Markup:
    """A style sheet or a script of the templates, as it lies there."""
    loader = environment().loader
    assert loader is not None
    return Markup(loader.get_source(environment(), name)[0])
