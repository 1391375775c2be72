#!/usr/bin/env python
"""Write docs/config.md from the configuration's own descriptions; --check: is it up to date?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qncd_cli.config.keys import Key, sections

TARGET = Path(__file__).resolve().parent.parent / "docs" / "config.md"
HEAD = """# Configuration

Written by `make docs` from the configuration's own descriptions.

A configuration is a YAML file; `qncd init MODEL > my.yaml` writes one to begin with. Only
`model.source` has to be set. `--set KEY.PATH=VALUE` overrides a key, `--dry-run` prints what came
of it. What a file does not set comes from its preset (`quantization.preset`, `best` unless another
one is named; `qncd models` lists them with what they set); scheduler, steps and guidance come from
the model's own files. Relative paths are looked for in the current folder, then beside the file;
`~` is the home folder. The defaults below are those without a preset (`preset: null`)."""


def _default(key: Key) -> str:
    if key.required:
        return "must be set"
    if key.path in ("sampling.scheduler", "sampling.steps", "sampling.guidance_scale"):
        return "the model's own"
    word = isinstance(key.default, str) and key.default
    return f"`{word or json.dumps(key.default)}`"


def document() -> str:
    parts = [HEAD]
    for section in sections():
        rows = ["| key | default | what it is |", "|---|---|---|"]
        for key in section.keys:
            words = f" ({', '.join(key.values)})" if key.values else ""
            name = key.path.rpartition(".")[2]
            rows.append(f"| `{name}` | {_default(key)} | {key.description}{words} |")
        table = "\n".join(rows)
        parts.append(f"## {section.path}\n\n{section.description}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    text = document()
    if "--check" in sys.argv:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            print(f'{TARGET} is out of date: run "make docs"', file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
