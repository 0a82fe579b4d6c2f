"""The report in a real browser: nothing is loaded, nothing complains, everything can be reached by keyboard."""

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffiqa.runtime.report.writer import ReportWriter
from diffiqa.runtime.results import Failure, Mode
from diffiqa.tests.browser import BROWSER, DOWN, DRIVER, ENTER, ESCAPE, LEFT, RIGHT, TAB, UP, Browser, started
from diffiqa.tests.runtime.fake_results import fake_manifest, fake_score

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "a report.html"
    with ReportWriter(path, fake_manifest(), expected=5) as report:
        for number in range(4):
            report.add(
                fake_score(number, f"photos/{'dcba'[number]} image-{number}.png", height=240, width=320, seeds=2)
            )
        report.add(fake_score(5, "wide.png", height=224, width=900, crops=2, mode=Mode.CROP))
        report.add(fake_score(6, "old.png", pictures=False))
        report.add(Failure("photos/broken.png", "it is cut short"))
        report.add(Failure("<img src=//example.invalid onerror=alert(1)>", "</script><script>alert(1)</script>"))
    return path


@pytest.fixture
def opened(browser: Browser, page: Path) -> Callable[..., Browser]:
    def open_page(**options: Any) -> Browser:
        browser.open(page.as_uri(), **options)
        return browser

    return open_page


NAMES = "[...document.querySelectorAll('.card:not([hidden])')].map(card => card.dataset.name)"
ROWS = "[...document.querySelectorAll('#table tbody tr:not([hidden]) th')].map(cell => cell.textContent)"


def choose(browser: Browser, field: str, value: str) -> None:
    how = f"checked = {str(value == 'yes').lower()}" if field == "failures" else f"value = {json.dumps(value)}"
    browser.run(f"""
        const field = document.querySelector('#controls').{field};
        field.{how};
        field.dispatchEvent(new Event('input', {{bubbles: true}}));""")


def test_loads_nothing_and_complains_about_nothing(opened: Callable[..., Browser], page: Path) -> None:
    browser = opened()
    browser.log("performance")
    browser.log("browser")
    browser = opened()
    for field, value in [("range", "own"), ("overlay", "yes"), ("key", "score"), ("text", "image")]:
        choose(browser, field, value)
    browser.run("document.querySelectorAll('figure img').forEach(image => image.loading = 'eager')")
    browser.wait("[...document.querySelectorAll('figure img')].every(image => image.naturalWidth > 0)")
    assert browser.log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


def test_the_policy_stops_what_is_not_the_page_s_own(opened: Callable[..., Browser]) -> None:
    browser = opened()
    browser.run("""
        const script = document.createElement('script'); script.textContent = 'window.foreign = 1';
        const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';
        document.body.append(script, image);
        window.failed = false; image.onerror = () => window.failed = true;""")
    browser.wait("window.failed")
    assert browser.run("return window.foreign === undefined")
    assert len(browser.log("browser")) == 2  # both were refused by the policy, and said so


@pytest.mark.parametrize("width", [320, 360, 390, 768, 1280])
def test_fits_every_width(opened: Callable[..., Browser], width: int) -> None:
    browser = opened(width=width)
    browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    browser.run("document.querySelectorAll('.card').forEach(card => card.style.contentVisibility = 'visible')")
    assert browser.run("return document.documentElement.scrollWidth") <= browser.run("return innerWidth") == width
    browser.run("document.querySelector('figure.map img').click()")
    wide = "[...document.querySelectorAll('#viewer *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert browser.run(f"return {wide}.map(e => e.outerHTML.slice(0, 80))") == []
    assert browser.run("return document.querySelector('.frame').getBoundingClientRect().height") > 40


def test_sorts_cards_and_table_alike(opened: Callable[..., Browser]) -> None:
    browser = opened()
    given = browser.run(f"return {NAMES}")
    choose(browser, "key", "name")
    assert browser.run(f"return {NAMES}") == sorted(given)
    choose(browser, "direction", "-1")
    assert browser.run(f"return [{NAMES}, {ROWS}]") == [sorted(given, reverse=True)] * 2
    choose(browser, "key", "score")
    scores = browser.run("return [...document.querySelectorAll('.card')].map(card => Number(card.dataset.score))")
    assert scores == sorted(scores, reverse=True)
    # A column's header sorts as well, says so, and turns round when used again.
    browser.run("document.querySelector('#numbers details').open = true")
    header = "document.querySelector('#table th.vda')"
    for order, name in ((1, "ascending"), (-1, "descending")):
        browser.run(f"{header}.querySelector('button').focus()")
        browser.press(ENTER)
        assert browser.run(f"return {header}.getAttribute('aria-sort')") == name
        values = browser.run("return [...document.querySelectorAll('.card')].map(card => Number(card.dataset.vda))")
        assert values == sorted(values, reverse=order < 0)
    choose(browser, "key", "spread")  # two images have a single seed: they come last in both directions
    assert set(browser.run(f"return {NAMES}.slice(-2)")) == {"wide.png", "old.png"}


