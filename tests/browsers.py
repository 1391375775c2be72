"""Pages in headless Chromium, through selenium; tests that need it are skipped where it is not.

QNCD_SCREENSHOTS=DIR keeps the screenshots that tests take, to be looked at.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WIDTHS = (1280, 390)
MODES = ("light", "dark")
READABLE = 4.5
"""Contrast of text with what is behind it, at least: WCAG 2.2, 1.4.3."""

OVERLAPS = """
const shown = [];
for (const e of document.querySelectorAll(
  "h1,h2,h3,p,th,td,li,figcaption,summary,dt,dd,pre,text,button,span")) {
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
  const closed = e.closest("details:not([open])");
  if (closed && e !== closed.querySelector("summary")) continue;
  for (const n of e.childNodes) {
    if (n.nodeType !== 3 || !n.textContent.trim()) continue;
    const range = document.createRange();
    range.selectNodeContents(n);
    for (const r of range.getClientRects()) if (r.width > 1) shown.push([r, n.textContent.trim()]);
  }
}
const found = [];
for (let i = 0; i < shown.length; i++) for (let j = i + 1; j < shown.length; j++) {
  const [a, one] = shown[i], [b, other] = shown[j];
  const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (x > 1.5 && y > 0.25 * Math.min(a.height, b.height)) found.push(one + " | " + other);
}
return [shown.length, found];
"""
"""How many pieces of text are shown, and which of them lie on each other."""

CONTRASTS = """
const numbers = (c) => {
  const n = c.match(/[\\d.]+/g).map(Number);
  return c.startsWith("color(") ? [...n.slice(0, 3).map((v) => 255 * v), ...n.slice(3)] : n;
};
const light = (c) => {
  const line = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const l = c.slice(0, 3).map((v) => line(v / 255));
  return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2];
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const found = {};
for (const e of document.querySelectorAll(
  "h1,h2,h3,p,th,td,li,figcaption,summary,dt,dd,pre,text,button")) {
  if (!e.textContent.trim() || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  const ink = light(numbers(e.tagName === "text" ? style.fill : style.color));
  const paper = light(behind(e));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  const kind = e.tagName + "." + e.getAttribute("class");
  found[kind] = Math.min(found[kind] || 99, ratio);
}
return found;
"""
"""The least contrast of every kind of text."""


@contextmanager
def chromium(downloads: Path) -> Iterator[Any]:
    """A driver of headless Chromium; downloads: where it puts files. Skips the test without one."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: extra dev")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    service = shutil.which("chromedriver")
    if browser is None or service is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        driver = webdriver.Chrome(service=Service(service), options=options)
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start here: {error.msg}")
    try:
        where = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, page: Path, width: int, mode: str) -> None:
    """Open a file as on a screen of that width, in the light or the dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": mode}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get(page.as_uri())


def screenshot(driver: Any, name: str) -> np.ndarray:
    """The whole page as pixels [H, W, 3]."""
    root = "document.documentElement"
    width, height = driver.execute_script(f"return [{root}.clientWidth, {root}.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    wanted = {"captureBeyondViewport": True, "clip": clip}
    found = driver.execute_cdp_cmd("Page.captureScreenshot", wanted)
    data = base64.b64decode(found["data"])
    if kept := os.environ.get("QNCD_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        (Path(kept) / f"{name}.png").write_bytes(data)
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def requests(driver: Any) -> list[str]:
    """Addresses that the page asked for since the last call, those of files and data left out."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def check_page(driver: Any, page: Path) -> None:
    """At both widths, in the light and the dark: nothing overlaps, nothing is cut off or has to be
    scrolled sideways, all text can be read, no script fails, nothing is fetched."""
    for width in WIDTHS:
        for mode in MODES:
            open_page(driver, page, width, mode)
            pixels = screenshot(driver, f"{page.stem}_{width}_{mode}")
            assert pixels.shape[1] == width and pixels.std() > 5
            assert (pixels[-1, 0].mean() < 60) == (mode == "dark")
            root = "document.documentElement"
            assert driver.execute_script(f"return {root}.scrollWidth") <= width, (width, mode)
            count, overlapping = driver.execute_script(OVERLAPS)
            assert count > 2 and not overlapping, (width, mode)
            contrasts = driver.execute_script(CONTRASTS)
            assert {k: v for k, v in contrasts.items() if v < READABLE} == {}, (width, mode)
    assert driver.get_log("browser") == []
    assert requests(driver) == []
