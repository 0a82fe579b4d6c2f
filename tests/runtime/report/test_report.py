"""The report: complete in itself, safe against what it shows, whole or not there at all."""

import base64
import dataclasses
import gc
import hashlib
import io
import re
import resource
import tempfile
import weakref
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from diffiqa.engine.manifest import Check, Manifest, StageName
from diffiqa.engine.schedule import Kind
from diffiqa.errors import OutputError, UsageError
from diffiqa.runtime.report import svg
from diffiqa.runtime.report.heatmap import COLOURS
from diffiqa.runtime.report.markup import visible
from diffiqa.runtime.report.writer import ReportWriter
from diffiqa.runtime.results import Failure, Mode, Pictures, Score
from diffiqa.tests.runtime.fake_results import fake_manifest, fake_score

VOID = {"meta", "link", "img", "input", "br"}
HOSTILE = [
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(1)>.png',
    "' onmouseover='alert(1).png",
    "</title></style></script></bdi></article>.png",
    "<!-- images -->$images $title ${x} .png",
    "a & b &lt;b&gt;.png",
    "x\u202egnp.exe",
    "bell\x07 \x1b[31m null\x00.png",
    "a\u2028b\u2029.png",
    "caf\udce9.png",
    "javascript:alert(1)",
    "deep/" * 40 + "name" * 50 + ".png",
    'Füße & 猫 \'n "dogs" <3.png',
    "",
]


