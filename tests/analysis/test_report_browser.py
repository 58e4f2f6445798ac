"""The report in a real headless Chromium: console, images, scrolling, dark mode, print. ``make
test-browser`` installs it.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated import Run, recorded, simulate

from relexkit.analysis.page import Subject, build_page
from relexkit.assess.observed import Observed

DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)

pytestmark = pytest.mark.skipif(
    DRIVER is None, reason="no chromedriver; make test-browser installs it"
)


class Browser:
    """A WebDriver session with Chromium, over its HTTP protocol."""

    def __init__(self, port: int, profile: Path):
        self._url = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        found = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{found['sessionId']}"

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, width: int, height: int = 900, **media: str) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": name.replace("_", "-"), "value": value} for name, value in media.items()
        ]
        self.devtools("Emulation.setEmulatedMedia", {"features": features})
        self._send("POST", "/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, params: dict[str, Any]) -> Any:
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def log(self) -> list[dict[str, Any]]:
        return self._send("POST", "/se/log", {"type": "browser"})

    def close(self) -> None:
        self._send("DELETE", "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None
    process = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        session = Browser(port, tmp_path_factory.mktemp("profile"))
        yield session
        session.close()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gram = recorded(simulate(Run(drift=0.3, beta=0.9), 24, 0), np.arange(1, 25))
    metrics = {
        "reward": np.linspace(0.1, 0.8, 24),
        "frac_reward_zero_std": np.r_[np.ones(4), np.full(20, 0.3)],
    }
    name = "a-run-with-a-rather-long-name-that-must-not-scroll-sideways-on-a-telephone.zarr"
    path = tmp_path_factory.mktemp("report") / "report.html"
    subject = Subject(name, name, facts=[("base", "an/organisation-and-a-model-with-a-long-name")])
    path.write_text(build_page(subject, Observed(gram, metrics)))
    return path


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_errors_no_missing_images_no_sideways_scrolling(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.log()  # what earlier pages left
    browser.open(page, width, prefers_color_scheme=scheme)
    assert [entry for entry in browser.log() if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return document.querySelectorAll('.drawing svg').length") >= 14
    wide = """return [...document.querySelectorAll('body *:not(svg *)')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
    assert browser.run(wide) == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_what_matters_is_on_the_first_screen(
    browser: Browser, page: Path, width: int, height: int
) -> None:
    browser.open(page, width, height)
    script = """return ['.lead', '.next code', '#reward svg', '#null svg', '#skill svg', '#forecast svg'].map(s =>
        Math.max(...[...document.querySelectorAll(s)].filter(e => e.getBoundingClientRect().height).slice(0, 1)
            .map(e => e.getBoundingClientRect().bottom)))"""
    bottoms = browser.run(script)
    assert len(bottoms) == 6
    assert all(0 < bottom <= height for bottom in bottoms), bottoms


def test_texts_of_the_drawings_are_inside_them(browser: Browser, page: Path) -> None:
    script = """return [...document.querySelectorAll('.drawing svg')].flatMap(svg => {
        const b = svg.getBoundingClientRect();
        return !b.width ? [] : [...svg.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
            return r.left < b.left - 3 || r.right > b.right + 3 || r.top < b.top - 3 || r.bottom > b.bottom + 3; })
            .map(t => svg.closest('figure').id + ': ' + t.textContent); })"""
    for width in (1280, 390):
        browser.open(page, width)
        assert browser.run(script) == []


def test_values_series_and_words_answer(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    hover = """const svg = document.querySelector('#reward .large svg'), b = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX: b.right - 8, clientY: b.top + 40}));
        return document.getElementById('tip').textContent"""
    assert browser.run(hover) == "optimizer step 24\nreward: 0.8"
    press = """const button = document.querySelector('#skill .series'); button.click();
        return [button.getAttribute('aria-pressed'), document.querySelectorAll('#skill [hidden]').length]"""
    assert browser.run(press) == ["false", 2]  # in the large drawing and in the small one
    focus = """const term = document.querySelector('.term'); term.focus();
        return document.getElementById('tip').textContent === term.dataset.meaning"""
    assert browser.run(focus)
    scheme = """document.getElementById('scheme').click(); return getComputedStyle(document.body).backgroundColor"""
    first = browser.run(scheme)
    assert first != browser.run(scheme)


def test_dark_is_dark_and_light_is_light(browser: Browser, page: Path) -> None:
    ground = {}
    for scheme in ("light", "dark"):
        browser.open(page, 800, prefers_color_scheme=scheme)
        ground[scheme] = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert ground["light"] == "rgb(255, 255, 255)"
    assert max(int(v) for v in ground["dark"][4:-1].split(",")) < 50


def test_text_stands_out_in_both_schemes(browser: Browser, page: Path) -> None:
    """Contrast of every text with the ground at least 4.5 (WCAG 2, AA)."""
    script = """
        const part = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); };
        const rgb = c => c.match(/[0-9.]+/g).map(Number);
        const light = c => 0.2126 * part(rgb(c)[0]) + 0.7152 * part(rgb(c)[1]) + 0.0722 * part(rgb(c)[2]);
        const ground = light(getComputedStyle(document.body).backgroundColor);
        return [...document.querySelectorAll('h1,h2,h3,p,li,dt,dd,th,td,figcaption,.verdict')].map(e => {
            const ink = light(getComputedStyle(e).color);
            return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05); }).reduce((a, b) => Math.min(a, b));
    """
    for scheme in ("light", "dark"):
        browser.open(page, 800, prefers_color_scheme=scheme)
        assert browser.run(script) >= 4.5, scheme


def test_it_prints(browser: Browser, page: Path) -> None:
    browser.open(page, 1280, prefers_color_scheme="dark")
    pdf = base64.b64decode(browser.devtools("Page.printToPDF", {"printBackground": False})["data"])
    assert pdf.startswith(b"%PDF")
    assert (
        3
        <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type /Page/")
        <= 30
    )
