#!/usr/bin/env python
"""The four stages of a run, killed by SIGKILL at random times, against an undisturbed run.

    python scripts/kill_run.py --kills 100

Rounds of all four stages in new folders, each stage killed up to so many times before it may end,
until there were enough kills. After each round every file has to be the undisturbed run's, byte for
byte (times of day aside), and nothing may be left beside them or in the temporary folder.

What a kill costs is the time of all processes of a stage beyond the undisturbed one's, over the
number of kills: by the clock, and of the processor, which other work on the machine disturbs less.
Processes are forked from one that has imported everything, so that kills hit the work; what Python
and its imports take before any work is begun is measured by itself, `start`. lost_a_kill is the
share of a stage that a kill costs without it, lost_with_start that where both the stage and every
kill have one start more.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.errors import ArtifactError
from qncd_cli.machine import described

IMPORTS = (
    "torch",
    "diffusers",
    "diffusers.pipelines.pipeline_loading_utils",
    "qncd_cli.cli.commands",
    "qncd_cli.stages.pipeline",
    "qncd_cli.stages.evaluate",
    "qncd_cli.models.pipelines",
    "qncd_cli.backends.int8",
)
"""What the commands import sooner or later, diffusers' classes by way of qncd's modules."""
STAGES = ("calibrate", "quantize", "sample", "eval")
CONFIG, RUN = "fashion_ldm_w4a8", Path("runs/killed")
SETTINGS = (
    "sampling.steps={steps}",
    "calibration.trajectories={trajectories}",
    "calibration.noise_trajectories=2",
)
"""With few of both a stage of minutes takes seconds."""
HOUR = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d|\"outputs\": \"\w+\"")
"""Times of day in reports, and digests of these."""
LEFT_OUT = (".txt", ".ses", "status.json", "backend.json")
"""What commands printed, a file of onnxruntime's own that it makes where it is imported, what says
which process worked when, and seconds of the backends that a long run has timed."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*IMPORTS, "kill_run"])


