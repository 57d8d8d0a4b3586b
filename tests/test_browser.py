"""The built site in a real browser: Debian's Chromium through Selenium."""

import functools
import shutil
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest

from conftest import ROOT

PAGES = [f"notebooks/{path.stem}.html" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
PAGES += [f"book/{name}.html" for name in ("index", "paper_and_here", "status", "rerun", "teachers", "glossary", "bibliography")]
VIEWS = {"light": (1400, 900), "dark": (1400, 900), "phone": (390, 844)}

pytestmark = [pytest.mark.book, pytest.mark.browser]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without printing every request."""

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site / "html")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no browser: install Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
    for argument in [*quiet, "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def show(browser, url, view):
    """Open a page in one view."""
    width, height = VIEWS[view]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": view == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = "dark" if view == "dark" else "light"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(url)
    settled = "Promise.allSettled(document.getAnimations().map(a => a.finished)).then(() => arguments[0]())"
    browser.execute_async_script(settled)  # colours fade when the theme is chosen


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("page", PAGES)
def test_pages_load_without_error_overflow_or_outside_request(browser, address, page, view):
    show(browser, address + page, view)
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
    broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    assert browser.execute_script(broken) == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []
    if view != "phone":
        assert browser.execute_script("return document.documentElement.dataset.theme") == view


@pytest.mark.parametrize("view", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_no_serious_violation(browser, address, page, view):
    import axe_core_python

    show(browser, address + page, view)
    browser.execute_script((Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    result = browser.execute_async_script("axe.run(document, {resultTypes: ['violations']}).then(arguments[0])")
    serious = [v for v in result["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [(node["html"][:120], node["failureSummary"]) for node in v["nodes"][:3]]) for v in serious] == []


class Links(HTMLParser):
    """Every link, source and id of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        """Collect."""
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]


def test_every_internal_link_and_anchor_resolves(site):
    root = site / "html"
    files = [path for path in root.rglob("*.html") if "_static" not in path.parts]  # the theme keeps a template there
    pages = {path.relative_to(root).as_posix(): Links(path.read_text(encoding="utf-8")) for path in files}
    missing = []
    for page, found in pages.items():
        for link in found.links:
            target = urlparse(urljoin(f"http://site/{page}", link))
            path = unquote(target.path).lstrip("/") or "index.html"
            if target.netloc != "site" or target.scheme != "http":
                continue
            anchored = not target.fragment or path not in pages or unquote(target.fragment) in pages[path].ids
            if not (root / path).exists() or not anchored:
                missing.append((page, link))
    assert missing == []


def test_the_keyboard_reaches_everything(browser, address):
    from selenium.webdriver.common.keys import Keys

    show(browser, address + "book/index.html", "light")
    visible = """return [...document.querySelectorAll('a[href], button, input, select, summary')].filter(
        e => e.checkVisibility({visibilityProperty: true}) && e.tabIndex >= 0 && !e.disabled && e.offsetWidth).length"""
    wanted = browser.execute_script(visible)
    browser.execute_script("window.reached = new Set(); document.addEventListener('focusin', e => window.reached.add(e.target))")
    for _ in range(wanted + 10):
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.execute_script("return window.reached.size") >= wanted


def test_the_filter_shows_matching_rows_only(browser, address):
    show(browser, address + "book/paper_and_here.html", "light")
    browser.find_element("id", "filter").send_keys("gcg llama3-8b-base")
    shown = browser.execute_script("return [...document.querySelectorAll('#filtered tbody tr')].filter(r => !r.hidden).map(r => r.textContent)")
    assert len(shown) == 3 and all("Table 3" in text for text in shown)
    assert browser.find_element("id", "filter-count").text.startswith("3 of ")
