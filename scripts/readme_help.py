#!/usr/bin/env python
"""Write docs/commands.md from the commands' own help; with --check, fail if it is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qncd_cli.cli.main import cli

TARGET = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
WIDTH = 100


def help_of(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return command.get_help(context)


def document() -> str:
    parts = ["# Commands", "Written by `make docs` from the commands' own help."]
    parts.append(f"## qncd\n\n```\n{help_of(cli, 'qncd')}\n```")
    for name, command in cli.commands.items():
        parts.append(f"## qncd {name}\n\n```\n{help_of(command, f'qncd {name}')}\n```")
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