def test_filters_by_name_score_and_failure(opened: Callable[..., Browser]) -> None:
    browser = opened()
    told = "document.querySelector('#shown').textContent"
    assert browser.run(f"return {told}") == "6 of 6 images shown"
    choose(browser, "text", "IMAGE-2")
    assert browser.run(f"return [{NAMES}, {ROWS}, {told}]") == [
        ["photos/b image-2.png"],
        ["photos/b image-2.png"],
        "1 of 6 images shown",
    ]
    assert browser.run("return document.querySelector('#failures').hidden")  # no failure has this name either
    choose(browser, "text", "")
    middle = browser.run(
        "return [...document.querySelectorAll('.card')].map(card => Number(card.dataset.score)).sort()[3]"
    )
    choose(browser, "low", str(middle))
    assert browser.run(f"return {NAMES}.length") == 3
    choose(browser, "high", str(middle))
    assert browser.run(f"return {NAMES}.length") == 1
    choose(browser, "failures", "yes")
    assert browser.run(f"return [{NAMES}.length, {told}]") == [0, "2 of 2 failures shown, above"]
    browser.run("document.querySelector('#controls').reset()")
    browser.wait(f"{NAMES}.length === 6")
    assert browser.run("return !document.querySelector('#failures').hidden")


def test_a_bar_of_the_histogram_tells_its_count_and_shows_its_images(opened: Callable[..., Browser]) -> None:
    browser = opened()
    bar = "[...document.querySelectorAll('.bin')].find(bin => / 1 image$/.test(bin.getAttribute('aria-label')))"
    browser.run(f"{bar}.focus()")
    assert re.fullmatch(
        r"Score [\d.]+ to [\d.]+: 1 image", browser.run("return document.querySelector('#bar').textContent")
    )
    browser.press(ENTER)
    assert browser.run(f"return {NAMES}.length") == 1


def test_pictures_enlarge_and_turn_by_keyboard(opened: Callable[..., Browser]) -> None:
    browser = opened()
    viewer = "document.querySelector('#viewer')"
    shown = (
        "[document.querySelector('#viewer-title').textContent, document.querySelector('#viewer-picture').textContent]"
    )
    browser.run("document.querySelector('figure img').focus()")
    browser.press(TAB, ENTER)
    assert browser.run(f"return [{viewer}.open, ...{shown}]") == [True, "photos/d image-0.png", "y0"]
    browser.press(RIGHT)
    assert browser.run(f"return {shown}") == ["photos/d image-0.png", "yt1"]
    browser.press(DOWN)
    assert browser.run(f"return {shown}") == ["photos/c image-1.png", "yt1"]
    browser.press(UP, LEFT, LEFT)
    assert browser.run(f"return {shown}") == ["photos/d image-0.png", "Original"]
    browser.press(LEFT, UP)  # the first of all stays
    assert browser.run(f"return {shown}") == ["photos/d image-0.png", "Original"]
    browser.press(*[RIGHT] * 8)  # past the last picture comes the next image
    assert browser.run(f"return {shown}") == ["photos/c image-1.png", "Original"]
    browser.press(RIGHT)
    over = "document.querySelector('.over')"
    browser.press("o")
    assert browser.run(f"return {over}.style.opacity") == "0"
    browser.press("o")
    assert browser.run(f"return {over}.style.opacity") == "1"
    browser.press(ESCAPE)
    assert not browser.run(f"return {viewer}.open")
    # Focus is where the keys have led, not where they began.
    browser.wait("document.activeElement.alt === 'y0, restored, of photos/c image-1.png'")


def test_focus_can_be_seen(opened: Callable[..., Browser]) -> None:
    browser = opened()
    outlines = set()
    for _ in range(8):
        browser.press(TAB)
        outlines.add(browser.run("return getComputedStyle(document.activeElement).outlineStyle"))
    browser.run(
        "document.querySelector('#controls').scrollIntoView(); document.querySelector('#controls').text.focus()"
    )
    browser.press(TAB)
    outlines.add(browser.run("return getComputedStyle(document.activeElement).outlineStyle"))
    # Bars draw their own frame, in SVG.
    assert outlines <= {"solid", "none"}
    assert "solid" in outlines
    browser.run("document.querySelector('.bin').focus()")
    assert browser.run("return getComputedStyle(document.activeElement.querySelector('.slot')).strokeWidth") == "2px"


