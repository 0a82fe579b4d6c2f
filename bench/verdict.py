"""What the figures say in words: whether they can be trusted, what bounds the speed, and who is faster."""

import statistics
from dataclasses import dataclass

from .gpu import POWER_LIMIT, POWER_REASON
from .results import Case, DeviceTimes, GpuLoad, Peer, Results
from .stats import judge

OTHERS_LIMIT = 0.05  # of all CPU time, which other processes may use
OUTSIDE_LIMIT = 0.01  # of a score's time, which may be spent outside the networks
OVERHEAD_LIMIT = 0.005  # of computing, which the benchmark's own clocks may take
LAUNCH_LIMIT = 0.8  # of the GPU's time, which the host may take to launch graphs; trtexec's limit
IDLE_LIMIT = 0.03  # of a score's time, for which the GPU may be idle
HELD_LIMIT = 0.01  # of the time, for which a limit may lower the GPU's clocks


@dataclass(frozen=True)
class Verdict:
    """`problems` is empty if the figures are stable; `remarks` hold either way."""

    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """The verdict, a sentence a line."""
        head = "Stable." if not self.problems else "NOT STABLE: do not quote these figures."
        return (head, *self.problems, *self.remarks)


@dataclass(frozen=True)
class Ratio:
    """How much longer a peer takes than we do on one case; only of peers whose scores agree with ours."""

    peer: str
    case: str
    samples: tuple[float, ...]  # of neighbouring scores of the same image

    @property
    def times(self) -> float:
        """The median."""
        return statistics.median(self.samples)


def judge_results(results: Results) -> Verdict:
    """Return the verdict on all that was measured."""
    problems = [] if results.measured else ["Nothing was measured."]
    for case in results.measured:
        kinds = {"computing": case.stability, "files in, scores out": judge(case.end_to_end)}
        problems += [f"{case.name}, {kind}: {text}." for kind, found in kinds.items() for text in found.problems]
    for ratio in ratios(results):
        stability = judge(ratio.samples)
        problems += [f"{ratio.case}, {ratio.peer} over ours: {text}." for text in stability.problems]
    load = results.load
    if load.others is not None and load.others > OTHERS_LIMIT:
        problems.append(f"Other processes used {load.others:.0%} of the CPUs: stop them, or use a quieter machine.")
    if load.throttled:
        problems.append(f"A thermal limit or a CPU quota held the CPUs back {load.throttled} times.")
    problems += _of_gpu(results)
    if results.overhead is not None and results.overhead > OVERHEAD_LIMIT:
        problems.append(f"The benchmark's own clocks took {results.overhead:.1%} of computing: use larger images.")
    if results.interrupted:
        problems.append("The benchmark was interrupted: this is what it had measured.")
    return Verdict(tuple(problems), tuple(_remarks(results)))


def ratios(results: Results) -> list[Ratio]:
    """Return the ratios of all peers whose scores agree; the first peer is ours."""
    if not results.peers:
        return []
    ours, *peers = results.peers
    samples = {case.case: case.seconds for case in ours.cases}
    return [
        Ratio(peer.name, case.case, tuple(b / a for a, b in pairs))
        for peer in peers
        if peer.problem is None
        for case in peer.cases
        if (pairs := list(zip(samples.get(case.case, ()), case.seconds, strict=False)))
    ]


def _remarks(results: Results) -> list[str]:
    remarks = []
    if results.measured:
        case = results.measured[0]
        if not case.stability.problems:
            remarks.append(
                f"Medians of two such runs should differ by less than {max(case.stability.repeat, 1e-3):.1%}."
            )
        remarks += _of_case(results, case)
    if results.gpu and (power := _of_power(results.gpu.load)):
        remarks.append(power)
    remarks += [
        f"{case.name}: {text}" for case in results.measured if case.device for text in _limits(case, case.device)
    ]
    if found := ratios(results):
        remarks.append(_of_peers(results.peers, found))
    if not results.engine.trained:
        remarks.append("The engine is not trained: its times are real, its scores mean nothing.")
    return remarks


