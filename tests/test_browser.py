"""The built site in a real browser: Debian's Chromium through Selenium."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import pytest
from conftest import ROOT, VIEWS, show

from safetyneuron.metrics.refusal import is_refusal

PAGES = [f"notebooks/{path.stem}.html" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
PAGES += ["SECURITY.html"] + [
    f"book/{name}.html"
    for name in (
        "index",
        "playground",
        "paper_and_here",
        "released_code",
        "status",
        "ledger",
        "departures",
        "rerun",
        "league",
        "neurons",
        "accessibility",
        "teachers",
        "glossary",
        "bibliography",
    )
]

pytestmark = [pytest.mark.book, pytest.mark.browser]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("page", PAGES)
def test_pages_load_without_error_overflow_or_outside_request(browser, address, page, view):
    show(browser, address + page, view)
    assert [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
    ] == []
    assert (
        browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        <= 0
    )
    broken = (
        "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    )
    assert browser.execute_script(broken) == []
    requested = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert [name for name in requested if not name.startswith((address, "data:", "blob:"))] == []
    if view != "phone":
        assert browser.execute_script("return document.documentElement.dataset.theme") == view


@pytest.mark.parametrize("view", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_no_serious_violation(browser, address, page, view):
    import axe_core_python

    show(browser, address + page, view)
    browser.execute_script(
        (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    )
    result = browser.execute_async_script(
        "axe.run(document, {resultTypes: ['violations']}).then(arguments[0])"
    )
    serious = [v for v in result["violations"] if v["impact"] in ("serious", "critical")]
    assert [
        (v["id"], [(node["html"][:120], node["failureSummary"]) for node in v["nodes"][:3]])
        for v in serious
    ] == []


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
    files = [
        path for path in root.rglob("*.html") if "_static" not in path.parts
    ]  # the theme keeps a template there
    pages = {
        path.relative_to(root).as_posix(): Links(path.read_text(encoding="utf-8")) for path in files
    }
    missing = []
    for page, found in pages.items():
        for link in found.links:
            target = urlparse(urljoin(f"http://site/{page}", link))
            path = unquote(target.path).lstrip("/") or "index.html"
            if target.netloc != "site" or target.scheme != "http":
                continue
            anchored = (
                not target.fragment
                or path not in pages
                or unquote(target.fragment) in pages[path].ids
            )
            if not (root / path).exists() or not anchored:
                missing.append((page, link))
    assert missing == []


@pytest.mark.parametrize(
    "page",
    [
        "book/index.html",
        "book/playground.html",
        "book/paper_and_here.html",
        "notebooks/02_verification.html",
    ],
)
def test_the_keyboard_reaches_everything(browser, address, page):
    from selenium.webdriver.common.keys import Keys

    show(browser, address + page, "light")
    visible = """return [...document.querySelectorAll('a[href], button, input:not([type=radio]), input:checked, select, summary')].filter(
        e => e.checkVisibility({visibilityProperty: true}) && e.tabIndex >= 0 && !e.disabled && e.offsetWidth).length"""
    wanted = browser.execute_script(visible)
    browser.execute_script(
        "window.reached = new Set(); document.addEventListener('focusin', e => window.reached.add(e.target))"
    )
    for _ in range(wanted + 10):
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.execute_script("return window.reached.size") >= wanted


def test_the_filter_shows_matching_rows_only(browser, address):
    show(browser, address + "book/paper_and_here.html", "light")
    browser.find_element("id", "filter").send_keys("gcg llama3-8b-base")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#filtered tbody:not(.head) tr')].filter(r => !r.hidden).map(r => r.textContent)"
    )
    assert len(shown) == 3 and all("Table 3" in text for text in shown)
    assert browser.find_element("id", "filter-count").text.startswith("3 of ")


def test_arrow_keys_go_through_all_slides_and_every_figure_shows(browser, address):
    from selenium.webdriver.common.keys import Keys

    show(browser, address + "_static/slides/index.html", "light")
    count = browser.execute_script("return Reveal.getTotalSlides()")
    assert count >= 15
    for _ in range(count - 1):
        browser.find_element("tag name", "body").send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script("return Reveal.isLastSlide()")
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt])"
    )
    assert len(images) == count - 2 and all(shown and alt for shown, alt in images)
    requested = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert all(name.startswith(address) for name in requested)
    assert [
        entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
    ] == []


@pytest.mark.parametrize("view", ["light", "phone"])
def test_page_one_breaks_a_refusal_on_a_click(browser, address, view):
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, address + "book/index.html", view)
    button = browser.find_element("id", "demo-run")
    assert button.location["y"] + button.size["height"] < VIEWS[view][1]  # above the fold
    button.click()
    WebDriverWait(browser, 60).until(lambda b: b.find_element("id", "demo-changed").text)
    whole, changed = (
        browser.find_element("id", f"demo-{name}").text for name in ("whole", "changed")
    )
    assert is_refusal(whole) and not is_refusal(changed)


def test_a_guess_is_judged_and_remembered(browser, address):
    show(browser, address + "notebooks/02_verification.html", "light")
    box = browser.find_element("css selector", ".check[data-name=check_02_parts]")
    said = box.find_element("css selector", "[role=status]")
    answer = box.get_attribute("data-answer")
    assert answer not in box.text
    box.find_element("css selector", ".ask").click()
    assert said.text == "Write down a guess first."
    box.find_element("tag name", "input").send_keys("1000")
    box.find_element("css selector", ".ask").click()
    assert said.text == "much too high."
    show(browser, address + "notebooks/02_verification.html", "light")
    box = browser.find_element("css selector", ".check[data-name=check_02_parts]")
    assert box.find_element("tag name", "input").get_attribute("value") == "1000"
    box.find_element("css selector", ".show").click()
    assert answer in box.find_element("css selector", "[role=status]").text


@pytest.mark.parametrize("view", VIEWS)
def test_a_figure_is_enlarged_by_a_click_and_escape_goes_back(browser, address, view):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(browser, address + "notebooks/02_verification.html", view)
    link = browser.find_element("css selector", "#fig-verification a.enlarge")
    before = link.size["width"]
    link.send_keys(Keys.ENTER)
    (large,) = [i for i in browser.find_elements("css selector", "dialog img") if i.is_displayed()]
    assert large.size["width"] > before and large.get_attribute("alt")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not large.is_displayed()


SMALLEST_TEXT = """
const done = arguments[0];
const check = async (image) => {
  const svg = new DOMParser().parseFromString(await (await fetch(image.currentSrc)).text(), 'image/svg+xml').documentElement;
  const scale = image.getBoundingClientRect().width / Number(svg.getAttribute('viewBox').split(' ')[2]);
  const sizes = [...svg.querySelectorAll('text, tspan')].map(t => /font(?:-size)?: *(?:[a-z0-9]+ )*?([0-9.]+)px/.exec(t.getAttribute('style') ?? '')).filter(Boolean);
  return [image.currentSrc.split('/').pop(), sizes.length, scale * Math.min(...sizes.map(s => Number(s[1])))];
};
Promise.all([...document.querySelectorAll('figure img[src$=".svg"]')].map(check)).then(done);
"""


@pytest.mark.parametrize("view", ["light", "phone"])
@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks")])
def test_what_a_chapter_found_is_on_its_first_screen(browser, address, page, view):
    show(browser, address + page, view)
    lines = browser.find_elements("css selector", "article li:has(.badge)")
    assert lines and lines[0].text.strip()
    last = "return arguments[0].getBoundingClientRect().bottom - window.innerHeight"
    assert browser.execute_script(last, lines[0]) <= 0


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks")])
def test_the_text_of_figures_can_be_read(browser, address, page):
    show(browser, address + page, "light")
    figures = browser.execute_async_script(SMALLEST_TEXT)
    assert [(name, size) for name, count, size in figures if count and size < 9] == []
    assert any(count for _, count, _ in figures)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks")])
def test_on_a_phone_the_text_of_wide_figures_can_be_read(browser, address, page):
    show(browser, address + page, "phone")
    figures = browser.execute_async_script(SMALLEST_TEXT.replace("figure img", "picture img"))
    assert [(name, size) for name, count, size in figures if count and size < 9] == []
    wide = "return document.querySelectorAll('figure.full-width:not(:has(table)) img').length"
    assert figures or not browser.execute_script(wide)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks")])
def test_every_figure_has_its_numbers_in_a_table_and_a_file(browser, address, page):
    show(browser, address + page, "light")
    missing = """return [...document.querySelectorAll('figure[id^=fig-]:not(#fig-idea):has(img)')].filter(f => {
        const data = f.nextElementSibling;
        return !data?.matches('details.data') || data.querySelectorAll('tbody td').length < 2 || !data.querySelector('a[download]');
    }).map(f => f.id)"""
    assert browser.execute_script(missing) == []


def test_a_printed_chapter_is_complete_and_has_nothing_around_it(browser, address):
    show(browser, address + "notebooks/02_verification.html", "light")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    seen = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility({visibilityProperty: true})).length"
    assert (
        browser.execute_script(
            seen, ".bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, p.downloads"
        )
        == 0
    )
    assert (
        browser.execute_script(seen, ".solution .highlight")
        == browser.execute_script("return document.querySelectorAll('.solution .highlight').length")
        >= 3
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
