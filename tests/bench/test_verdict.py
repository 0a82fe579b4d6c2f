"""The verdict in words: every reason not to trust figures, and how ours compare."""

from dataclasses import replace

import pytest

from diffiqa.bench.report import number, percent, table, to_markdown
from diffiqa.bench.results import Case, Ceilings, Engine, Load, Machine, Peer, PeerCase, Results, Work
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
        ({"load": Load(3.0, 3.0, 0.4, None)}, "Others used 40% of the CPUs"),
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
