"""The HTML of a report: its head, one card per image, its end. Texts and numbers; no files, no pixels."""

import base64
import bisect
import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Template

from ... import __version__
from ...engine.manifest import Manifest, StageName
from ...engine.reference import opinion_text, percent_text
from ...engine.schedule import Kind
from ..results import WORDS_EXPLAINED, CropScore, Failure, Mode, Scale, Score, words_text
from .frame import asset, policy
from .heatmap import COLOURS, Heatmap, palette, to_png
from .histogram import Histogram, make_histogram, strip, to_svg, to_table
from .labels import make_labels
from .markup import Html, join, table, tag, visible

_MAX_CROP_ROWS = 64
_IMAGES_HERE = "<!-- images -->"  # where the template is cut
_SPACE = Html(" ")
_MEAN = ("The score is the mean over the crops.", "It is the mean over the crops.", "Both are means over the crops.")
_MODES = {Mode.WHOLE: "as a whole", Mode.TILE: "in overlapping tiles", Mode.CROP: "crop by crop"}


@dataclass(frozen=True)
class Collected:
    """All results of a report without their pictures, in the order they came."""

    results: tuple[Score | Failure, ...]
    scales: dict[str, tuple[float, float]]  # what the colours of each kind of map run over
    side: int  # longest side of the pictures, pixels

    @cached_property
    def scores(self) -> tuple[Score, ...]:
        """The images that were scored."""
        return tuple(result for result in self.results if isinstance(result, Score))

    @cached_property
    def failures(self) -> tuple[Failure, ...]:
        """The images that were not."""
        return tuple(result for result in self.results if isinstance(result, Failure))

    @cached_property
    def sorted_scores(self) -> tuple[float, ...]:
        """The scores that can be drawn and ranked, in rising order."""
        return tuple(sorted(s.score for s in self.scores if abs(s.score) < 1e100))  # false for NaN as well

    @cached_property
    def histogram(self) -> Histogram | None:
        """The distribution of scores."""
        return make_histogram(self.sorted_scores) if self.sorted_scores else None


@dataclass(frozen=True)
class Live:
    """What a page has that begins without images, and gets them one by one from a service."""

    lead: str
    top: Html  # in the place of the summary
    style: str
    script: str
    closing: str


