"""The study in a browser: twenty trials by keyboard, the download, the tally; and its blindness."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from browsers import check_page, chromium, open_page, screenshot
from conftest import Qncd
from PIL import Image

RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def made(sampled, tmp_path_factory) -> Qncd:
    """A run with a study of 20 trials: 16 that count, 2 of either control. Do not change."""
    work = Qncd(shutil.copytree(sampled, tmp_path_factory.mktemp("study") / "work"))
    work("study", "--trials", "16")
    return work


def page_of(work: Qncd) -> Path:
    return work.folder / RUN / "study.html"


def key_of(work: Qncd) -> dict:
    return json.loads((work.folder / RUN / "study_key.json").read_text())


def picture(page: str) -> Image.Image:
    (uri,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return Image.open(io.BytesIO(base64.b64decode(uri)))


# ---- what the file tells ------------------------------------------------------------------------


def test_the_page_names_nothing(made) -> None:
    key, page = key_of(made), page_of(made).read_text()
    without = re.sub(r'src="data:[^"]+"', "", page)
    for word in ("full", "quantized", "W4A8", "tiny", "null", "catch", "damaged", "seed", "class "):
        inside = re.sub(
            r"<style>.*?</style>|<script>.*?</script>|=== null|return null", "", without, flags=re.S
        )
        assert word not in inside.replace('class="', "").lower(), word
    values = json.loads(re.search(r'id="values">(.*?)</script>', page)[1])
    assert values.keys() == {"study", "count", "columns", "width", "height"}
    assert values["study"] == key["study"] and values["count"] == len(key["trials"]) == 20


def test_all_images_are_one_picture_without_metadata_and_without_a_loss(made) -> None:
    key, page = key_of(made), page_of(made).read_text()
    sheet = picture(page)
    assert sheet.info == {}
    values = json.loads(re.search(r'id="values">(.*?)</script>', page)[1])
    width, height, pixels = values["width"], values["height"], np.array(sheet)
    folders = {name: made.folder / place for name, place in key["variants"].items()}
    checked = 0
    for number, trial in enumerate(key["trials"]):
        y = number // values["columns"] * height
        for side, name in enumerate((trial["left"], trial["right"])):
            x = (number % values["columns"] * 2 + side) * width
            part = pixels[y : y + height, x : x + width]
            if name in folders:
                image = Image.open(folders[name] / f"{trial['seed']:06d}.png").convert("RGB")
                assert (part == np.array(image)).all(), trial
                checked += 1
            else:
                assert trial["kind"] == "catch" and len(np.unique(part[:, :, 0])) <= 36
    assert checked == 38


# ---- raters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    with chromium(downloads) as driver:
        yield driver


def taken(browser, downloads: Path, name: str) -> Path:
    """The file that the page gives at the end."""
    browser.find_element("id", "download").click()
    path = downloads / f"{name}.json"
    for _ in range(100):
        if path.is_file():
            return path
        time.sleep(0.05)
    raise AssertionError(f"{name} was not downloaded: {list(downloads.iterdir())}")


def begin(browser, made: Qncd, name: str) -> None:
    open_page(browser, page_of(made), 390, "light")
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    browser.find_element("id", "rater").send_keys(name)
    browser.find_element("id", "begin").click()


def press(browser, key: str) -> None:
    browser.find_element("tag name", "body").send_keys({"left": "\ue012", "right": "\ue014"}[key])


def seen(browser, made: Qncd) -> tuple[dict, bool]:
    """The trial on the screen by the key, and whether its sides are exchanged."""
    state = json.loads(browser.execute_script("return localStorage.getItem(localStorage.key(0))"))
    number = len(state["answers"])
    return key_of(made)["trials"][state["order"][number]], state["flips"][number]


def test_a_rater_who_always_finds_the_quantized_image(browser, made, downloads) -> None:
    """By keyboard, with a break after seven trials, one answer taken back."""
    begin(browser, made, "hawk eye")
    for number in range(20):
        if number == 7:
            press(browser, "left")
            browser.find_element("tag name", "body").send_keys("\ue003")  # backspace
            browser.refresh()
            assert browser.find_element("id", "where").text == "8 of 20"
        trial, flipped = seen(browser, made)
        wanted = "right" if trial["kind"] == "catch" and trial["left"] == "full" else "left"
        if trial["kind"] == "catch":
            wanted = "left" if trial["left"] == "full" else "right"
        elif trial["kind"] == "pair":
            wanted = "left" if trial["left"] != "full" else "right"
        press(browser, {"left": "right", "right": "left"}[wanted] if flipped else wanted)
    found = json.loads(taken(browser, downloads, "hawk_eye").read_text())
    assert sorted(answer["trial"] for answer in found["answers"]) == list(range(20))
    data = made("study", "--tally", downloads / "hawk_eye.json", "--json").data
    (compared,) = data["comparisons"]
    assert (compared["first"], compared["second"]) == ("full", "tiny")
    assert (compared["hits"], compared["count"]) == (0, 16)
    assert compared["low"] == 0 and compared["high"] == pytest.approx(1 - 0.025 ** (1 / 16))
    assert data["raters"][0]["catch_failures"] == 0


def test_a_rater_who_always_takes_the_left_side_is_named(browser, made, downloads) -> None:
    begin(browser, made, "lefty")
    for _ in range(20):
        press(browser, "left")
    result = made("study", "--tally", taken(browser, downloads, "lefty"))
    assert "lefty always takes the left side, and is not counted" in result.stdout
    data = json.loads((made.folder / RUN / "study.json").read_text())
    assert data["raters"][0]["always"] == "left" and data["comparisons"] == []


def test_the_study_can_be_answered_by_touch_and_read_everywhere(browser, made) -> None:
    check_page(browser, page_of(made))
    begin(browser, made, "")
    left, right = (browser.find_element("id", side) for side in ("left", "right"))
    shot = screenshot(browser, "study_trial")
    assert shot.std() > 5
    left.click()
    right.click()
    assert browser.find_element("id", "where").text == "3 of 20"
    state = json.loads(browser.execute_script("return localStorage.getItem(localStorage.key(0))"))
    assert [answer["side"] for answer in state["answers"]] == ["left", "right"]
    assert re.fullmatch(r"rater-\w+", state["rater"])


def test_what_is_drawn_is_the_trial_that_the_answer_is_about(browser, made) -> None:
    begin(browser, made, "x")
    for _ in range(4):
        trial, flipped = seen(browser, made)
        number = key_of(made)["trials"].index(trial)
        values = json.loads(re.search(r'id="values">(.*?)</script>', page_of(made).read_text())[1])
        pixels = np.array(picture(page_of(made).read_text()))
        for place, side in enumerate(("left", "right")):
            uri = browser.execute_script(
                f"return document.querySelector('#{side} canvas').toDataURL()"
            )
            shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
            scale = shown.width // values["width"]
            x = (number % values["columns"] * 2 + (place ^ flipped)) * values["width"]
            y = number // values["columns"] * values["height"]
            part = pixels[y : y + values["height"], x : x + values["width"]]
            assert (np.array(shown) == part.repeat(scale, 0).repeat(scale, 1)).all()
        press(browser, "right")
