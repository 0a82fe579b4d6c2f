"""Peers that are missing, crash, hang or disagree are reported, and the rest goes on."""

from pathlib import Path

import pytest

from diffiqa import BackendError
from diffiqa.bench.contenders import OURS, PEERS, Contender, Ground, Place
from diffiqa.bench.peers import Contest, Entrant, Out
from diffiqa.bench.results import Peer
from diffiqa.bench.workload import Workload
from diffiqa.runtime.backends import OnnxRuntime
from diffiqa.runtime.results import Options
from diffiqa.tests.bench import fake_contenders as fakes

GROUND = Ground(Path("engine"), None)
WORKLOAD = Workload((Path("a.png"), Path("b.png")), 32, 32, Options(crops=1))
GOOD = Contender("good", "fp32", fakes.good)


def contest(*contenders: Contender) -> dict[str, Peer]:
    run = Contest(contenders, GROUND, [("a case", WORKLOAD)], rounds=3, timeout=60)
    run.run()
    return {peer.name: peer for peer in run.found}


def test_whatever_becomes_of_a_peer_is_reported_and_the_others_are_measured() -> None:
    found = contest(
        GOOD,
        Contender("missing", "fp32", fakes.missing),
        Contender("refuses", "fp32", fakes.refuses),
        Contender("dies", "fp32", fakes.dies),
        Contender("differs", "fp32", fakes.differs, weights=True),
        Contender("sways", "fp32", fakes.sways),
        Contender("no number", "fp32", fakes.no_number),
        Contender("also good", "fp32", fakes.good),
    )
    assert found["missing"].skipped
    assert found["missing"].problem == "fake is not installed"
    assert found["refuses"].problem == "ValueError: no such device"
    assert found["dies"].problem == "its process died with exit code 7: terminate called"
    assert found["differs"].problem == (
        "its scores differ from ours by 1.0e-01, 1.0e-04 is allowed; is --ckpt what the engine was exported from?"
    )
    assert found["sways"].problem == "its scores differ from ours by 1.0e-01, 1.0e-04 is allowed"
    assert "differ" in (found["no number"].problem or "")
    assert not any(found[name].skipped for name in ("refuses", "dies", "differs", "no number"))
    assert not any(case.seconds for name in ("dies", "differs", "sways", "no number") for case in found[name].cases)
    for name in ("good", "also good"):
        assert found[name].problem is None
        assert len(found[name].cases[0].seconds) == 6  # three rounds of two images
        assert found[name].cases[0].drift == 0


def test_reduced_precision_may_change_a_score_by_the_spread_between_seeds() -> None:
    found = contest(
        GOOD,  # 0.01 between neighbouring seeds
        Contender("within", "bf16", fakes.rounds_a_little),
        Contender("beyond", "bf16", fakes.differs),
    )
    assert found["within"].problem is None
    assert found["within"].cases[0].allowed == pytest.approx(0.01)
    assert found["within"].cases[0].drift == pytest.approx(1e-3)
    assert "1.0e-01" in (found["beyond"].problem or "")
    assert len(found["beyond"].cases[0].seconds) == 6  # timed, for those who would accept such scores


def test_where_ours_rounds_no_peer_has_to_be_exact() -> None:
    found = contest(
        Contender("ours", "fp16", fakes.good),
        Contender("fp32", "fp32", fakes.rounds_a_little),
        Contender("beyond", "fp32", fakes.differs, weights=True),
    )
    assert found["fp32"].problem is None
    assert found["fp32"].cases[0].allowed == pytest.approx(0.01)
    assert found["beyond"].problem == "its scores differ from ours by 1.0e-01, 1.0e-02 is allowed"
    assert len(found["beyond"].cases[0].seconds) == 6


def test_nothing_is_compared_when_ours_fails() -> None:
    with pytest.raises(BackendError, match="ValueError: no such device"):
        contest(Contender("ours", "fp32", fakes.refuses), GOOD)


def test_a_peer_that_hangs_is_given_up_and_its_process_ended(tmp_path: Path) -> None:
    entrant = Entrant(Contender("hangs", "fp32", fakes.hangs), tmp_path / "log", timeout=60)
    entrant.start(GROUND)
    entrant.timeout = 0.05
    with pytest.raises(Out, match=r"no answer within 0\.05 seconds"):
        entrant.ask(Path("a.png"), Options(crops=1))
    entrant.leave("slow")
    assert entrant.found.problem == "slow"


def test_images_too_large_for_a_peer_cost_it_their_case_alone(tiny_engine: Path) -> None:
    said: list[str] = []
    large = Workload((Path("c.png"),), 700, 800, Options(crops=1))
    untiled = Contender("untiled", "fp32", fakes.good, untiled=(Place.CPU,))
    elsewhere = Contender("untiled on a GPU", "fp32", fakes.good, untiled=(Place.GPU,))
    workloads = [("large", large), ("small", WORKLOAD)]
    run = Contest(
        [GOOD, untiled, elsewhere],
        Ground(tiny_engine, None, OnnxRuntime(1)),
        workloads,
        rounds=2,
        timeout=60,
        progress=said.append,
    )
    run.run()
    ours, found, other = run.found
    assert found.problem is None
    assert [(case.case, len(case.seconds)) for case in found.cases] == [("small", 4)]
    assert [[case.case for case in peer.cases] for peer in (ours, other)] == [["large", "small"]] * 2
    assert "large: untiled is left out: it cannot restore images in tiles, as ours does these" in said
    assert not any(text.startswith("small: untiled is left out") for text in said)


def test_a_peer_is_skipped_whose_images_are_all_too_large(tiny_engine: Path) -> None:
    large = Workload((Path("c.png"),), 700, 800, Options(crops=1))
    untiled = Contender("untiled", "fp32", fakes.refuses, untiled=(Place.CPU,))  # nor is it started
    run = Contest([GOOD, untiled], Ground(tiny_engine, None, OnnxRuntime(1)), [("large", large)], rounds=1, timeout=60)
    run.run()
    found = run.found[1]
    assert (found.skipped, found.cases) == (True, ())
    assert found.problem == "it cannot restore images in tiles, as ours does all of these"


def test_peers_have_names_of_their_own() -> None:
    names = [contender.name for contender in (OURS, *PEERS)]
    assert len(set(names)) == len(names)


def test_weights_are_needed_for_pytorch_alone_and_said_by_name() -> None:
    peer = next(contender for contender in PEERS if contender.name == "torch eager")
    run = Contest([GOOD, peer], GROUND, [("a case", WORKLOAD)], rounds=1, timeout=120)
    run.run()
    assert run.found[1].skipped
    assert run.found[1].problem == "PyTorch needs the weights: give --ckpt FILE"