class Page:
    """Renders the parts of one report."""

    def __init__(self, manifest: Manifest, title: str, scale: Scale = Scale.RAW, steps: int | None = None) -> None:
        self.manifest, self.title, self.scale = manifest, title, scale
        self.labels = make_labels(manifest, steps)
        self._restores = len(manifest.kinds) > 1
        self._branches = [name.upper() for name in (StageName.VCG, StageName.VDA) if manifest.stage(name)]

    def frame(self, collected: Collected, live: Live | None = None) -> tuple[str, str]:
        """Return the page before the first card and after the last."""
        style, script = asset("page.css") + asset("report.css"), asset("report.js")
        if live:
            style, script = style + live.style, script + live.script
        style += f".ramp{{background:linear-gradient(90deg,{','.join(_hex_colours(every=16))})}}\n"
        now = datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes").removesuffix("+00:00")
        text = Template(asset("report.html")).substitute(
            policy=policy(style, script, asks=live is not None),
            title=join(self.title),
            style=style,
            script=script,
            lead=join(live.lead if live else f"{_count(collected)}. Written {now} UTC."),
            live=" data-live" if live else "",
            warnings=self._warnings(collected),
            top=live.top if live else self._summary(collected),
            reading=self._reading(collected),
            sort_options=self._sort_options(),
            failures=_failures(collected),
            table=self._table(collected),
            colours="".join(_hex_colours()).replace("#", ""),
            engine=self._engine(),
            version=join(__version__),
            closing=join(live.closing if live else "This page is complete in itself and loads nothing from anywhere."),
        )
        before, _, after = text.partition(_IMAGES_HERE)
        return before, after

    def card(self, number: int, score: Score, collected: Collected, facts: Html, pictures: Html, details: Html) -> Html:
        """Return all about one image; `number` counts images from 1."""
        folder, name = split_source(score.source)
        rank = len(collected.sorted_scores) - bisect.bisect_right(collected.sorted_scores, score.score) + 1
        ranked = self.manifest.score.trained and abs(score.score) < 1e100 and len(collected.sorted_scores) > 1
        # The card of an untrained engine says so by itself: it may be cut out of the page.
        place = f"rank {rank} of {len(collected.sorted_scores)}" if ranked else None
        place = place if self.manifest.score.trained else "untrained: meaningless"
        path = tag("p", tag("bdi", folder), class_="folder") if folder else None
        name_, text = self._on_scales(score.score)[self.scale]
        if self.scale is not Scale.RAW:
            place = f"{name_.lower()}, {place}" if place else name_.lower()
        number_ = tag("span", f"{name_} ", class_="unseen"), tag("b", text), _SPACE
        shown = tag("p", *number_, tag("small", place) if place else None, class_="score")
        among = strip(collected.histogram, score.score) if ranked and collected.histogram else None
        none = tag("p", "No pictures: this score is from an earlier run.", class_="quiet")
        return tag(
            "article",
            tag(
                "header",
                tag("div", tag("h3", tag("bdi", name)), path, class_="name"),
                tag("div", shown, among, class_="verdict"),
            ),
            facts,
            tag("div", pictures, class_="pictures") if pictures else none,
            details,
            class_="card",
            id=f"image-{number}",
            data_order=number,
            data_name=visible(score.source),
            **{f"data_{key}": _sortable(getattr(score, key)) for key in ("score", "vcg", "vda", "spread", "seconds")},
            data_width=score.width,
            data_height=score.height,
        )

    def facts(self, score: Score) -> Html:
        """Return the numbers of one image besides its score, and what was done to it before scoring."""
        facts = [fact for scale, fact in self._on_scales(score.score).items() if scale is not self.scale]
        facts += [(name, number_text(value)) for name, value in _branch_scores(score)]
        facts += [("Looks like", words_text(score.probabilities))] if score.probabilities else []
        if score.spread is not None:
            facts.append((f"Spread over {len(score.seeds)} seeds", number_text(score.spread)))
        facts.append(("Size", f"{score.width} × {score.height}"))
        facts += [("Crops", str(len(score.crops)))] if score.crops else []  # the record of an earlier run has none
        facts.append(("Time", seconds_text(score.seconds)))
        notes = tag("ul", *(tag("li", note) for note in score.notes), class_="notes") if score.notes else None
        return join(_definitions(facts, "facts"), notes)

    def photo(self, source: str, kind: Kind, webp: bytes, width: int, height: int) -> Html:
        """Return the figure of an image or of a restoration."""
        label = self.labels[kind]
        image = _image("webp", webp, width, height, f"{label.plain}, {label.short}, of {source}")
        caption = tag("figcaption", tag("b", label.title), _SPACE, tag("span", label.short))
        return tag("figure", image, caption, data_kind=kind)

    def heatmap(
        self,
        source: str,
        name: str,
        heatmap: Heatmap,
        scale: tuple[float, float],
        width: int,
        height: int,
        word: str | None = None,
    ) -> Html:
        """Return the figure of a map with its legend, in colours that run over `scale`, as large as a photograph.

        `word`: whose probabilities it has.
        """
        label, (low, high) = self.labels[name], scale
        unit = f"{word}, {label.short}" if word else label.short
        span = f"from {short(heatmap.low)} to {short(heatmap.high)}"
        png = to_png(heatmap, palette(heatmap, low, high))
        image = _image("png", png, width, height, f"{label.plain} of {source}, {span}, {unit}")
        legend = tag(
            "span",
            tag("span", short(low), class_="low"),
            tag("span", class_="ramp", aria_hidden="true"),
            tag("span", short(high), class_="high"),
            class_="legend",
        )
        caption = tag("figcaption", tag("b", label.title), _SPACE, tag("span", unit), legend)
        ends = {"data_low": f"{heatmap.low:.9g}", "data_high": f"{heatmap.high:.9g}"}
        return tag("figure", tag("span", image, class_="base"), caption, class_="map", data_kind=name, **ends)

    def details(self, score: Score) -> Html:
        """Return how one image was scored, folded away."""
        facts = [
            *([("Restored", _MODES[score.mode])] if self._restores else []),
            ("Seeds" if len(score.seeds) > 1 else "Seed", _seeds(score.seeds)),
            ("Engine", score.engine),
            ("Backend", score.backend),
            *((name.capitalize(), _all_words(found)) for name, found in (score.probabilities or {}).items()),
            ("Pixels", f"SHA-256 {score.digest}"),
        ]
        columns = ["Top", "Left", "Score", *(name for name, _ in _branch_scores(score))]
        columns += ["Looks like"] if score.probabilities else []
        rows = (
            [
                *(f"{crop.top}", f"{crop.left}", number_text(crop.score)),
                *(number_text(v) for _, v in _branch_scores(crop)),
                *([words_text(crop.probabilities)] if score.probabilities else []),
            ]
            for crop in score.crops[:_MAX_CROP_ROWS]
        )
        size = self.manifest.crop.size
        count = f"{len(score.crops)} {'crop' if len(score.crops) == 1 else 'crops'} of {size} × {size} pixels"
        more = len(score.crops) - _MAX_CROP_ROWS
        count += f"; the last {more} are not listed" if more > 0 else ""
        return tag(
            "details",
            tag("summary", "How it was scored"),
            _definitions(facts, "small"),
            table(columns, (tag("tr", *(tag("td", cell) for cell in row)) for row in rows), count)
            if score.crops
            else None,
        )

    def _on_scales(self, score: float) -> dict[Scale, tuple[str, str]]:
        """Return name and text of a score on every scale that the engine knows."""
        meaning, texts = self.manifest.score, {Scale.RAW: ("Score", number_text(score))}
        if meaning.reference:
            texts[Scale.PERCENTILE] = ("Percentile", percent_text(meaning.percentile(score)))
            opinion = f"{opinion_text(meaning.opinion(score))} ± {meaning.reference.error:.1f}"
            texts[Scale.MOS] = ("Opinion", opinion)
        return texts

    def _warnings(self, collected: Collected) -> Html:
        warnings = {}
        if not self.manifest.score.trained:
            text = " Some of its weights are random. Scores and maps only show that the pipeline runs."
            warnings["This engine is untrained: its numbers mean nothing."] = text
        engines = sorted({score.engine for score in collected.scores})
        if len(engines) > 1:
            warnings["Results of different engines."] = f" Their scores cannot be compared: {', '.join(engines)}."
        parts = (tag("p", tag("strong", head), text) for head, text in warnings.items())
        return tag("div", *parts, class_="warning", role="note") if warnings else Html()

    def _summary(self, collected: Collected) -> Html:
        distribution = tag("div", tag("h3", "Distribution of scores"), _distribution(collected), class_="distribution")
        halves = tag("div", tag("div", self._facts(collected)), distribution, class_="halves")
        title = tag("h2", "Summary", id="summary-title")
        return tag("section", title, halves, class_="summary", aria_labelledby="summary-title")

    def _facts(self, collected: Collected) -> Html:
        """The numbers at the top: first what came out, then how."""
        scores = collected.sorted_scores
        total = sum(score.seconds for score in collected.scores)
        came_out = [("Images", str(len(collected.scores)))]
        if collected.failures:
            came_out.append(("Failures", str(len(collected.failures))))
        if scores:
            came_out += [
                ("Median score", number_text(statistics.median(scores))),
                ("Mean score", number_text(statistics.fmean(scores))),
                ("Lowest", number_text(scores[0])),
                ("Highest", number_text(scores[-1])),
            ]
        if collected.scores:
            came_out.append(("Time per image", seconds_text(total / len(collected.scores))))
        size = self.manifest.crop.size
        how = [
            ("Model", self.manifest.model_name),
            ("Engine", ", ".join(sorted({score.engine for score in collected.scores}) or [self.manifest.engine_id])),
            ("Backend", "; ".join(sorted({score.backend for score in collected.scores}))),
            ("Restored", "; ".join(sorted({_MODES[s.mode] for s in collected.scores})) if self._restores else ""),
            ("Seeds", "; ".join(sorted({_seeds(score.seeds) for score in collected.scores}))),
            ("Crop size", f"{size} × {size}"),
        ]
        return join(_definitions(came_out, "tiles"), _definitions([fact for fact in how if fact[1]], "small"))

    def _reading(self, collected: Collected) -> Html:
        """What the numbers and pictures mean."""
        m = self.manifest.score
        better = "Higher is better." if m.higher_is_better else "Lower is better."
        low, high = short(m.minimum), short(m.nominal_maximum)
        span = f"No score is below {low}. The best images get about {high}; some get more."
        if m.minimum or not m.higher_is_better or not self._branches:  # a branch has no score below 0
            span = f"The labels of training go from {low} to {high}; a score may lie outside."
        guided = ", guided by its restorations" if self._restores else ""
        texts = {
            "VCG": f"VCG: a vision transformer rates every place of the image{guided}. ",
            "VDA": "VDA: a ResNet judges how the image differs from each restoration. ",
        }
        weights = {"VCG": m.vcg_weight, "VDA": m.vda_weight}
        total = " + ".join(
            name if weights[name] == 1 else f"{short(weights[name])} × {name}" for name in self._branches
        )
        terms = [
            tag("div", tag("dt", label.title), tag("dd", label.about), data_about=key)
            for key, label in self.labels.items()
        ]
        maps = tag(
            "p",
            "Maps run from dark violet (low) to yellow (high): ",
            tag("span", class_="ramp", aria_hidden="true"),
            " The numbers beside a map are the values at the two ends; values beyond them have the colour of the end. "
            "All images share one range for each kind of map, so you can compare their colours. Hatched places are "
            "outside all crops: no crop shows them to the model. If several seeds were averaged, pictures and maps are "
            f"those of the first. Pictures are reduced to at most {collected.side} pixels and compressed: judge fine "
            "noise and blur from the files, not from this page.",
        )
        return join(
            tag("p", tag("strong", better), f" {span} {m.meaning}"),
            tag("p", " ".join(m.reference.explained)) if m.reference else None,
            tag("p", WORDS_EXPLAINED) if self.manifest.flow.probabilities else None,
            tag(
                "p",
                f"Score = {total}. " if total else "",
                *(texts[name] for name in self._branches),
                _MEAN[len(self._branches)],
            ),
            # Without pictures there is nothing to explain about them.
            join(tag("dl", *terms, class_="terms"), maps) if collected.scales else None,
        )

    def _sort_options(self) -> Html:
        options = [("order", "File order"), ("score", "Score"), ("name", "Name")]
        options += [(name.lower(), name) for name in self._branches]
        options += [("spread", "Spread"), ("seconds", "Time")]
        return join(*(tag("option", text, value=value) for value, text in options))

    def _table(self, collected: Collected) -> Html:
        """All numbers, one row per image."""
        if not collected.scores:
            return Html()
        columns = [("name", "Image"), ("score", "Score")]
        columns += [(name.lower(), name) for name in self._branches]
        columns += [(scale.value, name) for scale, (name, _) in self._on_scales(0.0).items() if scale is not Scale.RAW]
        columns += [("words", "Looks like")] if self.manifest.flow.probabilities else []
        columns += [("spread", "Spread"), ("size", "Size"), ("seconds", "Time")]
        rows = []
        for number, score in enumerate(collected.scores, start=1):
            texts = {key: number_text(getattr(score, key)) for key in ("score", "vcg", "vda", "spread")}
            texts |= {scale.value: text for scale, (_, text) in self._on_scales(score.score).items()}
            texts |= {"words": words_text(score.probabilities) or "–"}
            texts |= {"size": f"{score.width} × {score.height}", "seconds": seconds_text(score.seconds)}
            link = tag("a", tag("bdi", score.source), href=f"#image-{number}")
            cells = [tag("td", texts[key], class_=key) for key, _ in columns[1:]]
            rows.append(tag("tr", tag("th", link, scope="row"), *cells, data_order=number))
        head = [tag("th", text, scope="col", class_=key, data_key=key) for key, text in columns]
        return tag(
            "details",
            tag("summary", "Table of all scores"),
            tag(
                "div",
                table(head, rows, id="table"),
                class_="scroll",
                tabindex=0,
                role="region",
                aria_label="Table of all scores",
            ),
        )

    def _engine(self) -> Html:
        """Where the engine comes from."""
        p = self.manifest.provenance
        facts = [
            ("Engine", self.manifest.engine_id),
            ("Exported", p.created),
            ("With", ", ".join(f"{name} {version}" for name, version in p.versions.items())),
            *((f"Weights: {s.role}", f"{s.name}, {s.format}, SHA-256 {s.sha256}") for s in p.sources),
            *(("Note", note) for note in p.notes),
            *([("Accepted drift", f"differs from PyTorch in {self.manifest.drift}")] if self.manifest.drift else []),
        ]
        return _definitions(facts, "small")


