"""The examples of docs/batch.md, run as far as a machine without their schedulers can."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Qncd

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "batch.md").read_text(encoding="utf-8")


def example(language: str, beginning: str) -> str:
    """The block of code on the page that begins so."""
    (found,) = re.findall(rf"^```{language}\n({re.escape(beginning)}.*?)^```$", PAGE, re.M | re.S)
    return found


def copied(source: Path, target: Path) -> None:
    """What the actions for artifacts do: hidden files stay behind."""
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


class Actions:
    """A workflow of GitHub's, each job in a folder of its own; artifacts are what they share."""

    def __init__(self, folder: Path, workflow: dict, environment: dict[str, str]):
        self.folder, self.workflow = folder, workflow
        self.environment = {**{k: str(v) for k, v in workflow["env"].items()}, **environment}
        self.said: list[str] = []

    def run(self, name: str, inputs: dict[str, Path], values: dict[str, int]) -> None:
        """One job. inputs: files that are there beforehand; values: of its matrix."""
        work = self.folder / "-".join([name, *map(str, values.values())])
        work.mkdir()
        for target, source in inputs.items():
            copied(source, work / target)
        for step in self.workflow["jobs"][name]["steps"]:
            text = json.dumps(step)
            for key, value in values.items():
                text = text.replace(f"${{{{ matrix.{key} }}}}", str(value))
            assert "${{" not in text
            self._step(json.loads(text), work)

    def _step(self, step: dict, work: Path) -> None:
        store, options = self.folder / "artifacts", step.get("with", {})
        if "run" in step:
            line = string.Template(step["run"]).substitute(self.environment)
            program, *arguments = shlex.split(line)
            assert program == "qncd"
            self.said.append(Qncd(work)(*arguments).stdout)
        elif "upload" in step["uses"]:
            copied(work / options["path"], store / options["name"])
        else:
            names = store.glob(options.get("pattern", options.get("name")))
            for artifact in sorted(names):
                copied(artifact, work / options["path"])


def test_the_workflow_of_github_actions(sampled_shallow, tmp_path, monkeypatch):
    workflow = yaml.safe_load(example("yaml", "name: quantize"))
    monkeypatch.setenv("QNCD_RUN_DIR", workflow["env"]["QNCD_RUN_DIR"])
    config = yaml.safe_load((sampled_shallow / "tiny.yaml").read_text())
    files = tmp_path / "checkout"
    files.mkdir()
    (files / "tiny.yaml").write_text(yaml.safe_dump(config))
    actions = Actions(tmp_path, workflow, {"CONFIG": "tiny.yaml", "NUM": "110"})
    actions.run("quantize", {".": files}, {})
    for shard in workflow["jobs"]["sample"]["strategy"]["matrix"]["shard"]:
        actions.run("sample", {}, {"shard": shard})
    actions.run("measure", {}, {})
    merged, measured = (json.loads(text) for text in actions.said[-2:])
    assert merged["images"] == 110 and not merged["skipped"]
    assert measured["protocol"]["num_samples"] == 110


@pytest.mark.slow
def test_the_stages_under_torchrun(sampled_shallow, tmp_path):
    """All four, by two processes each: the artifacts are those of one process."""
    work = Path(shutil.copytree(sampled_shallow, tmp_path / "work"))
    names = ("calibration", "smoothing", "quantized", "noise_stats")
    files = [work / "runs" / "tiny" / f"{name}.safetensors" for name in names]
    alone = [path.read_bytes() for path in files]
    shutil.rmtree(work / "runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = example("sh", "torchrun").splitlines()
    stages = [line.partition("-- qncd ")[2].split()[0] for line in lines]
    assert stages == ["calibrate", "quantize", "sample", "eval"]
    here = {"fashion_ldm_w4a8": "tiny.yaml", "10000": "10", " --fid": ""}
    for line in lines:
        for name, value in here.items():
            line = line.replace(name, value)
        launch, command = line.split(" --no-python -- qncd ")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [*launch.split()[1:], "--no-python", "--", sys.executable, "-m", "qncd_cli"]
        subprocess.run([*words, *command.split()], cwd=work, env=environment, check=True)
    assert [path.read_bytes() for path in files] == alone
    assert (
        json.loads((work / "runs/tiny/metrics.json").read_text())["protocol"]["num_samples"] == 10
    )
    assert not (work / "runs/tiny/partial").exists()


@pytest.mark.slow
def test_the_array_of_slurm(sampled_shallow, tmp_path):
    work = Path(shutil.copytree(sampled_shallow, tmp_path / "work"))
    (work / "sample.sh").write_text(example("sh", "#!/bin/bash"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "qncd").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qncd_cli "$@"\n')
    (programs / "qncd").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "QNCD_RUN_DIR": "runs/tiny",
        "NUM": "60",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }
    jobs = [
        subprocess.Popen(
            ["bash", "sample.sh"], cwd=work, env={**environment, "SLURM_ARRAY_TASK_ID": task}
        )
        for task in ("1", "2")
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    wrapped = re.search(r'--wrap "(qncd merge [^"]*)"', PAGE)[1]
    wrapped = wrapped.replace("runs/fashion_ldm_w4a8", "runs/tiny")
    subprocess.run(wrapped, shell=True, cwd=work, env=environment, check=True)
    assert (work / "runs/tiny/samples/quantized_webdataset/0000.tar").is_file()
    manifest = json.loads((work / "runs/tiny/samples/quantized/manifest.json").read_text())
    assert manifest["seeds"] == list(range(60))