class Document(HTMLParser):
    """Reads a page strictly: every element closed where it must be, ids unique; gives tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, str] = {"style": "", "script": ""}
        self.feed(page)
        self.close()
        assert self.open == []
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]] += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def write(path: Path, *results: Score | Failure, manifest: Manifest | None = None, title: str = "Report") -> str:
    with ReportWriter(path, manifest or fake_manifest(), title=title) as report:
        for result in results:
            report.add(result)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results() -> list[Score | Failure]:
    return [
        fake_score(0, "photos/first.png", height=230, width=300),
        Failure("photos/broken.jpg", "photos/broken.jpg is cut short"),
        fake_score(1, "photos/second.png", height=224, width=700, crops=2, mode=Mode.CROP, seeds=3, notes=("16 bit",)),
        fake_score(2, "old/third.png", pictures=False),
    ]


@pytest.fixture(scope="module")
def page(results: list[Score | Failure], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("report") / "report.html", *results)


def test_is_well_formed_and_complete_without_scripts(page: str, results: list[Score | Failure]) -> None:
    document = Document(page)
    for result in results:
        assert result.source.rpartition("/")[2] in document.text
        if isinstance(result, Failure):
            assert result.error in document.text
            continue
        numbers = [result.score, result.vcg, result.vda, *(crop.score for crop in result.crops)]
        assert all(f"{number:.4f}" in document.text for number in numbers if number is not None)
        assert f"{result.width} × {result.height}" in document.text
        assert result.digest in document.text
    for text in ("5f0c9e4b7a12d386", "onnxruntime 1.30.0: CPU", "Higher is better", "16 bit", "0 … 2", "crop by crop"):
        assert text in document.text
    assert len(document.all("figure")) == 16
    # What only scripts can do is hidden until they run; the enlarged view is a closed dialog.
    assert "hidden" in next(attrs for attrs in document.all("form") if attrs["id"] == "controls")
    assert "open" not in document.all("dialog")[0]


def test_images_come_in_the_order_of_the_results(page: str) -> None:
    names = [attrs["data-name"] for attrs in Document(page).all("article")]
    assert names == ["photos/first.png", "photos/second.png", "old/third.png"]


def test_every_picture_has_a_description_and_a_size(page: str) -> None:
    pictures = [attrs for attrs in Document(page).all("img") if attrs.get("loading") == "lazy"]
    assert len(pictures) == 16
    for attrs in pictures:
        assert attrs["alt"]
        assert int(attrs["width"] or 0) > 0
        assert int(attrs["height"] or 0) > 0
    descriptions = [attrs["alt"] or "" for attrs in pictures]
    assert len(set(descriptions)) == len(descriptions)
    assert any(re.fullmatch(r"Score map of photos/first.png, from [\d.]+ to [\d.]+, score", d) for d in descriptions)


def test_tables_name_their_columns_and_rows(page: str) -> None:
    document = Document(page)
    assert all(attrs.get("scope") in {"col", "row"} for attrs in document.all("th"))
    # Histogram, failures, all scores, and the crops of three images.
    assert len(document.all("table")) == len(document.all("thead")) == 6


def test_loads_nothing_from_anywhere(page: str) -> None:
    for tag, attrs in Document(page).tags:
        for name, value in attrs.items():
            if name in {"src", "href", "srcset", "action", "data", "poster", "formaction", "xlink:href", "background"}:
                assert re.match(r"#|data:", value or ""), f"{tag} {name} leaves the page: {value}"
            assert not name.startswith("on"), "handlers in attributes need a weaker policy"
            assert name != "style", "styles in attributes need a weaker policy"
    bare = re.sub(r"data:image/\w+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.findall(r"https?:|@import|url\((?!\"\$\{)|fetch\(|XMLHttpRequest|import\(|eval\(", bare)


def test_policy_admits_only_the_page_s_own_script_and_style(page: str) -> None:
    document = Document(page)
    policy = next(attrs["content"] for attrs in document.all("meta") if "http-equiv" in attrs) or ""
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(document.raw[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert len(document.all("script")) == len(document.all("style")) == 1


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    plain, harmless = fake_manifest(), fake_score(1, "x/x", height=224, width=224, notes=("x",))
    reference = Document(write(tmp_path / "s.html", harmless, Failure("x", "x")))
    for name in HOSTILE:
        manifest = dataclasses.replace(
            plain,
            model={"name": name},
            score=dataclasses.replace(plain.score, meaning=name),
            provenance=dataclasses.replace(plain.provenance, notes=(name,), created=name, versions={name: name}),
        )
        score = dataclasses.replace(harmless, source=name, notes=(name,), backend=name, engine=name, digest=name)
        document = Document(write(tmp_path / "r.html", score, Failure(name, name), manifest=manifest, title=name))
        assert [attrs["data-name"] for attrs in document.all("article")] == [visible(name)]
        assert not name or document.text.count(visible(name)) >= 10
        assert {tag for tag, _ in document.tags} <= {tag for tag, _ in reference.tags}
        assert {key for _, attrs in document.tags for key in attrs} <= {key for _, a in reference.tags for key in a}
        assert document.raw == reference.raw, "no text of a user's may reach script or style"


def test_other_labels_and_accepted_drift_are_said(tmp_path: Path, page: str) -> None:
    assert "No score is below 0. The best images get about 1; some get more." in Document(page).text
    assert "Accepted drift" not in page
    manifest = fake_manifest()
    check = Check("score", {"maps": (1,)}, 1, 0.5, 0.1, 1.0, 0.25)
    stages = (dataclasses.replace(manifest.stages[0], checks=(check,)), *manifest.stages[1:])
    score = dataclasses.replace(manifest.score, minimum=1, nominal_maximum=5, higher_is_better=False)
    text = Document(write(tmp_path / "r.html", manifest=dataclasses.replace(manifest, score=score, stages=stages))).text
    assert "Lower is better. The labels of training go from 1 to 5; a score may lie outside." in text
    assert f"score of {manifest.stages[0].name} by 0.5 where 0.25 is allowed" in text


def test_an_untrained_engine_is_called_so_on_the_page_and_on_every_card(
    results: list[Score | Failure], tmp_path: Path
) -> None:
    document = Document(write(tmp_path / "r.html", *results, manifest=fake_manifest(trained=False)))
    assert "This engine is untrained: its numbers mean nothing." in document.text
    assert document.text.count("untrained: meaningless") == 3
    assert "rank 1" not in document.text
    assert any(attrs.get("role") == "note" for attrs in document.all("div"))


def test_a_trained_engine_is_not_warned_about(page: str) -> None:
    assert "untrained" not in Document(page).text
    assert "rank 1 of 3" in Document(page).text


def test_scores_of_several_engines_are_said_not_to_compare(tmp_path: Path) -> None:
    other = dataclasses.replace(fake_score(2, pictures=False), engine="ffff000011112222")
    text = Document(write(tmp_path / "r.html", fake_score(1, pictures=False), other)).text
    assert "Results of different engines" in text
    assert "ffff000011112222" in text


def test_a_result_of_an_earlier_run_says_that_it_has_no_pictures(page: str, tmp_path: Path) -> None:
    assert Document(page).text.count("No pictures: this score is from an earlier run.") == 1
    only = Document(write(tmp_path / "r.html", fake_score(1, pictures=False)))
    assert only.all("figure") == []
    of_record = dataclasses.replace(fake_score(1, pictures=False), crops=())  # records do not have single crops
    assert "<dt>Crops</dt>" in page
    assert "<dt>Crops</dt>" not in write(tmp_path / "record.html", of_record)
    assert "dark violet" not in only.text  # no legend for what is not there


def test_a_report_of_nothing_or_of_failures_only_is_a_page(tmp_path: Path) -> None:
    assert "No image was scored." in Document(write(tmp_path / "empty.html")).text
    text = Document(write(tmp_path / "failed.html", Failure("a.png", "no image"), Failure("b.png", "no image"))).text
    assert "0 images and 2 failures" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300, 0.0, 123456.789])
def test_odd_scores_do_not_spoil_the_others(value: float, tmp_path: Path) -> None:
    odd = dataclasses.replace(fake_score(1, "odd.png", pictures=False), score=value)
    document = Document(write(tmp_path / "r.html", odd, fake_score(2, pictures=False)))
    assert len(document.all("article")) == 2
    assert f"{fake_score(2, pictures=False).score:.4f}" in document.text


def test_taps_are_explained_from_the_engine_s_schedule(page: str) -> None:
    text = Document(page).text
    assert "a little noise left (step 5 of 50, counted down to 0): standard deviation 0.17" in text
    assert "more noise left (step 10 of 50, counted down to 0): standard deviation 0.32" in text
    assert "about 21 of 255 levels" in text


@pytest.mark.parametrize(("without", "kept"), [(StageName.VCG, "VDA"), (StageName.VDA, "VCG")])
def test_a_branch_that_an_engine_lacks_is_not_mentioned(without: StageName, kept: str, tmp_path: Path) -> None:
    result = dataclasses.replace(fake_score(1), crops=())
    result = (
        dataclasses.replace(result, vcg=None) if without is StageName.VCG else dataclasses.replace(result, vda=None)
    )
    text = Document(write(tmp_path / "r.html", result, manifest=fake_manifest(without=(without,)))).text
    assert f"Score = {kept}." in text
    assert without.value.upper() not in text


def test_an_engine_without_restoration_shows_image_and_maps(tmp_path: Path) -> None:
    result = fake_score(1)
    assert result.pictures is not None
    bare = dataclasses.replace(result.pictures, planes={Kind.DIS: result.pictures.planes[Kind.DIS]})
    result = dataclasses.replace(result, pictures=bare, vda=None, crops=())
    manifest = fake_manifest(kinds=(Kind.DIS,), without=(StageName.UNET, StageName.VDA))
    document = Document(write(tmp_path / "r.html", result, manifest=manifest))
    assert [attrs["data-kind"] for attrs in document.all("figure")] == ["dis", "score_map", "weight_map", "product"]
    assert "restor" not in document.text.lower()


def map_pixels(page: str, title: str, number: int = 0) -> npt.NDArray[np.uint8]:
    """Return a map of the page as RGBA."""
    found = re.findall(rf'<img src="data:image/png;base64,([^"]+)"[^>]*alt="{title} of', page)[number]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGBA"))


def test_maps_share_one_scale_and_leave_out_what_was_not_looked_at(tmp_path: Path) -> None:
    base = fake_score(1, "a.png", height=224, width=448)
    assert base.pictures is not None
    low = np.full((224, 448), 0.2, np.float32)
    low[:, :8] = 0.1
    high = low + np.float32(0.2)
    high[:, 224:] = np.nan
    first, second = (
        dataclasses.replace(base, source=name, pictures=Pictures(base.pictures.planes, score_map, low))
        for name, score_map in (("a.png", low), ("b.png", high))
    )
    page = write(tmp_path / "r.html", first, second)
    figures = [attrs for attrs in Document(page).all("figure") if attrs["data-kind"] == "score_map"]
    assert [round(float(attrs["data-low"] or 0), 6) for attrs in figures] == [0.1, 0.3]
    assert [round(float(attrs["data-high"] or 0), 6) for attrs in figures] == [0.2, 0.4]
    dark, bright = map_pixels(page, "Score map"), map_pixels(page, "Score map", 1)
    assert dark.shape == (28, 56, 4)  # one pixel per patch: the browser enlarges them
    np.testing.assert_array_equal(dark[0, 0, :3], COLOURS[0])
    np.testing.assert_array_equal(bright[0, 20, :3], COLOURS[-1])
    assert (bright[:, :28, 3] == 255).all()
    assert (bright[:, 28:, 3] == 0).all()


def test_maps_without_any_number_are_transparent(tmp_path: Path) -> None:
    base = fake_score(1, height=224, width=224)
    assert base.pictures is not None
    nothing = np.full((224, 224), np.nan, np.float32)
    result = dataclasses.replace(base, pictures=Pictures(base.pictures.planes, nothing, nothing))
    assert (map_pixels(write(tmp_path / "r.html", result), "Score map")[..., 3] == 0).all()


def test_pictures_are_larger_when_few_images_are_expected(tmp_path: Path) -> None:
    sizes = []
    for expected in (3, 300, 5000, None):
        with ReportWriter(tmp_path / "r.html", fake_manifest(), expected=expected) as report:
            report.add(fake_score(1, height=224, width=900))
        page = (tmp_path / "r.html").read_text(encoding="utf-8")
        sizes.append(max(int(attrs["width"] or 0) for attrs in Document(page).all("img") if "width" in attrs))
    assert sizes == [768, 512, 352, 352]


def test_a_thousand_images_make_a_page_below_60_megabytes(tmp_path: Path) -> None:
    # Images hardly larger than the pictures are the worst case: reducing others averages their noise away.
    path = tmp_path / "r.html"
    write(path, *(fake_score(seed, height=288, width=384) for seed in range(6)))
    some = path.stat().st_size
    write(path)
    assert (some - path.stat().st_size) / 6 < 60_000


def test_keeps_no_pictures_in_memory(tmp_path: Path) -> None:
    with ReportWriter(tmp_path / "r.html", fake_manifest()) as report:
        result = fake_score(1)
        assert result.pictures is not None
        plane = weakref.ref(result.pictures.planes[Kind.DIS])
        report.add(result)
        del result
        gc.collect()
        assert plane() is None


def test_nothing_appears_before_the_end_and_no_scraps_stay(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with ReportWriter(path, fake_manifest()) as report:
        report.add(fake_score(1, height=224, width=224))
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_report_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail() -> None:
        with ReportWriter(path, fake_manifest()) as report:
            report.add(fake_score(1, pictures=False))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("target.html")
    write(tmp_path / "link.html", fake_score(1, pictures=False))
    assert (tmp_path / "link.html").is_symlink()
    (tmp_path / "usual").touch()
    assert (tmp_path / "target.html").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_refuses_places_it_cannot_write_to_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path, says in [
        (tmp_path, "it is not a file"),
        (tmp_path / "missing" / "r.html", "there is no folder"),
        (tmp_path / "file" / "r.html", "there is no folder"),
    ]:
        with pytest.raises(OutputError, match=says):
            ReportWriter(path, fake_manifest())

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"cannot write the report .*: Permission denied"):
        ReportWriter(tmp_path / "r.html", fake_manifest())


@pytest.mark.parametrize("cards", [1, 50], ids=["while closing", "while adding"])
def test_a_full_disk_is_an_output_error_and_leaves_no_scraps(cards: int, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    result = fake_score(1, pictures=False)

    def fill() -> None:
        with ReportWriter(path, fake_manifest()) as report:
            for _ in range(cards):
                report.add(result)

    # A limit on file size stands in for the disk's end: one card fits, the page with its script and style does not.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write the report"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_closed_report_takes_no_more_and_closing_twice_is_fine(tmp_path: Path) -> None:
    report = ReportWriter(tmp_path / "r.html", fake_manifest())
    report.close()
    report.close()
    report.abort()
    assert (tmp_path / "r.html").exists()
    with pytest.raises(UsageError, match="closed"):
        report.add(Failure("a", "b"))


def luminance(colour: str) -> float:
    unit = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_controls_have_the_contrast_of_wcag_aa(page: str, theme: int) -> None:
    pairs = dict(re.findall(r"--([a-z0-9-]+): light-dark\((#\w{6}, #\w{6})\)", Document(page).raw["style"]))
    colour = {name: pair.split(", ")[theme] for name, pair in pairs.items()}
    for ground in ("page", "sheet"):
        for text in ("text", "quiet", "accent", "bad"):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        for mark in ("edge", "bar", "warn-edge", *(f"series-{number}" for number in range(svg.COLOURS))):
            assert contrast(colour[mark], colour[ground]) >= 3, (mark, ground)
    assert contrast(colour["text"], colour["warn-page"]) >= 4.5
