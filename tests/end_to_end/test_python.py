"""The stages in Python: five names, the same work and the same words as on the command line."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Qncd, tiny_config

import qncd_cli
from qncd_cli.errors import QncdError


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    """A run directory after the four stages, called in Python. Do not change."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(tiny_model)))
    config = qncd_cli.load_config(folder / "tiny.yaml", ["sampling.seed=3"])
    run = folder / "run"
    calibrated = qncd_cli.calibrate(config, run)
    assert (calibrated.run.path, calibrated.skipped) == (run, False)
    assert calibrated.rows > 0 and calibrated.layers > 0
    assert qncd_cli.quantize(run).coverage["mean_weight_bits"] > 4
    sampled = qncd_cli.sample(run, num=2)
    assert list(sampled.seeds) == [3, 4]
    assert sampled.contact_sheet.is_file() and (sampled.folder / "000003.png").is_file()
    evaluated = qncd_cli.evaluate(run)
    assert evaluated.metrics["fidelity"]["psnr_db"] > 0
    assert evaluated.report.is_file()
    return run


def test_the_command_line_finds_what_python_made_and_the_other_way_round(run):
    qncd = Qncd(run.parent)
    for command in ("quantize", "sample", "eval"):
        more = ("--num", "2") if command == "sample" else ()
        assert "unchanged, skipped" in qncd(command, "--run-dir", run, *more).stdout
    assert qncd_cli.calibrate(run / "config.yaml", run).skipped
    assert qncd_cli.quantize(run).skipped
    assert qncd_cli.sample(run, num=2).skipped
    assert qncd_cli.evaluate(run).skipped


@pytest.mark.parametrize(
    ("stage", "command", "code"),
    [
        (
            lambda run: qncd_cli.load_config("fashon_ldm"),
            ("calibrate", "--config", "fashon_ldm"),
            3,
        ),
        (lambda run: qncd_cli.quantize("no"), ("quantize", "--run-dir", "no"), 4),
        (lambda run: qncd_cli.sample("no"), ("sample", "--run-dir", "no"), 4),
        (
            lambda run: qncd_cli.evaluate(run, name="no"),
            ("eval", "--run-dir", "RUN", "--name", "no"),
            4,
        ),
        (
            lambda run: qncd_cli.evaluate(run, reference="no"),
            ("eval", "--run-dir", "RUN", "--reference", "no"),
            4,
        ),
    ],
)
def test_errors_have_the_text_of_the_command_line(run, stage, command, code):
    with pytest.raises(QncdError) as caught:
        stage(run)
    said = Qncd(run.parent)(*(str(run) if c == "RUN" else c for c in command), ok=False)
    assert said.stderr.splitlines()[-1] == f"Error: {caught.value}"
    assert said.exit_code == caught.value.exit_code == code


def test_sampling_takes_another_sampler_but_no_other_bits(run):
    own = run / "config.yaml"
    other = qncd_cli.load_config(own, ["quantization.weights.bits=8"])
    with pytest.raises(QncdError, match="were settled by earlier stages"):
        qncd_cli.sample(run, other)
    changes = ["sampling.scheduler=euler", "correction.inter.method=none"]
    euler = qncd_cli.load_config(own, changes)
    assert not qncd_cli.sample(run, euler, num=2, name="euler").skipped


def test_no_signature_says_any():
    for name in qncd_cli.__all__:
        signature = inspect.signature(getattr(qncd_cli, name))
        kinds = [p.annotation for p in signature.parameters.values()]
        for kind in (*kinds, signature.return_annotation):
            assert kind is not inspect.Parameter.empty, name
            assert "Any" not in str(kind), name
        assert inspect.getdoc(getattr(qncd_cli, name)), name


def test_the_package_is_imported_without_what_its_names_need():
    code = (
        "import sys, time\nbefore = time.process_time()\nimport qncd_cli\n"
        "print(time.process_time() - before)\n"
        "print([m for m in ('torch', 'pydantic', 'yaml', 'click') if m in sys.modules])\n"
        "print([name for name in qncd_cli.__all__ if name not in dir(qncd_cli)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules, missing = done.stdout.splitlines()
    assert float(seconds) < 0.05
    assert (modules, missing) == ("[]", "[]")
    with pytest.raises(AttributeError, match="no attribute 'qantize'"):
        qncd_cli.qantize  # noqa: B018


def test_type_checkers_see_the_names():
    package = Path(qncd_cli.__file__)
    (block,) = (node for node in ast.parse(package.read_text()).body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == set(qncd_cli.__all__)
    assert package.with_name("py.typed").is_file()