def short(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:.3g}".replace("-", "−")


def number_text(value: float | None) -> str:
    """Return a score with four decimals, a dash where there is none."""
    if value is None:
        return "–"
    return (f"{value:.4f}" if abs(value) < 1e5 or not math.isfinite(value) else f"{value:.4e}").replace("-", "−")


def seconds_text(seconds: float) -> str:
    """Return a duration with its unit."""
    return (
        f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
    )


def split_source(source: str) -> tuple[str, str]:
    """Return folder and name; the folder keeps its last separator."""
    cut = max(source.rfind("/"), source.rfind("\\")) + 1
    return (source[:cut], source[cut:]) if cut < len(source) else ("", source)


def _count(collected: Collected) -> str:
    scored, failed = len(collected.scores), len(collected.failures)
    text = f"{scored} {'image' if scored == 1 else 'images'}"
    return f"{text} and {failed} {'failure' if failed == 1 else 'failures'}" if failed else text


def _distribution(collected: Collected) -> Html:
    if collected.histogram is None:
        return tag("p", "No image was scored.", class_="quiet")
    return join(
        to_svg(collected.histogram),
        tag("p", "Score. Point at a bar for its count.", class_="quiet", id="bar", aria_live="polite"),
        tag("details", tag("summary", "The same as a table"), to_table(collected.histogram)),
    )


