"""Several processes of one job: what one process makes, and an end where one of them dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Qncd
from processes import At, started

RUN = Path("runs/tiny")
SET = RUN / "samples" / "new"
SAMPLE = ("sample", "--num", "7", "--batch-size", "2", "--name", "new", "--no-compile")


@pytest.fixture
def work(sampled_shallow, tmp_path) -> Qncd:
    """A copy of a run that is quantized."""
    return Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))


def job(folder: Path, count: int, *command: str, kill: At | None = None) -> list[int | None]:
    """Exit codes of so many ranks that do one command; kill: when the last of them is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in about.items()}
        at = kill if rank == count - 1 else None
        processes.append(
            started(
                *(folder, *command),
                at=at,
                environment={**environment, "MASTER_ADDR": "127.0.0.1"},
                streams=f"rank{rank}.",
            )
        )
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def files_of(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def whole(work) -> dict[str, bytes]:
    """The files of the set as one process draws it, which is there no more."""
    work(*SAMPLE)
    files = files_of(work.folder / SET)
    shutil.rmtree(work.folder / SET)
    return files


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_draw_what_one_process_draws(work, whole, count):
    assert job(work.folder, count, *SAMPLE, "--json") == [0] * count
    assert files_of(work.folder / SET) == whole
    said = [(work.folder / f"rank{rank}.stdout.txt").read_text() for rank in range(count)]
    assert json.loads(said[0])["images"] == 7
    assert said[1:] == [""] * (count - 1)
    assert job(work.folder, count, *SAMPLE, "--json") == [0] * count
    assert json.loads((work.folder / "rank0.stdout.txt").read_text())["skipped"]


def test_a_killed_rank_ends_the_job_with_a_line_and_the_same_command_goes_on(work, whole):
    codes = job(work.folder, 2, *SAMPLE, kill=At(call=3))
    assert codes == [6, -signal.SIGKILL]
    line = (work.folder / "rank0.stderr.txt").read_text().splitlines()[-1]
    assert line.startswith("rank 0: Error: rank 0 of 2: another rank of the job has ended")
    assert "goes on" in line
    assert list((work.folder / SET / ".parts").glob("*.safetensors"))
    assert not (work.folder / RUN / ".lock").exists()
    assert job(work.folder, 2, *SAMPLE) == [0, 0]
    assert files_of(work.folder / SET) == whole


def test_an_error_of_the_first_rank_ends_all_and_is_said_once(work):
    (work.folder / RUN / "quantized.safetensors").write_bytes(b"")
    assert job(work.folder, 2, *SAMPLE) == [4, 4]
    texts = [(work.folder / f"rank{rank}.stderr.txt").read_text() for rank in range(2)]
    assert texts[0].startswith("rank 0: Error: ")
    assert texts[1] == ""


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_calibrate_what_one_process_calibrates(work, count):
    names = ("calibration.safetensors", "smoothing.safetensors")
    before = {name: (work.folder / RUN / name).read_bytes() for name in names}
    for name in names:
        (work.folder / RUN / name).unlink()
    assert job(work.folder, count, "calibrate", "--config", "tiny.yaml") == [0] * count
    assert {name: (work.folder / RUN / name).read_bytes() for name in names} == before
    assert not (work.folder / RUN / "partial").exists()


def test_a_calibration_whose_rank_was_killed_goes_on_to_the_same_bytes(work):
    path = work.folder / RUN / "calibration.safetensors"
    before = path.read_bytes()
    path.unlink()
    command = ("calibrate", "--config", "tiny.yaml")
    assert job(work.folder, 2, *command, kill=At(call=3)) == [6, -signal.SIGKILL]
    assert (work.folder / RUN / "partial" / "calibrate.1-of-2").is_dir()
    assert job(work.folder, 2, *command) == [0, 0]
    assert path.read_bytes() == before
    assert not (work.folder / RUN / "partial").exists()


QUANTIZED = ("quantized.safetensors", "noise_stats.safetensors", "coverage.json")
DEPENDENT = (
    *("--set", "quantization.weights.passes=2", "--set", "quantization.weights.asymmetry=0.5"),
    *("--set", "quantization.weights.budget=4.5", "--set", "quantization.bias_correction=true"),
    *("--set", "quantization.activations.observer=output"),
    *("--set", "quantization.sensitive.activation_bits=0.5"),
)
"""Settings with which layers depend on each other, or on what all of them have been asked."""


@pytest.mark.parametrize(
    ("count", "settings"), [(2, ()), (3, ()), (2, DEPENDENT)], ids=["2", "3", "2, dependent"]
)
def test_ranks_quantize_what_one_process_quantizes(work, count, settings):
    work("quantize", "--force", *settings)
    before = {name: (work.folder / RUN / name).read_bytes() for name in QUANTIZED}
    for name in QUANTIZED:
        (work.folder / RUN / name).unlink()
    assert job(work.folder, count, "quantize", *settings) == [0] * count
    assert {name: (work.folder / RUN / name).read_bytes() for name in QUANTIZED} == before
    assert not (work.folder / RUN / "partial").exists()


def test_a_quantization_whose_rank_was_killed_goes_on_to_the_same_bytes(work):
    before = {name: (work.folder / RUN / name).read_bytes() for name in QUANTIZED}
    (work.folder / RUN / "quantized.safetensors").unlink()
    assert job(work.folder, 2, "quantize", kill=At(write=4)) == [6, -signal.SIGKILL]
    line = (work.folder / "rank0.stderr.txt").read_text().splitlines()[-1]
    assert "another rank of the job has ended" in line and "goes on" in line
    assert list((work.folder / RUN / "partial" / "quantize.1-of-2").glob("*.safetensors"))
    assert job(work.folder, 2, "quantize") == [0, 0]
    assert {name: (work.folder / RUN / name).read_bytes() for name in QUANTIZED} == before
    assert not (work.folder / RUN / "partial").exists()


def test_ranks_measure_what_one_process_measures(work):
    metrics = work.folder / RUN / "metrics.json"
    work("eval")
    alone = json.loads(metrics.read_text())
    metrics.unlink()
    shutil.rmtree(work.folder / "runs" / "full-precision")
    assert job(work.folder, 2, "eval") == [0, 0]
    assert json.loads(metrics.read_text()) == alone


@pytest.mark.slow
def test_torchrun_ends_within_a_minute_of_a_rank_that_was_killed_and_goes_on(work):
    """As docs/batch.md says that it is called."""
    sample = ("sample", "--num", "60", "--batch-size", "2", "--name", "new", "--no-compile")
    work(*sample)
    whole = files_of(work.folder / SET)
    shutil.rmtree(work.folder / SET)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "--no-python", "--", sys.executable, "-m", "qncd_cli", *sample]
    about = {"cwd": work.folder, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    with subprocess.Popen(command, **about, stderr=subprocess.PIPE) as process:
        while not list((work.folder / SET).glob("*.png")):
            assert process.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        killed = time.monotonic()
        said = process.communicate()[1]
    assert time.monotonic() - killed < 60
    assert process.returncode == 1
    assert re.search(r"exitcode\s*: -9", said)
    assert "finished batches are kept, the same command goes on" in said
    subprocess.run(command, **about, check=True, capture_output=True)
    assert files_of(work.folder / SET) == whole
