"""The report of a run, in a browser: on a desk and on a phone, in the light and in the dark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from browsers import check_page, chromium, open_page
from conftest import Qncd

RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def report(sampled, tmp_path_factory) -> Path:
    """report.html of a run that was evaluated under two names, benched, and shown to raters."""
    work = Qncd(shutil.copytree(sampled, tmp_path_factory.mktemp("report") / "work"))
    work("sample", "--num", "6", "--batch-size", "4", "--inter", "none", "--name", "plain")
    work("eval", "--name", "plain")
    work("study", "--trials", "4", "--seed", "0")
    key = json.loads((work.folder / RUN / "study_key.json").read_text())
    answers = [
        {
            "trial": number,
            "side": "left" if trial["left"] == "full" or trial["kind"] == "null" else "right",
            "flipped": False,
        }
        for number, trial in enumerate(key["trials"])
    ]
    for rater in ("ann", "bob"):
        found = {"study": key["study"], "rater": rater, "answers": answers}
        (work.folder / f"{rater}.json").write_text(json.dumps(found))
    work("study", "--tally", "ann.json", "bob.json")
    work("eval")
    return work.folder / RUN / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("downloads")) as driver:
        yield driver


def test_the_report_can_be_read_everywhere(browser, report) -> None:
    check_page(browser, report)


def test_the_report_holds_all_that_the_run_knows(report) -> None:
    html = report.read_text()
    for heading in (
        "The same seeds in full precision and quantized",
        "The error of single images",
        "SQNR of the prediction",
        "Mean of the quantization noise",
        "Spread of the quantization noise",
        "Over the network",
        "The layers that hurt most",
        "Channels before and after smoothing",
        "What human raters say",
        "What was measured",
    ):
        assert f">{heading}</h" in html, heading
    assert "plain, correction none" in html and "quantized, correction ptqd" in html
    assert "qncd sample --num 6 --batch-size 4 --run-dir runs/tiny" in html


def test_a_pair_is_looked_at_with_the_slider(browser, report) -> None:
    open_page(browser, report, 390, "light")
    find = browser.find_element
    pairs = browser.find_elements("css selector", "button.pair")
    said = [pair.get_attribute("data-said") for pair in pairs]
    shown = find("css selector", "#viewer .said")
    assert shown.text == said[0] and len(said) == 6
    browser.execute_script("arguments[0].click()", pairs[3])
    assert shown.text == said[3]
    for part, place in (("full", 0), ("quantized", 1), ("gap", 2)):
        image = find("css selector", f"#viewer img.{part}")
        source = pairs[3].find_elements("css selector", "img")[place].get_attribute("src")
        assert image.get_attribute("src") == source
    stage = find("css selector", ".stage")
    assert stage.get_attribute("style") == "--cut: 50%;"
    slider = find("css selector", ".slide")
    for _ in range(10):
        slider.send_keys("\ue014")  # the right arrow
    assert stage.get_attribute("style") == "--cut: 60%;"
    for _ in range(4):
        find("css selector", ".after").click()
    assert shown.text == said[1], "after the last the first"