def _of_gpu(results: Results) -> list[str]:
    """Return the reasons not to trust the figures of a GPU."""
    problems = [f"{case.name}: {note}." for case in results.measured if case.device for note in case.device.notes]
    if not results.gpu:
        return problems
    load = results.gpu.load
    if load.others:
        others = ", ".join(load.others)
        problems.append(f"Other processes computed on the GPU: {others}. Stop them, or use another GPU.")
    held = {limit: share for limit, share in _held(load).items() if limit != POWER_LIMIT}
    problems += [
        f"The GPU's {limit} held its clocks back for {share:.0%} of the time." for limit, share in held.items()
    ]
    reasons = [reason for reason in load.reasons if reason != POWER_REASON]
    if reasons and not held:
        problems.append(f"The GPU's clocks were not at their fastest: {', '.join(reasons)}.")
    return problems


def _of_power(load: GpuLoad) -> str | None:
    """Return a remark on the power limit. Much arithmetic brings every GPU there: no reason to doubt figures."""
    share = _held(load).get(POWER_LIMIT)
    if share is None and POWER_REASON not in load.reasons:
        return None
    when = "at times" if share is None else f"for {share:.0%} of the time"
    return f"The GPU's {POWER_LIMIT} held its clocks back {when}, as it does under a full load."


def _held(load: GpuLoad) -> dict[str, float]:
    """Return each limit that held the clocks back for long enough to matter, and its share of the time."""
    return {limit: share for limit, share in (load.held_back or {}).items() if share > HELD_LIMIT}


def _of_case(results: Results, case: Case) -> list[str]:
    remarks = []
    name, seconds = max(case.stages.items(), key=lambda item: statistics.median(item[1]))
    text = f"{name} takes {statistics.median(seconds) / statistics.median(case.whole):.0%} of "
    text += "the GPU's time" if case.device else "a score"
    rate = case.gflops(name)
    if rate is not None and results.roof:
        gflops, gbs = results.roof
        bound = "arithmetic" if case.work[name].intensity > gflops / gbs else "memory"
        peaks = {"matrix product's rate": results.mfu(rate), "data sheet's peak in fp16": results.sheet_mfu(rate)}
        shares = ", ".join(f"{share:.0%} of the {peak}" for peak, share in peaks.items() if share is not None)
        text += f" and runs at {shares}; {bound} bounds it"
    remarks.append(f"{text}.")
    if (outside := case.outside) > OUTSIDE_LIMIT:
        of_host = f"Host-bound in part: {outside:.1%} of a score's time is spent outside the networks."
        of_gpu = f"Noise, sampler, crops and copies take {outside:.1%} of the GPU's time."
        remarks.append(of_gpu if case.device else of_host)
    if case.without_graph:
        remarks.append(f"Without CUDA graphs computing takes {case.without_graph:.2f} times as long.")
    if (more := statistics.median(case.end_to_end) / statistics.median(case.compute) - 1) > OUTSIDE_LIMIT:
        remarks.append(f"Reading files costs time: end to end takes {more:.1%} longer than computing.")
    return remarks


def _limits(case: Case, times: DeviceTimes) -> list[str]:
    """Return what keeps a GPU from its work; trtexec warns of the first two.

    Launching is judged only with graphs: without them its time includes waiting (`DeviceTimes.launching`).
    """
    remarks = []
    (launching, _), busy = times.launching, statistics.median(times.busy)
    if launching and (enqueue := statistics.median(launching)) > LAUNCH_LIMIT * busy:
        remarks.append(f"launch-bound, as the host takes {enqueue / busy:.0%} of the GPU's time to launch its work.")
    moving = [up + down for up, down in zip(times.upload, times.download, strict=True)]
    if statistics.median(moving) >= statistics.median(case.computing):
        remarks.append("transfer-bound, as copies take as long as computing, or longer.")
    if (idle := case.idle or 0.0) > IDLE_LIMIT:
        remarks.append(f"the GPU has nothing to do for {idle:.1%} of a score.")
    if times.late_allocations:
        remarks.append(f"it allocated memory {times.late_allocations} times after the warm-up.")
    return remarks


def _of_peers(peers: tuple[Peer, ...], found: list[Ratio]) -> str:
    precise = {peer.name for peer in peers if peer.precision == peers[0].precision}
    best = min((r for r in found if r.peer in precise), key=lambda r: r.times, default=None)
    if best is None:
        return "No peer of equal precision agrees with our scores."
    if best.times >= 1:
        return f"No peer of equal precision is faster; the best, {best.peer}, takes {best.times:.2f} times as long."
    return f"{best.peer} is faster at equal precision: it takes {best.times:.2f} of our time ({best.case})."