def stages(num: int, steps: int, trajectories: int, *, full: bool) -> dict[str, tuple[str, ...]]:
    """Command lines by stage. full: with the configuration's own settings and batches."""
    filled = [text.format(steps=steps, trajectories=trajectories) for text in SETTINGS]
    settings = () if full else tuple(word for text in filled for word in ("--set", text))
    batches = () if full else ("--batch-size", str(min(8, num // 2)))
    return {
        "calibrate": ("calibrate", "--config", CONFIG, "--run-dir", str(RUN), *settings),
        "quantize": ("quantize",),
        "sample": ("sample", "--num", str(num), "--no-compile", *batches),
        "eval": ("eval", "--fid"),
    }


def _command(folder: Path, arguments: tuple[str, ...], every: float | None) -> None:
    from qncd_cli.cli.main import cli
    from qncd_cli.cli.process import receive_signals, run_alone
    from qncd_cli.store import partial

    if every:
        partial.EVERY = every
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
    os.environ["QNCD_CACHE"] = f"{folder}-cache"  # what another round has looked at is not known
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.argv = ["qncd", *arguments]
    receive_signals()
    run_alone(lambda: cli(list(arguments), prog_name="qncd"))


def ended(
    folder: Path, arguments: tuple[str, ...], every: float | None, after: float | None
) -> tuple[bool, Times]:
    """Run a command, killed after so many seconds of the processor's; whether it ended before, and
    what it took. Raises ArtifactError where it failed."""
    begun = time.perf_counter()
    process = CONTEXT.Process(target=_command, args=(folder, arguments, every))
    process.start()
    taken, killed = 0.0, False
    while process.is_alive():
        taken = max(taken, _processor_seconds(process.pid))
        if after is not None and taken >= after:
            process.kill()
            killed = True
            break
        time.sleep(0.01)
    process.join()
    if not killed and process.exitcode != 0:
        raise ArtifactError(f"{' '.join(arguments)}: exit code {process.exitcode} in {folder}")
    return not killed, Times(time.perf_counter() - begun, taken)


class Times(NamedTuple):
    """Seconds of the clock, and of the processor."""

    clock: float
    processor: float


def start_times() -> Times:
    """What a process takes until everything is imported: the median of three."""
    found = []
    for _ in range(3):
        before, begun = os.times(), time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {', '.join(IMPORTS)}"], check=True)
        seconds, after = time.perf_counter() - begun, os.times()
        children = (after.children_user - before.children_user) + (
            after.children_system - before.children_system
        )
        found.append(Times(seconds, children))
    return Times(*(sorted(times)[1] for times in zip(*found, strict=True)))


def shares(plain: Times, spent: Times, kills: int, rounds: int, start: Times) -> dict[str, Any]:
    """A stage's report. spent: by all its processes, in all rounds."""
    found: dict[str, Any] = {"kills": kills}
    for name, alone, all_of_them, once in zip(Times._fields, plain, spent, start, strict=True):
        lost = (all_of_them - rounds * alone) / max(1, kills)
        found[name] = {
            "seconds": round(alone, 1),
            "seconds_lost_a_kill": round(lost, 2),
            "lost_a_kill": round(lost / alone, 3),
            "lost_with_start": round((lost + once) / (alone + once), 3),
        }
    return found


def _processor_seconds(pid: int | None) -> float:
    """Of a process by now; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def new_folder(root: Path, name: str) -> Path:
    (root / name / "tmp").mkdir(parents=True)
    return root / name


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that a round has left, by name; times of day left out."""
    found = [
        p for p in folder.rglob("*") if p.is_file() and {p.suffix, p.name}.isdisjoint(LEFT_OUT)
    ]
    return {str(p.relative_to(folder)): HOUR.sub(b"", p.read_bytes()) for p in found}


@click.command(cls=ErrorReportingCommand)
@click.option("--kills", default=100, show_default=True, help="How many at least.")
@click.option("--num", default=4, show_default=True, help="Images.")
@click.option("--a-stage", default=25, show_default=True, help="Kills of one stage in a round.")
@click.option(
    "--share", default=0.3, show_default=True, help="Latest kill, as a share of a stage's time."
)
@click.option("--full", is_flag=True, help="The configuration's own steps, trajectories, batches.")
@click.option("--steps", default=4, show_default=True, help="Of the sampler.")
@click.option("--trajectories", default=4, show_default=True, help="Of the calibration.")
@click.option("--every", type=float, help="Seconds between partial results; else as always.")
@click.option("--until", type=click.Choice(STAGES), default=STAGES[-1], help="The last stage.")
@click.option("--seed", default=0, show_default=True, help="Of the times.")
def main(
    kills: int,
    num: int,
    a_stage: int,
    share: float,
    full: bool,
    steps: int,
    trajectories: int,
    every: float | None,
    until: str,
    seed: int,
) -> None:
    """Kill the four stages of fashion_ldm_w4a8, and compare."""
    draw, root = random.Random(seed), Path(tempfile.mkdtemp(prefix="qncd-kills-"))
    plain, seconds, start = new_folder(root, "undisturbed"), {}, start_times()
    commands = stages(num, steps, trajectories, full=full)
    commands = {stage: commands[stage] for stage in STAGES[: STAGES.index(until) + 1]}
    for stage, arguments in commands.items():
        _, seconds[stage] = ended(plain, arguments, every, None)
        click.echo(f"undisturbed {stage}: {seconds[stage]}", err=True)
    wanted = files_of(plain)
    count, spent = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, Times(0.0, 0.0))
    rounds = 0
    while sum(count.values()) < kills:
        rounds += 1
        folder = new_folder(root, f"round{rounds}")
        for stage, arguments in commands.items():
            for number in range(a_stage + 1):
                last = number == a_stage
                after = None if last else draw.uniform(0, share * seconds[stage].processor)
                done, taken = ended(folder, arguments, every, after)
                spent[stage] = Times(*map(sum, zip(spent[stage], taken, strict=True)))
                if done:
                    break
                count[stage] += 1
        found = files_of(folder)
        other = sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n))
        if other:
            kills = sum(count.values())
            raise ArtifactError(f"{folder}: differs after {kills} kills: {other}")
        shutil.rmtree(folder)
        click.echo(f"round {rounds}: {sum(count.values())} kills, the same files", err=True)
    report = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": described(),
        "every": every,
        "start": start._asdict(),
        "kills": sum(count.values()),
        "rounds": rounds,
        "same_files": len(wanted),
        "stray_files": 0,  # else a round would not have been the same
        "stages": {
            stage: shares(plain, spent[stage], count[stage], rounds, start)
            for stage, plain in seconds.items()
        },
    }
    shutil.rmtree(root)
    click.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
