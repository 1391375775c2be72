"""The command study: what it writes, what it refuses, and the tally on the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Qncd

RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def made(sampled, tmp_path_factory) -> Path:
    """A folder with a study. Copy before changing."""
    work = Qncd(shutil.copytree(sampled, tmp_path_factory.mktemp("study") / "work"))
    work("study", "--trials", "10", "--seed", "3")
    return work.folder


@pytest.fixture
def work(made, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(made, tmp_path / "work"))


def key_of(work: Qncd) -> dict:
    return json.loads((work.folder / RUN / "study_key.json").read_text())


def results(work: Qncd, rater: str, wanted: str = "full") -> Path:
    """A file as the page gives it, of a rater who prefers one variant and is not caught."""
    key, answers = key_of(work), []
    for number, trial in enumerate(key["trials"]):
        takes = "full" if trial["kind"] == "catch" else wanted
        side = "left" if trial["left"] == takes else "right"
        answers.append({"trial": number, "side": side, "flipped": False, "seconds": 1.0})
    path = work.folder / f"{rater}.json"
    path.write_text(json.dumps({"study": key["study"], "rater": rater, "answers": answers}))
    return path


def refused(result, code: int) -> str:
    assert result.exit_code == code and not result.stdout
    (line,) = result.stderr.strip().splitlines()
    return line


def test_a_study_is_never_replaced_unasked(work) -> None:
    before = (work.folder / RUN / "study_key.json").read_bytes()
    line = refused(work("study", ok=False), 4)
    assert "is there already, and results of raters belong to it (--force" in line
    assert (work.folder / RUN / "study_key.json").read_bytes() == before
    work("study", "--tally", results(work, "ann"))
    work("study", "--force")
    assert key_of(work)["study"] != json.loads(before)["study"]
    assert not (work.folder / RUN / "study.json").exists(), "a tally of another study"


def test_a_seed_makes_the_same_study_again(work) -> None:
    files = [work.folder / RUN / name for name in ("study.html", "study_key.json")]
    before = [path.read_bytes() for path in files]
    work("study", "--trials", "10", "--seed", "3", "--force")
    assert [path.read_bytes() for path in files] == before


def test_another_run_is_compared_as_well(work) -> None:
    shutil.copytree(work.folder / RUN, work.folder / "runs/other")
    data = work(*("study", "--trials", "9", "--against", "runs/other", "--force", "--json")).data
    assert data["variants"] == ["full", "tiny", "other"] and data["trials"] == 13
    pairs = [{t["left"], t["right"]} for t in key_of(work)["trials"] if t["kind"] == "pair"]
    for pair in ({"full", "tiny"}, {"full", "other"}, {"tiny", "other"}):
        assert pairs.count(pair) == 3
    line = refused(work("study", "--against", "runs/tiny", "--force", ok=False), 3)
    assert "two runs are called tiny" in line


def test_the_tally_is_printed_written_and_in_the_next_report(work) -> None:
    files = [results(work, "ann"), results(work, "bob", "tiny")]
    shown = work("study", "--tally", *files).stdout
    assert "50.0 % [27.2, 72.8]" in shown and "Clopper-Pearson" in shown
    assert "Fleiss' kappa" in shown and "ann" in shown and "0 of 2" in shown
    data = json.loads((work.folder / RUN / "study.json").read_text())
    assert data["comparisons"][0]["hits"] == 10 and data["comparisons"][0]["count"] == 20
    assert data["fleiss_kappa"] < 0
    work("eval")
    report = (work.folder / RUN / "report.html").read_text()
    assert "What human raters say" in report and "50.0 % [27.2, 72.8]" in report
    work("study", "--tally", files[0])
    assert "unchanged" not in work("eval").stdout, "another tally makes another report"
    assert "100.0 % [69.2, 100.0]" in (work.folder / RUN / "report.html").read_text()


@pytest.mark.parametrize("width", ["80"])
def test_the_tally_fits_a_terminal(work, monkeypatch, width) -> None:
    monkeypatch.setenv("COLUMNS", width)
    shown = work("study", "--tally", results(work, "a rater with rather a long name")).stdout
    assert max(map(len, shown.splitlines())) <= int(width)


def changed(path: Path, **values) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"study": "x"}, "results of another study than"),
        ({"answers": 3}, "not the results of a study"),
        ({"answers": [{"trial": 99, "side": "left", "flipped": False}]}, "damaged answer"),
        ({"answers": [{"trial": 0, "side": "up", "flipped": False}]}, "damaged answer"),
        ({"answers": [{"trial": 0, "side": "left", "flipped": False}] * 2}, "answered twice"),
        ({"rater": ""}, "without the rater's name"),
    ],
)
def test_files_that_are_no_results_of_this_study_are_one_line(work, values, said) -> None:
    path = changed(results(work, "ann"), **values)
    line = refused(work("study", "--tally", path, ok=False), 4)
    assert said in line and "ann.json" in line
    assert not (work.folder / RUN / "study.json").exists()


def test_missing_and_damaged_files_and_the_same_rater_twice_are_one_line(work) -> None:
    path = results(work, "ann")
    assert "twice.json: answers of ann" in refused(
        work("study", "--tally", path, shutil.copy(path, work.folder / "twice.json"), ok=False), 4
    )
    assert "none.json: missing" in refused(work("study", "--tally", "none.json", ok=False), 4)
    path.write_text("{")
    assert "ann.json: damaged" in refused(work("study", "--tally", path, ok=False), 4)
    (work.folder / RUN / "study_key.json").write_text("{}")
    assert "study_key.json: damaged" in refused(work("study", "--tally", path, ok=False), 4)
    (work.folder / RUN / "study_key.json").unlink()
    line = refused(work("study", "--tally", path, ok=False), 4)
    assert 'study_key.json: missing (make it with "qncd study")' in line


def test_options_that_contradict_each_other_are_one_line(work) -> None:
    assert "--tally needs the files" in refused(work("study", "--tally", ok=False), 2)
    assert "files are for --tally" in refused(work("study", "a.json", ok=False), 2)
    both = work("study", "--tally", "a.json", "--trials", "3", ok=False)
    assert "--tally goes without --trials" in refused(both, 2)


def test_a_damaged_tally_stops_eval_with_one_line(work) -> None:
    (work.folder / RUN / "study.json").write_text('{"raters": []}')
    line = refused(work("eval", ok=False), 4)
    assert "study.json: damaged" in line and "qncd study --tally" in line
