"""The page in a real browser: nothing loaded, nothing run that it should not, usable by all."""

import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("plotly", reason="the extra [report] is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from beit_jax.report.command import main
from tests.report.page_test import HOSTILE
from tests.report.runs import CONFIG, line, make

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (375, 1280)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> pathlib.Path:
    """Of a run with a gap and hostile names, a long one with 100,000 points, and one point."""
    folder = tmp_path_factory.mktemp("report")
    config = CONFIG | {HOSTILE: HOSTILE}
    name = HOSTILE.replace("/", "")
    lines = [line(10), line(20, loss=None), line(30, **{f"{name}</": 1.0}), line(40, skipped=2.0)]
    runs = [
        make(folder / name, config=config, lines=lines),
        make(folder / "long", lines=[line(step, loss=5 - step**0.1) for step in range(100_000)]),
        make(folder / "point", lines=[line(10)]),
    ]
    Image.fromarray(np.zeros((64, 900, 3), np.uint8)).save(runs[0] / f"{name}.png")
    output = folder / "report.html"
    assert main([*map(str, runs), f"--output={output}"]) == 0
    return output


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_without_a_network_or_an_error(browser, report, width, scheme):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector(".chart .main-svg")
    page.wait_for_timeout(500)  # what an injected image would need to fail
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("window.hacked") is None
    # Nothing sticks out to the side.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    drawn = page.evaluate("document.querySelectorAll('.chart .main-svg').length")
    assert drawn >= page.evaluate("document.querySelectorAll('.chart').length") > 0
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in paper.strip("rgb()").split(",")) > 3 * 128
    assert light == (scheme == "light")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, report, scheme):
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe is not installed")
    # The checker is a script of its own, which the page's policy would not let in.
    context = browser.new_context(
        viewport={"width": WIDTHS[0], "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    page = context.new_page()
    page.goto(report.as_uri())
    page.wait_for_selector(".chart .main-svg")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    violations = axe.Axe().run(page)["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []
    context.close()


def test_the_keyboard_reaches_everything(browser, report):
    context = browser.new_context(viewport={"width": WIDTHS[1], "height": 800})
    page = context.new_page()
    page.goto(report.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") is True
    context.close()
