#!/usr/bin/env python
"""Write docs/commands.md from the commands' own help."""

from __future__ import annotations

import click
import written

from qncd_cli.cli.main import cli

TARGET = written.DOCS / "commands.md"
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


if __name__ == "__main__":
    written.main(__doc__, lambda: {TARGET: document()})
