"""Killed at any point, a stage goes on from there, and its artifacts are the same bytes."""

from __future__ import annotations

import itertools
import re
import signal
from pathlib import Path

import pytest
from conftest import Qncd, tiny_config
from processes import At, code_of, stderr_of

RUN = Path("runs/tiny")
CALIBRATE = ("calibrate", "--config", "tiny.yaml")
KILLED = -9
CONFIGS = {
    "gptq": {},
    "auto, output, brecq": {
        "sampling__steps": 2,
        "correction__intra": "auto",
        "quantization__activations__observer": "output",
        "quantization__activations__timestep_groups": 2,
        "quantization__bias_correction": True,
        "quantization__sensitive": {"weight_bits": 0.5, "activation_bits": 0.5},
        "quantization__weights": {"bits": 4, "rounding": "brecq", "iterations": 3},
    },
    "budget": {
        "sampling__steps": 2,
        "correction__intra": "none",
        "quantization__weights": {"bits": 4, "rounding": "nearest", "budget": 4.5},
    },
}
WRITES = {CALIBRATE: (3, 11), ("quantize",): (4, 15, 60)}


@pytest.fixture(
    scope="module",
    params=["gptq", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n != "gptq")],
)
def undisturbed(request, tmp_path_factory, tiny_model) -> Path:
    """A folder in which calibrate and quantize have run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runner = Qncd(folder)
    runner.write_config(tiny_config(tiny_model, **CONFIGS[request.param]))
    runner(*CALIBRATE)
    runner("quantize")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of the run by its name but status.json, in which a process speaks of itself."""
    found = [p for p in (folder / RUN).rglob("*") if p.is_file() and p.name != "status.json"]
    return {str(path.relative_to(folder / RUN)): path.read_bytes() for path in found}


def test_stages_killed_again_and_again_write_what_an_undisturbed_run_writes(undisturbed, tmp_path):
    (tmp_path / "tiny.yaml").write_text((undisturbed / "tiny.yaml").read_text())
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    own, kills = {"environment": {"TMPDIR": str(temporary)}}, 0
    for stage, writes in WRITES.items():
        for write, before in zip(writes, itertools.cycle([True, False]), strict=False):
            if code_of(tmp_path, *stage, at=At(write=write, before=before), **own) != KILLED:
                break
            kills += 1
        assert code_of(tmp_path, *stage, **own) == 0, stderr_of(tmp_path)
    assert kills >= 4
    assert {path.name for path in temporary.iterdir()} <= {".ses"}  # onnxruntime's, once imported
    assert files_of(tmp_path) == files_of(undisturbed)


@pytest.mark.parametrize(
    ("stage", "call", "number"),
    [
        (CALIBRATE, 13, signal.SIGTERM),  # trajectories
        (("quantize",), 10, signal.SIGHUP),  # noise statistics
    ],
    ids=["calibrate", "quantize"],
)
def test_a_stage_that_is_asked_to_stop_ends_its_call_keeps_all_and_goes_on(
    qncd, tmp_path, stage, call, number
):
    if stage != CALIBRATE:
        qncd(*CALIBRATE)
    assert code_of(tmp_path, *stage, at=At(call=call, kill=number)) == 128 + number
    (line,) = (line for line in stderr_of(tmp_path) if line.startswith("Interrupted"))
    beginning = f"Interrupted by {number.name}: (calibrate is kept, )?what {stage[0]} has done is"
    assert re.match(f"{beginning} kept, the same command goes on from there", line)
    left = [path.name for path in (tmp_path / RUN / "partial" / stage[0]).iterdir()]
    assert left
    assert all(name.endswith(".safetensors") for name in left)
    fewer_calls = At(call=call, kill=signal.SIGUSR1)  # which ends a process that makes so many
    assert code_of(tmp_path, *stage, at=fewer_calls) == 0
    assert not (tmp_path / RUN / "partial").exists()


def test_work_of_another_configuration_is_not_gone_on_with_and_says_why(qncd, tmp_path):
    assert code_of(tmp_path, *CALIBRATE, at=At(call=7, kill=signal.SIGTERM)) == 143
    change = ("--set", "calibration.trajectories=3")
    assert code_of(tmp_path, *CALIBRATE, *change) == 0
    because = "begun again (configuration.calibration.trajectories: 6 -> 3)"
    assert any(line.endswith(because) for line in stderr_of(tmp_path))
