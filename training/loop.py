"""The optimisation loop of every training run: batches, checkpoints, resuming, logs, several processes.

The random numbers of step n come from generators made of (seed, purpose, n, place in the batch). No random state runs
along, so none is saved. A run that was killed and resumed takes the same steps, on a CPU bit for bit. The number of
loading threads changes nothing either.

A run's folder holds `checkpoint.pt` (all that resuming needs), `log.csv` and `validation.csv`.
"""

import contextlib
import csv
import datetime
import functools
import io
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.draws import Purpose, generator
from ..data.outputs import make_folder, write_file
from ..engine.atomic import replacing
from ..errors import CheckpointError, ConfigError, DiffiqaError, OutputError, UsageError
from .config import Optimisation, Precision, RunConfig, differences, digest, identity

FORMAT = 1
CHECKPOINT, LOG, VALIDATION = "checkpoint.pt", "log.csv", "validation.csv"
LOG_COLUMNS = ("step", "loss", "learning_rate", "seconds")
AHEAD = 3  # batches prepared while the network works
DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
# One process validates while the others wait in their next exchange.
PATIENCE = datetime.timedelta(hours=6)


class TrainingError(DiffiqaError):
    """A run that cannot go on: the loss is not finite."""


class Sample(NamedTuple):
    """One element of a batch: arrays that are stacked over the batch, and what it is in words."""

    arrays: tuple[npt.NDArray[np.float32], ...]
    name: str


class Verdict(NamedTuple):
    """What validation found: a row for `validation.csv`. With a `quality`, the run keeps its best weights by it."""

    row: dict[str, float]
    quality: float | None = None


class Task(Protocol):
    """What is trained, on what. `network` is all that is optimised, averaged and saved."""

    kind: str  # "restore", "pretrain" or "score"
    network: nn.Module

    def fingerprint(self) -> str:
        """Return a digest of the data."""

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return the parameters to train, each group with its multiple of the learning rate."""

    def train_mode(self) -> None:
        """Put the network into training mode; parts that are frozen stay in eval mode."""

    def sample(self, step: int, index: int) -> Sample:
        """Return an element of a batch, a function of its arguments alone; called by several threads."""

    def losses(self, network: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
        """Return the loss of each element (B,), float32; `network` is `self.network` or stands for it."""

    def validate(self, machine: "Machine") -> Verdict | None:
        """Judge `self.network`, which is in eval mode and has its averaged weights."""


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return generator(seed, Purpose.EPOCH, epoch).permutation(count)


def picked(seed: int, place: int, count: int) -> int:
    """Return which of `count` elements comes at a place: each once in every epoch, in a new order."""
    epoch, position = divmod(place, count)
    return int(_permutation(seed, epoch, count)[position])


@dataclass(frozen=True)
class Machine:
    """Where this process computes: its device, its place among `world` processes, what numbers it computes in."""

    device: torch.device
    precision: Precision = Precision.FP32
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def _silent(_text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Conduct:
    """How a run is carried out. Only the device changes its result, and only by rounding."""

    device: str | None = None  # None: a GPU if there is one
    resume: bool = False  # go on with the run that is in the folder
    threads: int = 2  # that prepare batches
    progress: Callable[[int, int, float, float], None] | None = None  # receives step, steps, loss and learning rate
    say: Callable[[str], None] = _silent  # receives remarks


QUIETLY = Conduct()


@contextlib.contextmanager
def open_machine(device: str | None, precision: Precision) -> Iterator[Machine]:
    """Choose the device (None: a GPU if there is one) and, under torchrun, join the other processes.

    Raises ConfigError for a device that is not there, or float16 without a GPU, where gradients cannot be scaled well.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"there is no device {name!r}: give cpu, cuda or cuda:N") from exc
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {name} was asked for, but torch sees no GPU")
        if ":" not in name:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    elif precision is Precision.FP16:
        raise ConfigError("precision fp16 needs a GPU; on the CPU use bf16 or fp32")
    if world == 1:
        yield Machine(place, precision)
        return
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Machine(place, precision, rank, world)
    finally:
        distributed.destroy_process_group()


