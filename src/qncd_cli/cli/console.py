"""What the user sees: results on stdout, progress on stderr, errors as one line and a code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import launch
from ..errors import EXIT_FILE, EXIT_SIGNAL, EXIT_UNFORESEEN, EXIT_USAGE, QncdError
from ..progress import no_progress
from ..stopping import Stopped
from ..vocabulary import is_number, number
from .options import QUIET
from .process import begun
from .progress import Bars, lines

T = TypeVar("T")


class Interrupted(Exception):
    """Ctrl-C, and what is kept of the work: a phrase."""


@contextmanager
def keeping(what: str | Callable[[], str]) -> Iterator[None]:
    """Whoever interrupts the block is told what is kept. The innermost block is heard."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(what if isinstance(what, str) else what()) from error


class ErrorReportingCommand(click.Command):
    """Fails with one line on stderr and a fixed exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        given = kwargs.get("args", args[0] if args else None)
        _answer.wanted = "--json" in (sys.argv[1:] if given is None else given)
        _answer.printed = False
        try:
            if sys.stdout is None:  # the next file that is opened would get what is printed
                _fail("Error: standard output is closed (> /dev/null discards it)", EXIT_FILE)
            result = super().main(*args, **kwargs)
            sys.stdout.flush()
            sys.exit(result if isinstance(result, int) else 0)
        except QncdError as error:
            if error.told:
                sys.exit(error.exit_code)
            _fail(f"Error: {error}", error.exit_code, error)
        except Interrupted as interruption:
            _interrupted(interruption, f": {interruption}.")
        except (click.Abort, KeyboardInterrupt) as interruption:
            _interrupted(interruption, ".")
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(EXIT_USAGE)
        except click.UsageError as error:
            usage = error.ctx.command_path if error.ctx else "qncd"
            _fail(f'Error: {error.format_message()} (see "{usage} --help")', EXIT_USAGE, error)
        except click.ClickException as error:
            _fail(f"Error: {error.format_message()}", EXIT_USAGE, error)
        except BrokenPipeError:
            sys.exit(0)
        except OSError as error:
            what = error.strerror or str(error)
            where = f"{shortened(str(error.filename))}: " if error.filename else ""
            _fail(f"Error: {where}{what}", EXIT_FILE, error)
        except Exception as error:
            said = f"Error: {_unforeseen(error)} (--debug shows where from)"
            _fail(said, EXIT_UNFORESEEN, error)


class ErrorReportingGroup(ErrorReportingCommand, click.Group):
    """Its commands fail so, and are listed with their summaries in full."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [
            (name, command.get_short_help_str(limit=10**4))  # wrapped, not cut
            for name, command in commands.items()
            if command is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def shortened(text: str, most: int = 80) -> str:
    """A word of the user's for an error, which can be a whole prompt where a path is expected."""
    return text if len(text) <= most else f"{text[:most]}..."


def _interrupted(error: BaseException, kept: str) -> None:
    """Say that a signal stopped the command, and exit with the code that belongs to it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Stopped):
        cause = cause.__cause__ or cause.__context__
    number = cause.number if isinstance(cause, Stopped) else signal.SIGINT
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    _fail(f"Interrupted{by}{kept}", EXIT_SIGNAL + number)


def _unforeseen(error: Exception) -> str:
    """An error that nobody thought of: what it is, and the line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).parent.parent
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(root)]
    last = (ours or frames)[-1]
    name = last.filename.removeprefix(f"{root}{os.sep}")
    said = " ".join(str(error).split())
    what = f"{type(error).__name__}: {shortened(said, 200)}" if said else type(error).__name__
    return f"{what}, unforeseen, at {name}:{last.lineno}"


class _Answer:
    """The one JSON object of a command: whether it is wanted, and printed by now."""

    wanted = False
    printed = False


_answer = _Answer()


def _fail(line: str, code: int, error: Exception | None = None) -> None:
    """Say why the command ends, with --json in its object as well, and end it."""
    context = click.get_current_context(silent=True)
    if "--debug" in sys.argv or (context and context.params.get("debug")):
        traceback.print_exc()
    who = f"rank {launch.rank()}: " if launch.count() > 1 else ""
    with suppress(OSError):  # the terminal may be gone
        click.echo(who + line, err=True)
    if _answer.wanted and not _answer.printed and launch.rank() == 0:
        known = error if isinstance(error, QncdError) else None
        told = {
            "kind": type(error).__name__ if error else "Stopped" if code > EXIT_SIGNAL else "Usage",
            "message": known.message if known else line.removeprefix("Error: "),
            "hint": known.hint if known else "",
            "exit_code": code,
        }
        with suppress(OSError, AttributeError):  # it may be what failed
            _print({"error": told})
            sys.stdout.flush()
    sys.exit(code)


def _print(payload: dict[str, Any]) -> None:
    from ..store.files import finite

    _answer.printed = True
    click.echo(json.dumps(finite(payload), sort_keys=True, allow_nan=False))


class Console:
    """One command's output. as_json: one JSON object on stdout and nothing else there.

    announced: whether somebody has said already what is done and why.
    """

    announced = False

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self._lap = begun()
        self._bars = Bars()
        context = click.get_current_context(silent=True)
        self._heard = launch.rank() == 0  # of a job, the first process speaks for all
        self._quiet = not self._heard or (context is not None and QUIET in context.meta)

    def track(
        self, items: Iterable[T], description: str, total: int, unit: str
    ) -> Generator[T, None, None]:
        """Progress on stderr (see progress.py)."""
        if self._quiet:
            return no_progress(items, description, total, unit)
        if not sys.stderr.isatty():
            return lines(items, description, total, unit, self.note)
        return self._bars.track(items, description, total, unit)

    def lap(self) -> float:
        """Seconds since the last call, at first since the command began, imports included."""
        last, self._lap = self._lap, time.perf_counter()
        return self._lap - last

    def note(self, text: str) -> None:
        """A remark for the person at the terminal, on stderr."""
        if not self._quiet:
            click.echo(text, err=True)

    def result(self, payload: dict[str, Any], render: Callable[[], None]) -> None:
        """payload as JSON, or whatever render prints for people."""
        if not self._heard:
            return
        if self.as_json:
            _print(payload)
        else:
            render()

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        title: str = "",
        keys: int = 1,
    ) -> None:
        """A table on stdout, in full at any width; numbers to the right.

        keys: how many of the first columns say what a row is. Without a terminal it is as wide as
        COLUMNS says, or 120.
        """
        from . import tables

        rows = [list(row) for row in rows]
        right = [all(is_number(row[i]) for row in rows) for i in range(len(columns))]
        cells = [[show(value) for value in row] for row in rows]
        width = shutil.get_terminal_size((120, 24)).columns
        if title:
            click.echo(textwrap.fill(title, width, break_long_words=False))
        tables.show(tables.Grid(columns, cells, right, keys), width, sys.stdout)

    def pairs(self, named: Sequence[tuple[str, Any]]) -> None:
        """Names and values on stdout, a line each."""
        from . import tables

        width = shutil.get_terminal_size((120, 24)).columns
        for line in tables.pairs([(name, show(value)) for name, value in named], width):
            click.echo(line)


def show(value: Any) -> str:
    """A value in a table: numbers as everywhere, text as it is."""
    return number(value) if value is None or isinstance(value, int | float) else str(value)
