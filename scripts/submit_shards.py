#!/usr/bin/env python
"""Draw a sample set as shards on an engine that is there already, and merge them.

    python scripts/submit_shards.py --engine dask --address HOST:8786 --shards 16 -- --num 50000
    python scripts/submit_shards.py --engine ray --address auto --shards 16 -- --num 50000
    python scripts/submit_shards.py --engine local --shards 2 -- --num 1000

Starting, placing and retrying are the engine's. Its workers see the run directory under the same
path and have qncd installed; dask needs the package `distributed`, ray the package `ray`. Finished
shards are skipped when the command is repeated.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import click

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.errors import BackendUnavailable

Done = tuple[str, int, str]
"""A shard, the exit code of its process, and the last line that it said on stderr."""


def draw(folder: str, arguments: Sequence[str], shard: str) -> Done:
    """One shard, in a process of its own on whatever machine this runs."""
    command = [sys.executable, "-m", "qncd_cli", "sample", *arguments, "--shard", shard, "--quiet"]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    said = done.stderr.strip().splitlines()
    return shard, done.returncode, said[-1] if said else ""


@contextmanager
def engine(name: str, address: str | None, count: int) -> Iterator[Callable[..., Iterator[Done]]]:
    """What runs a function for each of several arguments and yields results as they come.

    Raises BackendUnavailable where the engine's package is missing.
    """
    if name == "ray":
        ray = _imported("ray")
        ray.init(address=address)
        remote = ray.remote(draw)

        def on_ray(folder: str, arguments: Sequence[str], shards: list[str]) -> Iterator[Done]:
            waiting = [remote.remote(folder, arguments, shard) for shard in shards]
            while waiting:
                ready, waiting = ray.wait(waiting)
                yield from ray.get(ready)

        yield on_ray
        ray.shutdown()
        return
    if name == "dask":
        client = _imported("distributed").Client(address)
        with client:
            yield _on(client.get_executor(pure=False))
        return
    with ThreadPoolExecutor(count) as local:  # of threads that wait for processes
        yield _on(local)


def _on(executor: Executor) -> Callable[..., Iterator[Done]]:
    def run(folder: str, arguments: Sequence[str], shards: list[str]) -> Iterator[Done]:
        futures = [executor.submit(draw, folder, arguments, shard) for shard in shards]
        for future in as_completed(futures):
            yield future.result()

    return run


def _imported(package: str):
    try:
        return __import__(package)
    except ImportError as error:
        raise BackendUnavailable(f"{package} is not installed", f"pip install {package}") from error


@click.command(cls=ErrorReportingCommand)
@click.option("--engine", "on", type=click.Choice(["local", "dask", "ray"]), required=True)
@click.option("--address", help="Of the scheduler; without one, dask and ray begin their own here.")
@click.option("--shards", type=click.IntRange(1), required=True, metavar="N")
@click.option("--run-dir", envvar="QNCD_RUN_DIR", metavar="DIR", help="As of qncd sample.")
@click.option("--name", default="quantized", show_default=True, help="Name of the sample set.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS OF SAMPLE]")
def main(
    on: str,
    address: str | None,
    shards: int,
    run_dir: str | None,
    name: str,
    arguments: tuple[str, ...],
) -> int:
    """Draw N shards on an engine, then merge them; the exit code is the first failed shard's."""
    where = ["--name", name, *(["--run-dir", run_dir] if run_dir else [])]
    labels = [f"{index}/{shards}" for index in range(1, shards + 1)]
    failed = 0
    with engine(on, address, shards) as run:
        for done, (shard, code, said) in enumerate(run(os.getcwd(), [*where, *arguments], labels)):
            how = f"exit code {code}: {said}" if code else "drawn"
            click.echo(f"{done + 1} of {shards}: shard {shard}, {how}", err=True)
            failed = failed or code
    if failed:
        return failed
    return subprocess.run([sys.executable, "-m", "qncd_cli", "merge", *where]).returncode


if __name__ == "__main__":
    main()
