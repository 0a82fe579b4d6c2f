"""The page for people: its stream, and the page in a real browser."""

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffiqa.engine.manifest import read_manifest
from diffiqa.engine.schedule import Kind
from diffiqa.runtime.images import read_image
from diffiqa.runtime.plan import Window
from diffiqa.runtime.report.heatmap import COLOURS
from diffiqa.runtime.results import Options, Score
from diffiqa.runtime.scorer import Scorer, load
from diffiqa.serve import page as page_module
from diffiqa.serve.door import FAULT
from diffiqa.serve.limits import Limits
from diffiqa.serve.page import Sights
from diffiqa.serve.work import Job, Service

from ..browser import BROWSER, DRIVER, Browser, started
from ..tiny import photo
from .serving import Answer, Gate, Running, running


@pytest.fixture(scope="module")
def site(tiny_engine: Path) -> Iterator[Running]:
    with load(tiny_engine) as scorer, running(Service({"tiny": scorer}, Limits(seconds=120))) as found:
        found.service.warm_up()
        yield found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(["a.png", "<b>.png"]):
        Image.fromarray(photo(seed, 48, 64)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    return [folder / name for name in ("a.png", "<b>.png", "broken.png")]


def events(answer: Answer) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(part.removeprefix("data: ")) for part in answer.body.decode().split("\n\n") if part]


def test_the_stream_tells_steps_and_ends_with_the_card_of_the_same_score(site: Running, pictures: list[Path]) -> None:
    told = events(site.ask("POST", "/page/card?crops=2&name=a.png", pictures[0].read_bytes()))
    *steps, last = told
    assert steps
    assert all(step.keys() >= {"done", "steps"} for step in steps)
    score = site.ask("POST", "/score?crops=2", pictures[0].read_bytes()).json["score"]
    assert f'data-score="{score:.9g}"' in last["card"]
    assert all(f'data-kind="{kind}"' in last["card"] for kind in ("dis", "y0", "t1", "t2", "score_map", "difference"))


@pytest.mark.parametrize("engine", ["tiny_engine", "pfd_engine"])
def test_a_score_shows_a_state_and_every_map_in_its_place(engine: str, request: pytest.FixtureRequest) -> None:
    with load(request.getfixturevalue(engine)) as scorer, contextlib.closing(Service({"a": scorer})) as service:
        sights = Sights()
        side = scorer.info.crop_size
        job = Job("a", photo(1, side, 3 * side), "a.png", Options(crops=3), show=sights)
        assert sights.taken(None) == {}
        service.submit([job])
        score = job.result.result(60)
        assert job.done == job.steps > 3
        told = sights.taken(job.image)
        assert told["size"] == (side, 3 * side)
        assert ("state" in told) == (len(scorer.info.kinds) > 1)
        assert isinstance(score, Score)
        assert score.pictures
        for map_, crop in zip(told["maps"], score.crops, strict=True):
            assert map_["at"] == [0, crop.left / (3 * side), 1, 1 / 3]
            if score.pictures.words:  # its map is one score
                assert map_["low"] == map_["high"] == pytest.approx(crop.score)
        if state := told.get("state"):
            assert state["at"] == [0, 0, 1, 1]
            with Image.open(io.BytesIO(base64.b64decode(state["jpeg"]))) as image:
                restored = np.asarray(image, float)
            far = {kind: np.abs(restored - plane).mean() for kind, plane in score.pictures.planes.items()}
            assert min(far, key=lambda kind: far[kind]) is Kind.Y0
        assert sights.taken(job.image) == {}


def test_what_is_shown_is_small_and_a_copy() -> None:
    sights, state = Sights(), np.full((3, 100, 600), -1, np.float32)  # black
    sights(Window(0, 300, 100, 600), state)
    state[:] = 1  # the next step
    told = sights.taken(read_image(photo(1, 300, 1200)))["state"]
    assert told["at"] == [0, 0.25, 1 / 3, 0.5]
    with Image.open(io.BytesIO(base64.b64decode(told["jpeg"]))) as image:
        assert image.size == (200, 34)
        assert image.getextrema() == ((0, 0),) * 3


def test_an_error_of_ours_ends_the_stream_in_words(
    site: Running, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "single_card", lambda *_: 1 / 0)
    told = events(site.ask("POST", "/page/card?crops=1", pictures[0].read_bytes()))
    assert told[-1] == {"error": FAULT}