def _failures(collected: Collected) -> Html:
    if not collected.failures:
        return Html()
    rows = [
        tag("tr", tag("th", tag("bdi", f.source), scope="row"), tag("td", f.error), data_name=visible(f.source))
        for f in collected.failures
    ]
    return tag(
        "section",
        tag("h2", "Could not be scored", id="failures-title"),
        table(["File", "Error"], rows),
        id="failures",
        aria_labelledby="failures-title",
    )


def _branch_scores(score: Score | CropScore) -> list[tuple[str, float]]:
    """Return the scores of the branches that an engine has."""
    return [(name, value) for name, value in (("VCG", score.vcg), ("VDA", score.vda)) if value is not None]


def _all_words(probabilities: Mapping[str, float]) -> str:
    """Return all words that are not next to impossible, the most probable first."""
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    return ", ".join(f"{word} {p:.2f}" for word, p in ranked if p >= 0.005)


def _definitions(facts: Sequence[tuple[str, str]], style: str) -> Html:
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", text)) for term, text in facts), class_=style)


def _image(format_: str, data: bytes, width: int, height: int, alt: str) -> Html:
    source = Html(f"data:image/{format_};base64,{base64.b64encode(data).decode()}")
    return tag("img", src=source, width=width, height=height, alt=alt, loading="lazy", decoding="async")


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} … {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _sortable(value: float | None) -> str | None:
    """Return a number for scripts to sort by; nothing for what has no order."""
    return f"{value:.9g}" if value is not None and math.isfinite(value) else None


def _hex_colours(every: int = 1) -> list[str]:
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in [*COLOURS[:-1:every], COLOURS[-1]]]
