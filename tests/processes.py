"""The command line in processes of their own, which can be killed; forked from one that has
imported everything, so that they start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "diffusers", "qncd_cli.cli.commands", "qncd_cli.stages.pipeline", "processes"]
)


@dataclass(frozen=True)
class At:
    """When a process gets a signal: at a call of the denoiser, or at a file that takes its place
    (before: still beside it). kill: the signal; before SIGKILL, what has been done is written at
    once, before the others not at all."""

    call: int = 0
    write: int = 0
    before: bool = True
    kill: int = signal.SIGKILL

    def arm(self) -> None:
        from qncd_cli.store import partial

        partial.EVERY, partial.SHARE = (0.0, 1e9) if self.kill == signal.SIGKILL else (1e9, 1.0)
        counted = {"calls": 0, "writes": 0}

        def called(module: torch.nn.Module, inputs: object) -> None:
            if type(module).__name__ == "UNet2DConditionModel":
                counted["calls"] += 1
                if counted["calls"] == self.call:
                    os.kill(os.getpid(), self.kill)

        replace = os.replace

        def replaced(source: str, target: str) -> None:
            counted["writes"] += 1
            now = counted["writes"] == self.write
            if now and self.before:
                os.kill(os.getpid(), self.kill)
            replace(source, target)
            if now and not self.before:
                os.kill(os.getpid(), self.kill)

        register_module_forward_pre_hook(called)
        os.replace = replaced  # type: ignore[assignment]


def _command(
    folder: Path,
    arguments: tuple[str, ...],
    arm: Callable[[], None] | None,
    environment: dict[str, str],
    streams: str,
) -> None:
    from qncd_cli.cli.main import cli
    from qncd_cli.cli.process import receive_signals, run_alone

    for number in (signal.SIGINT, signal.SIGHUP):  # which a suite in the background ignores
        signal.signal(number, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None  # where TMPDIR says now
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(
            os.open(folder / f"{streams}{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
        )
    torch.set_num_threads(1)
    sys.argv = ["qncd", *arguments]
    if arm is not None:
        arm()
    receive_signals()
    run_alone(lambda: cli(list(arguments), prog_name="qncd"))


def started(
    folder: Path,
    *arguments: str,
    at: At | None = None,
    environment: dict[str, str] | None = None,
    streams: str = "",
) -> multiprocessing.process.BaseProcess:
    """The command in a process that has begun; stdout.txt and stderr.txt of the folder are its.

    streams: what the names of these two begin with.
    """
    arm = None if at is None else at.arm
    process = _context.Process(
        target=_command, args=(folder, arguments, arm, environment or {}, streams)
    )
    process.start()
    return process


def code_of(
    folder: Path,
    *arguments: str,
    at: At | None = None,
    environment: dict[str, str] | None = None,
) -> int | None:
    """What the command ended with: an exit code, or minus a signal."""
    process = started(folder, *arguments, at=at, environment=environment)
    process.join()
    return process.exitcode


def stderr_of(folder: Path) -> list[str]:
    """The lines on stderr of the last command in the folder."""
    return (folder / "stderr.txt").read_text().splitlines()
