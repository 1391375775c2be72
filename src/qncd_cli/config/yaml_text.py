"""YAML from anybody: read safely, within bounds, no key twice.

A few lines can stand for gigabytes (aliases of aliases), or nest deeper than a reader can follow.
So the text is looked through before anything is made of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..store.regular import read_regular

YamlError = yaml.YAMLError
LARGEST = 1 << 25
"""Bytes of a file; a configuration has thousands, one with a list of 30,000 prompts 3e6."""
DEEPEST = 64
"""Mappings and lists within each other; a configuration has six."""
MOST = 1_000_000
"""Values, aliases counted as what they stand for."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C reads ten times faster


class _UniqueKeys(_Loader):
    """Refuses a key that stands twice in a mapping, of which YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        first = {key.value: key for key in reversed(keys)}
        for key in keys:
            if first[key.value] is not key:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key.value} stands there again")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The plain values of a file. Raises OSError, UnicodeDecodeError, YAMLError."""
    return parse_yaml(read_regular(path, LARGEST).decode("utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """The plain values of a text. Raises YAMLError, also for what is beyond the bounds."""
    _check_bounds(text)
    try:
        return yaml.load(text, _UniqueKeys)
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, a list as a key
        raise yaml.YAMLError(str(error)) from error


def _check_bounds(text: str) -> None:
    """Count values and depth. Raises YAMLError."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, _Loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        size, anchor = 0, getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, total))
            if len(open_nodes) > DEEPEST:
                raise yaml.YAMLError(f"line {line}: more than {DEEPEST} levels within each other")
            size = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            if name is not None:
                sizes[name] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if anchor in {name for name, _ in open_nodes}:
                raise yaml.YAMLError(f"line {line}: *{anchor} stands within itself")
            size = sizes.get(str(anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if anchor is not None:
                sizes[anchor] = 1
        total += size
        if total > MOST:
            raise yaml.YAMLError(f"line {line}: more than {MOST} values, aliases written out")
