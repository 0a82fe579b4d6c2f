"""The verdict in words: every reason not to trust figures, and how ours compare."""

from dataclasses import replace

import pytest

from diffiqa.bench.report import number, percent, table, to_markdown
from diffiqa.bench.results import Case, Ceilings, Engine, Load, Machine, Peer, PeerCase, Results, Soak, Start, Work
from diffiqa.bench.verdict import judge_results, ratios

SAMPLES = tuple(1 + 0.001 * (i % 3) for i in range(12))
CASE = Case(
    height=224,
    width=224,
    crops=1,
    steps=2,
    workers=1,
    mode="whole",
    images=("a.png",),
    end_to_end=SAMPLES,
    compute=SAMPLES,
    stages={"unet": tuple(0.995 * s for s in SAMPLES)},
    step_seconds=(tuple(0.49 * s for s in SAMPLES), tuple(0.5 * s for s in SAMPLES)),
    work={"unet": Work(2, 80.0, 500.0)},
    uncounted=None,
)


def peer(name: str, factor: float, *, precision: str = "fp32", problem: str | None = None) -> Peer:
    case = PeerCase(CASE.name, tuple(factor * s for s in SAMPLES), 1e-6, 1e-4)
    return Peer(name, precision, f"{name} 1.0", problem, False, 1.0, 100.0, (case,))


def drifting(by: float) -> Peer:
    """Return a peer that takes longer in the later half, compared with ours."""
    slow = peer("slow", 2.0)
    seconds = tuple(2 * s * (1 + by * (i >= 6)) for i, s in enumerate(SAMPLES))
    return replace(slow, cases=(replace(slow.cases[0], seconds=seconds),))


DRIFTING = drifting(0.025), drifting(0.035)

QUIET = Results(
    schema=1,
    created="2026-01-01T00:00:00+00:00",
    options={},
    interrupted=False,
    machine=Machine("a CPU", ("avx2",), 2, 2, 4096, "Linux", "3.11", {"numpy": "2"}, None),
    load=Load(0.1, 2.0, 0.01, 0),
    engine=Engine("0" * 16, "tiny", True, "onnxruntime", {}),
    ceilings=Ceilings((99.0, 100.0, 101.0), (10.0, 10.0)),
    cases=(CASE,),
    starts=(),
    peers=(peer("diffiqa", 1.0), peer("slow", 2.0), peer("rough", 0.5, precision="bf16")),
    soak=None,
    overhead=0.0001,
    left_out=(),
    not_measured={},
)


def test_quiet_figures_are_stable_and_say_what_bounds_them_and_who_is_faster() -> None:
    found = judge_results(QUIET)
    assert found.problems == ()
    text = " ".join(found.lines)
    assert text.startswith("Stable. Medians of two such runs should differ by less than 0.")
    assert "unet takes 100% of a score and runs at 80% of the matrix product's rate; arithmetic bounds it." in text
    assert "No peer of equal precision is faster; the best, slow, takes 2.00 times as long." in text


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"load": Load(3.0, 3.0, 0.4, None)}, "Other processes used 40% of the CPUs"),
        ({"load": Load(3.0, 3.0, None, 7)}, "A thermal limit or a CPU quota held the CPUs back 7 times"),
        ({"interrupted": True}, "The benchmark was interrupted"),
        ({"overhead": 0.01}, "own clocks took 1.0%"),
        ({"cases": ()}, "Nothing was measured"),
        ({"cases": (replace(CASE, end_to_end=SAMPLES[:6] + tuple(1.1 * s for s in SAMPLES[6:])),)}, "later half"),
        ({"cases": (replace(CASE, end_to_end=SAMPLES[:3]),)}, "3 samples are too few"),
    ],
    ids=["busy", "throttled", "interrupted", "overhead", "nothing", "end to end drifts", "few"],
)
def test_every_reason_not_to_trust_figures_is_said(changed: dict[str, object], says: str) -> None:
    found = judge_results(replace(QUIET, **changed))  # type: ignore[arg-type]
    assert found.lines[0].startswith("NOT STABLE")
    assert any(says in problem for problem in found.problems), found.problems