def learning_rate(plan: Optimisation, step: int) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then half a cosine."""
    if step < plan.warmup_steps:
        return plan.learning_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    share = plan.final_fraction + (1 - plan.final_fraction) * (1 + math.cos(math.pi * done)) / 2
    return plan.learning_rate * share


class Average:
    """Exponential moving average of a network's weights and statistics.

    After n updates it is Σ dⁿ⁻ⁱ·wᵢ / Σ dⁿ⁻ⁱ. The division corrects for a short past: without it, the first weights
    would count too much.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {
            name: value.detach().clone() for name, value in network.state_dict().items() if value.is_floating_point()
        }

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        # The recursive form of the sums above: the newest weights' share is (1 − d) / (1 − dⁿ).
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        now = network.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [now[name].detach() for name in self.values], share)

    @contextlib.contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Lend the averaged weights to the network; counters are its own."""
        own = {name: value.detach().clone() for name, value in network.state_dict().items()}
        network.load_state_dict(own | self.values)
        try:
            yield
        finally:
            network.load_state_dict(own)


@dataclass
class Best:
    """The best weights so far by validation, and the step they are of."""

    quality: float
    step: int
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """What a run ended with: the averaged weights after its last step, or the best by validation."""

    weights: dict[str, Tensor]
    step: int
    verdict: dict[str, float] | None


def train(task: Task, config: RunConfig, folder: Path, machine: Machine, conduct: Conduct = QUIETLY) -> Result:
    """Take all steps, or those that are left. `conduct.progress` receives each row of the log.

    `folder` must not hold a run, unless `conduct.resume`: then that run goes on, or starts again if it was killed
    before its first checkpoint. SIGINT and SIGTERM end the run after the current step: it writes a checkpoint, and
    raises KeyboardInterrupt.
    Raises TrainingError (loss not finite), CheckpointError (not this run's), OutputError or UsageError.
    """
    plan = config.optimisation
    if plan.batch % machine.world:
        raise ConfigError(f"a batch of {plan.batch} cannot be shared evenly by {machine.world} processes")
    task.network.to(machine.device)
    if machine.world > 1 and machine.device.type == "cuda":
        # Statistics over the whole batch, as with one process. On the CPU each process has its own: torch has no other.
        task.network = nn.SyncBatchNorm.convert_sync_batchnorm(task.network)  # type: ignore[no-untyped-call]  # of torch
    run = _Run(task, config, folder, machine, conduct)
    run.start()
    network: Callable[..., Any] = task.network
    if machine.world > 1:
        network = DistributedDataParallel(
            task.network, device_ids=[machine.device.index] if machine.device.type == "cuda" else None
        )
    share = plan.batch // machine.world
    indices = range(machine.rank * share, (machine.rank + 1) * share)
    feed = _Feed(task, indices, range(run.step, plan.steps), conduct.threads)
    with contextlib.closing(feed), _stop_signals() as stopped:
        task.train_mode()
        for samples in feed:
            torch.manual_seed(int(generator(config.seed, Purpose.DROPOUT, run.step, machine.rank).integers(2**63)))
            rate = learning_rate(plan, run.step)
            loss, stop = run.take(network, samples, rate, stop=stopped.is_set())
            if machine.leads:
                run.losses.append(loss)
                run.write(rate, stop=stop)
            if stop and run.step < plan.steps:
                raise KeyboardInterrupt
    task.network.eval()
    if run.best:
        return Result(run.best.weights, run.best.step, run.verdict)
    with run.average.applied(task.network):
        final = {name: value.detach().clone() for name, value in task.network.state_dict().items()}
    return Result(final, run.step, run.verdict)


class _Run:
    """A run under way: what it was given, and all that changes, which is what a checkpoint holds."""

    def __init__(self, task: Task, config: RunConfig, folder: Path, machine: Machine, conduct: Conduct) -> None:
        self.task, self.config, self.folder, self.machine, self.conduct = task, config, folder, machine, conduct
        plan = config.optimisation
        groups = [{"params": parameters, "factor": factor} for factor, parameters in task.groups()]
        self.average = Average(task.network, plan.ema_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=plan.learning_rate, weight_decay=plan.weight_decay)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision is Precision.FP16)
        self.step = 0
        self.losses: list[float] = []  # since the last row of the log
        self.best: Best | None = None
        self.verdict: dict[str, float] | None = None
        self.which = {"kind": task.kind, "config": identity(config), "data": task.fingerprint()}
        self.log, self.validation = _Log(folder / LOG, LOG_COLUMNS), _Log(folder / VALIDATION, None)
        self.timed = 0, 0.0  # step and clock of the last row of the log; not saved

    def start(self) -> None:
        """Prepare the folder; if the run is resumed, go back to its checkpoint."""
        path = self.folder / CHECKPOINT
        make_folder(self.folder)
        if path.exists():
            if not self.conduct.resume:
                raise UsageError(
                    f"{self.folder} holds a run already: give --resume to go on with it, or another folder"
                )
            self._restore(path, read_checkpoint(path))
        if self.machine.leads:
            for log in (self.log, self.validation):
                log.cut(self.step)
        self.timed = self.step, time.perf_counter()

    def _restore(self, path: Path, was: Mapping[str, Any]) -> None:
        if was.get("digest") != digest(self.which):
            raise CheckpointError(_foreign(path, was, self.which))
        try:
            self.task.network.load_state_dict(was["network"])
            for name, value in self.average.values.items():
                value.copy_(was["average"][name])
            self.optimiser.load_state_dict(was["optimiser"])
            self.scaler.load_state_dict(was["scaler"])
            self.step, self.losses, self.verdict = was["step"], was["losses"], was["verdict"]
            self.best = Best(**was["best"]) if was["best"] else None
        except (KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise CheckpointError(f"{path} is damaged: {exc}") from exc
        self.average.updates = self.step

    def take(
        self, network: Callable[..., Any], samples: Sequence[Sample], rate: float, *, stop: bool
    ) -> tuple[float, bool]:
        """Take one optimisation step; return its loss, and whether any process was told to stop.

        Loss and gradients are checked before the weights move, so that a checkpoint never holds spoilt weights.
        """
        plan, machine = self.config.optimisation, self.machine
        batch = [
            torch.from_numpy(np.stack(arrays)).to(machine.device, non_blocking=True)
            for arrays in zip(*(sample.arrays for sample in samples), strict=True)
        ]
        with machine.autocast():
            losses = self.task.losses(network, batch)
        loss = losses.mean()
        news = torch.stack([loss.detach().float(), torch.tensor(float(stop), device=machine.device)])
        if machine.world > 1:
            distributed.all_reduce(news)  # all processes go on, or none
        total, stops = news.tolist()
        if not math.isfinite(total):
            raise TrainingError(_not_finite(self.step, losses, samples))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # of torch
        self.scaler.unscale_(self.optimiser)
        parameters = [p for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler skips such steps and scales less
            raise TrainingError(
                f"step {self.step + 1}: the loss is finite but its gradients are not; the last checkpoint is kept. "
                f"Lower the learning rate, or clip with optimisation.clip_norm. The batch: {_listed(samples)}"
            )
        if plan.clip_norm and math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, plan.clip_norm, norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.step += 1
        self.average.update(self.task.network)
        return total / machine.world, bool(stops)

    def write(self, rate: float, *, stop: bool) -> None:
        """After a step: log, validate and save what is due."""
        step, config, last = self.step, self.config, self.step == self.config.optimisation.steps
        if step % config.reporting.log_every == 0 or last:
            now = time.perf_counter()
            mean = math.fsum(self.losses) / len(self.losses)
            row = (step, mean, rate, (now - self.timed[1]) / (step - self.timed[0]))
            self.log.append(dict(zip(LOG_COLUMNS, row, strict=True)))
            self.losses.clear()
            self.timed = step, now
            if self.conduct.progress:
                self.conduct.progress(step, config.optimisation.steps, mean, rate)
        if last or (config.validate_every and step % config.validate_every == 0):
            self._validate()
        if last or stop or step % config.reporting.checkpoint_every == 0:
            save_checkpoint(self.folder / CHECKPOINT, self._contents())

    def _validate(self) -> None:
        """Judge the averaged weights, and keep them if they are the best so far."""
        network = self.task.network
        network.eval()
        with self.average.applied(network), torch.no_grad():
            verdict = self.task.validate(self.machine)
            if verdict:
                self.validation.append({"step": self.step, **verdict.row})
                self.verdict = verdict.row
                if verdict.quality is not None and (self.best is None or verdict.quality > self.best.quality):
                    weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
                    self.best = Best(verdict.quality, self.step, weights)
        self.task.train_mode()

    def _contents(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self.which,
            "digest": digest(self.which),
            "step": self.step,
            "losses": list(self.losses),
            "network": self.task.network.state_dict(),
            "average": self.average.values,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best and vars(self.best),
            "verdict": self.verdict,
        }


def _not_finite(step: int, losses: Tensor, samples: Sequence[Sample]) -> str:
    """Say which elements of the batch have no finite loss."""
    bad = [sample for sample, ok in zip(samples, torch.isfinite(losses.detach()).tolist(), strict=True) if not ok]
    if not bad:
        return f"step {step + 1}: the loss is not finite in another process; the last checkpoint is kept"
    what = f"{len(bad)} of the batch's {len(samples)} crops"
    if len(bad) == len(samples):
        what = "the whole batch: the weights have probably diverged, so lower the learning rate. It held"
    return f"step {step + 1}: the loss is not finite for {what}: {_listed(bad)}; the last checkpoint is kept"


def _listed(samples: Sequence[Sample], count: int = 8) -> str:
    names = ", ".join(sample.name for sample in samples[:count])
    return names if len(samples) <= count else f"{names} and {len(samples) - count} more"


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all; raises OutputError, and what was there before stays."""
    try:
        with replacing(path) as stream:
            torch.save(dict(contents), stream)
    except (OSError, RuntimeError) as exc:  # torch wraps a full disk
        kept = f"; the previous {path.name} is as it was" if path.exists() else ""
        raise OutputError(f"cannot write {path}: {exc}{kept}") from exc


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, without running code from it; raises CheckpointError."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # a damaged file ends in one of a dozen types
        raise CheckpointError(f"{path} is not a readable training checkpoint: {type(exc).__name__}") from exc
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training checkpoint of format {FORMAT}")
    return contents


def _foreign(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if was.get("kind") != now["kind"]:
        return f"{path} is of a {was.get('kind')} run, not of a {now['kind']} run"
    changed = differences(was.get("config"), now["config"])
    if was.get("data") != now["data"]:
        changed.append("the data are others (files were added, removed or changed)")
    lines = "".join(f"\n  {line}" for line in changed[:12])
    return f"{path} is of another run, whose steps would not go on the same way; choose another folder:{lines}"


class _Feed:
    """The batches of a range of steps. Threads prepare them ahead; NumPy and Pillow let threads run in parallel."""

    def __init__(self, task: Task, indices: range, steps: range, threads: int) -> None:
        self._task, self._indices, self._steps = task, indices, iter(steps)
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="training-data")
        self._waiting: deque[list[Future[Sample]]] = deque()

    def __iter__(self) -> Iterator[list[Sample]]:
        while True:
            while len(self._waiting) < AHEAD and (step := next(self._steps, None)) is not None:
                self._waiting.append([self._pool.submit(self._task.sample, step, index) for index in self._indices])
            if not self._waiting:
                return
            yield [future.result() for future in self._waiting.popleft()]

    def close(self) -> None:
        """Cancel the batches that no thread has begun."""
        self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag, so that the run can finish its step and write a checkpoint.

    The second signal acts as before. Python lets only the main thread do this: in another, signals stay as they are.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        restore()


class _Log:
    """A CSV file that rows are added to as they come; the first row fixes the columns if they are not given."""

    def __init__(self, path: Path, columns: Sequence[str] | None) -> None:
        self._path, self._columns = path, columns

    def cut(self, step: int) -> None:
        """Drop rows after `step`, and one that was not finished: the steps they are of will be taken again."""
        if not self._path.exists():
            return
        try:
            header, *lines = self._path.read_text().splitlines(keepends=True)
        except ValueError:  # empty, or not text
            header, lines = "", []
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step] if step else []
        write_file(self._path, "".join([header, *kept]) if kept else "")

    def append(self, row: Mapping[str, float]) -> None:
        """Add a row; numbers are written so that reading them gives them back exactly."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns or list(row), lineterminator="\n")
        if not self._path.exists() or self._path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)
        try:
            with self._path.open("a", newline="") as file:
                file.write(text.getvalue())
                file.flush()
                os.fsync(file.fileno())  # a checkpoint that survives a power cut has the rows before it
        except OSError as exc:
            raise OutputError(f"cannot write {self._path}: {exc}") from exc


def _step_of(line: str) -> float:
    first = line.partition(",")[0]
    return int(first) if first.isdigit() else math.inf
