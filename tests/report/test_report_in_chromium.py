"""The report as a browser shows it: wide and narrow, light and dark, and without a network."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from normdrop.report.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its chromedriver on the PATH"
)

# Each text's contrast with what lies behind it, by WCAG 2; those below 4.5 are given back.
LOW_CONTRAST = r"""
const parse = text => {
  const srgb = text.startsWith("color(");
  const parts = text.match(/-?[\d.]+(e-?\d+)?/g).map(Number);
  const [r, g, b] = parts.map(v => srgb ? v : v / 255);
  return [r, g, b, parts.length > 3 ? parts[3] : 1];
};
const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
const behind = element => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    layers.push(parse(getComputedStyle(at).backgroundColor));
    if (layers.at(-1)[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1]);
};
const light = colour => {
  const [r, g, b] = colour.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const low = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const text = walker.currentNode.textContent.trim();
  if (!text) continue;
  const style = getComputedStyle(element);
  const below = behind(element.closest("svg")?.parentElement ?? element);
  const own = over(parse(element.closest("svg") ? style.fill : style.color), below);
  const [a, b] = [light(own), light(below)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) low.push([text.slice(0, 40), Number(ratio.toFixed(2))]);
}
return low;
"""


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=DRIVER)
        driver = webdriver.Chrome(options=options, service=service)
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def page(finished_run) -> Path:
    return write_report(finished_run)


def show(browser, page: Path, width: int, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.get(page.as_uri())


@pytest.mark.parametrize("width", [1600, 1280, 400, 360])
def test_report_fits_the_window(browser, page, width):
    show(browser, page, width)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # What is wider than the window lies in a box that scrolls by itself.
    assert not browser.execute_script(
        "return [...document.querySelectorAll('body *')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        "  && !e.closest('.scroll, pre, svg'))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    loaded = browser.execute_script(
        "return [...document.images].map(i => i.complete && i.naturalWidth > 0)"
    )
    assert loaded
    assert all(loaded)
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2')]"
        ".filter(h => h.getBoundingClientRect().height > 0).map(h => h.textContent)"
    )
    assert headings == [
        "resnet20 on digits", "What stands out", "Curves", "Classes", "Calibration",
        "Worst mistakes", "What batch norm learned", "What dropout did", "Data", "Options",
        "Run it again",
    ]  # fmt: skip


def test_report_asks_nothing_of_a_net_and_logs_no_error(browser, page):
    browser.get_log("browser")
    browser.get_log("performance")
    show(browser, page, 1280)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith("data:") for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_text_can_be_read(browser, page, scheme):
    show(browser, page, 1280, scheme)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(19, 22, 25)") == (scheme == "dark")
    assert browser.execute_script(LOW_CONTRAST) == []


@pytest.mark.parametrize("width", [1280, 360])
def test_report_figures_keep_their_text_inside_and_apart(browser, page, width):
    show(browser, page, width)
    outside = browser.execute_script(
        "return [...document.querySelectorAll('.plot svg')].flatMap(svg => {"
        "  const card = svg.closest('.card').getBoundingClientRect();"
        "  return [...svg.querySelectorAll('text')].filter(t => {"
        "    const box = t.getBoundingClientRect();"
        "    return box.left < card.left || box.right > card.right;"
        "  }).map(t => t.textContent);"
        "})"
    )
    assert outside == []
    overlapping = browser.execute_script(
        "return [...document.querySelectorAll('.plot svg')].flatMap(svg => {"
        "  const boxes = [...svg.querySelectorAll('text')].map(t =>"
        "    [t.textContent, t.getBoundingClientRect()]);"
        "  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>"
        "    p.left < q.right - 1 && q.left < p.right - 1 &&"
        "    p.top < q.bottom - 3 && q.top < p.bottom - 3).map(([b]) => a + ' / ' + b));"
        "})"
    )
    assert overlapping == []