def test_the_stream_tells_why_there_is_no_card(site: Running, pictures: list[Path]) -> None:
    told = events(site.ask("POST", "/page/card?name=broken.png", pictures[2].read_bytes()))
    assert "broken.png: not an image" in told[-1]["error"]
    assert site.ask("POST", "/page/card?crops=0", b"").status == 422


def test_the_page_may_load_nothing_and_talk_to_its_own_service_alone(site: Running) -> None:
    page = site.ask("GET", "/").body.decode()
    policy = page.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.startswith("default-src 'none'; img-src data: blob:; ")
    assert "connect-src 'self';" in policy
    assert "http:" not in page.replace("http://www.w3.org", "")
    assert "https:" not in page
    assert site.ask("GET", "/?engine=big").status == 404


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (BROWSER and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    with started(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def choose(browser: Browser, *paths: Path) -> None:
    root = browser.devtools("DOM.getDocument")["root"]["nodeId"]
    chooser = browser.devtools("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
    browser.devtools("DOM.setFileInputFiles", nodeId=chooser, files=[str(path) for path in paths])


CARDS = "[...document.querySelectorAll('.card')]"


def test_pictures_become_cards_in_a_browser(browser: Browser, site: Running, pictures: list[Path]) -> None:
    browser.open(f"http://127.0.0.1:{site.port}/?crops=2")
    browser.log("performance")
    choose(browser, pictures[0], pictures[2])
    dropped = json.dumps(list(pictures[1].read_bytes()))
    browser.run(f"""
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array({dropped})], '<b>.png', {{type: 'image/png'}}));
        dispatchEvent(new DragEvent('drop', {{dataTransfer: data}}));""")
    browser.wait(f"{CARDS}.length === 2 && document.querySelector('#waiting .bad')")
    assert "broken.png: not an image" in browser.run("return document.querySelector('#waiting').textContent")
    shown = dict(browser.run(f"return {CARDS}.map(card => [card.dataset.name, Number(card.dataset.score)])"))
    for name, path in (("a.png", pictures[0]), ("<b>.png", pictures[1])):
        assert shown[name] == pytest.approx(
            site.ask("POST", "/score?crops=2", path.read_bytes()).json["score"], rel=1e-8
        )
    # Both maps of a kind have the colours of one range.
    ends = "[...document.querySelectorAll('figure[data-kind=score_map] .low')].map(low => low.textContent)"
    assert len(set(browser.run(f"return {ends}"))) == 1
    browser.run(f"{CARDS}.forEach(card => card.querySelector('.compare').click())")
    said = browser.run("return document.querySelector('#pair p').textContent")
    best = max(shown, key=lambda name: shown[name])
    assert said.startswith(f"{best} has the higher score, by ")
    browser.run("document.querySelector('#unpair').click(); document.querySelector('figure.map img').click()")
    browser.wait("document.querySelector('#viewer').open")
    asked = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    own = f"http://127.0.0.1:{site.port}/page/card?"
    assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []
    assert sum(url.startswith(own) for url in asked) == 3
    assert browser.log("browser") == []


def test_restorations_and_maps_are_shown_while_they_come(
    browser: Browser, tiny_engine: Path, pictures: list[Path]
) -> None:
    gate = Gate()
    service = Service({"gate": Scorer(read_manifest(tiny_engine), gate, backend="gate")})
    with running(service) as site:
        browser.open(f"http://127.0.0.1:{site.port}/?crops=1")
        choose(browser, pictures[0])
        browser.wait("document.querySelectorAll('#waiting canvas').length === 2")

        def pixels(number: int) -> Any:
            """The middle of the left and of the right half of the one crop, 32 of 64 × 48 pixels."""
            return browser.run(f"""
                const context = document.querySelectorAll('#waiting canvas')[{number}].getContext('2d');
                return [24, 40].map(x => [...context.getImageData(x, 24, 1, 1).data]);""")

        assert pixels(0) == [[0, 0, 0, 255]] * 2
        assert pixels(1) == [[*COLOURS[0].tolist(), 255], [*COLOURS[-1].tolist(), 255]]
        gate.open.set()
        browser.wait(f"{CARDS}.length === 1 && !document.querySelector('#waiting canvas')")
        assert [entry for entry in browser.log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_fits_a_phone_and_its_chooser_has_the_keyboard(browser: Browser, site: Running) -> None:
    browser.open(f"http://127.0.0.1:{site.port}/", width=360, height=740, dark=True)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.press("\ue004", "\ue004", "\ue004")  # tab: the skip link, the theme, the chooser
    assert browser.run("return document.activeElement.id") == "files"