@pytest.mark.parametrize(
    ("within", "beyond"),
    [
        ({"load": Load(3.0, 3.0, 0.049, None)}, {"load": Load(3.0, 3.0, 0.051, None)}),
        ({"overhead": 0.0049}, {"overhead": 0.0051}),
        (
            {"cases": (replace(CASE, compute=(*SAMPLES[:-1], 1.15)),)},
            {"cases": (replace(CASE, compute=(*SAMPLES[:-1], 1.2)),)},
        ),
        ({"peers": (peer("diffiqa", 1.0), DRIFTING[0])}, {"peers": (peer("diffiqa", 1.0), DRIFTING[1])}),
    ],
    ids=["others", "overhead", "variation", "ratio"],
)
def test_what_is_within_a_limit_is_no_problem(within: dict[str, object], beyond: dict[str, object]) -> None:
    assert judge_results(replace(QUIET, **within)).problems == ()  # type: ignore[arg-type]
    assert judge_results(replace(QUIET, **beyond)).problems != ()  # type: ignore[arg-type]


def test_how_much_of_a_score_passes_elsewhere_is_said_from_a_hundredth_on() -> None:
    def remarks(share: float) -> str:
        inside = {"unet": tuple((1 - share) * s for s in SAMPLES)}
        files = tuple((1 + share) * s for s in SAMPLES)
        return " ".join(judge_results(replace(QUIET, cases=(replace(CASE, stages=inside, end_to_end=files),))).remarks)

    assert "Host-bound" not in remarks(0.009)
    assert "end to end takes" not in remarks(0.009)
    assert "Host-bound in part: 1.1% of a score's time is spent outside the networks." in remarks(0.011)
    assert "end to end takes 1.1% longer than computing." in remarks(0.011)


def test_figures_are_medians_of_samples_whatever_one_of_them_is() -> None:
    """One sample of twelve takes a hundred times as long: means would show it, medians do not."""
    odd = (*SAMPLES[:-1], 100.0)
    case = replace(
        CASE,
        end_to_end=odd,
        compute=odd,
        stages={"unet": tuple(0.5 * s for s in odd)},
        step_seconds=(tuple(0.2 * s for s in odd), tuple(0.3 * s for s in odd)),
    )
    ours, slow = (
        replace(p, cases=(replace(p.cases[0], seconds=s),))
        for p, s in zip(QUIET.peers[:2], (SAMPLES, tuple(2 * s for s in odd)), strict=True)
    )
    start = Start(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 100.0)
    results = replace(
        QUIET,
        cases=(case,),
        peers=(ours, slow),
        starts=(start, start, replace(start, load=50.0, first_score=50.0)),
        soak=Soak((1.0,) * 5 + (1.0, 1.0, 1.0, 1.0, 90.0), ()),
    )
    text = to_markdown(results)
    assert "| 224×224 | 1 | 2 | 1 | 0.999 | 0.999 | 1.00 | 79.9 | 80% |" in text
    assert "| unet | 2 | 500 | 250 | 50% | 160 | 160% |" in text
    assert "| outside networks | – | 500 | – | 50% |" in text
    assert "| 250 | 200 | 250 | 290 | 299 | 200 |" in text  # a step
    assert "| 2,002 |" in text
    assert "| 2.00 |" in text
    assert "| loading the networks | 1,000 |" in text
    assert "| later half of them took | +0.0% |" in text


def test_a_faster_peer_is_named_and_one_that_disagrees_does_not_count() -> None:
    faster = (*QUIET.peers[:1], peer("quick", 0.8), peer("wrong", 0.1, problem="its scores differ"))
    results = replace(QUIET, peers=faster)
    assert [ratio.peer for ratio in ratios(results)] == ["quick"]
    assert any("quick is faster at equal precision: it takes 0.80" in line for line in judge_results(results).lines)
    assert "does not count: its scores differ" in to_markdown(results)


def test_numbers_keep_three_digits_and_tables_escape_bars() -> None:
    assert [number(v) for v in (0.012345, 1.2345, 123.45, 12345.6, 0, None)] == [
        "0.0123",
        "1.23",
        "123",
        "12,346",
        "0",
        "–",
    ]
    assert [percent(v) for v in (0.001, 0.5, None)] == ["0.1%", "50%", "–"]
    assert table(["a", "b"], [["x|y", "1.5"]]) == "| a | b |\n| --- | --: |\n| x\\|y | 1.5 |"
    assert table(["a"], []) == ""