def test_maps_tell_their_values_and_change_their_range(opened: Callable[..., Browser]) -> None:
    browser = opened()
    figure = "document.querySelectorAll('figure[data-kind=score_map]')[4]"  # of the image with two crops
    browser.run(f"{figure}.querySelector('img').click()")
    box = browser.run(
        "const b = document.querySelector('.frame').getBoundingClientRect(); return [b.left, b.top, b.width, b.height]"
    )
    value = "document.querySelector('#viewer-value').textContent"

    def read(x: float) -> str:
        # The picture behind the numbers loads in its own time.
        end = time.monotonic() + 10
        told = ""
        while not told.startswith(("No", *"0123456789")) and time.monotonic() < end:
            browser.point(int(box[0] + x * box[2]), int(box[1] + 0.5 * box[3]) - 1)
            browser.point(int(box[0] + x * box[2]), int(box[1] + 0.5 * box[3]))
            told = browser.run(f"return {value}")
        return told

    low, high = (float(browser.run(f"return {figure}.dataset.{end}")) for end in ("low", "high"))
    number = re.fullmatch(r"([\d.]+) at \d+, \d+", read(0.1))
    assert number
    assert low <= float(number[1]) <= high
    browser.run("document.querySelector('#viewer').close()")
    browser.run(f"{figure}.querySelector('img').click()")
    browser.wait(f"{value}.startsWith('Point')")
    assert read(0.5).startswith("No value at ")
    browser.press(ESCAPE)

    legend = f"[...{figure}.querySelectorAll('.low, .high')].map(end => end.textContent)"
    source = f"{figure}.querySelector('img').src"
    shared, before = browser.run(f"return [{legend}, {source}]")
    choose(browser, "range", "own")
    own = [float(text) for text in browser.run(f"return {legend}")]
    assert own == [pytest.approx(low, rel=1e-2), pytest.approx(high, rel=1e-2)]
    assert browser.run(f"return {source}") != before
    browser.run(f"{figure}.scrollIntoView()")
    browser.wait(f"{figure}.querySelector('img').naturalWidth > 0")  # a wrong checksum would not decode
    choose(browser, "range", "run")
    assert browser.run(f"return [{legend}, {source}]") == [shared, before]


@pytest.mark.parametrize("dark", [False, True])
def test_follows_the_system_s_theme_until_told_otherwise(opened: Callable[..., Browser], dark: bool) -> None:
    browser = opened(dark=dark)
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + Number(b), 0)"
    assert (browser.run(f"return {brightness}") < 380) is dark
    browser.run("document.querySelector('#theme').click()")
    assert (browser.run(f"return {brightness}") > 380) is dark
    browser.run("document.querySelector('#theme').click()")
    assert (browser.run(f"return {brightness}") < 380) is dark


def test_shows_everything_without_scripts(opened: Callable[..., Browser]) -> None:
    browser = opened(script=False)
    root = browser.devtools("DOM.getDocument", depth=0)["root"]["nodeId"]
    for selector, count in ((".card", 6), ("figure img", 40), ("#failures tbody tr", 2), ("#table tbody tr", 6)):
        found = browser.devtools("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
        assert len(found) == count, selector
        if selector != "#table tbody tr":  # which is folded away
            box = browser.devtools("DOM.getBoxModel", nodeId=found[0])["model"]
            assert min(box["width"], box["height"]) > 0, selector
    controls = browser.devtools("DOM.querySelector", nodeId=root, selector="#controls")["nodeId"]
    with pytest.raises(AssertionError, match="box model"):  # what would do nothing is not there
        browser.devtools("DOM.getBoxModel", nodeId=controls)


def test_prints_all_numbers(opened: Callable[..., Browser]) -> None:
    browser = opened()
    unfolded = "document.querySelector('#numbers details').open"
    browser.run(f"window.addEventListener('beforeprint', () => window.printed = {unfolded})")
    printed = base64.b64decode(browser.devtools("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF")
    assert browser.run("return window.printed")
    assert not browser.run(f"return {unfolded}")  # as it was before
    browser.devtools("Emulation.setEmulatedMedia", media="print")
    assert not browser.run("return document.querySelector('#controls').checkVisibility()")
    browser.devtools("Emulation.setEmulatedMedia", media="")
