"""`scripts/gpu-check`: steps that each show something on a GPU, one process and one time limit for each.

DIR/gpu-check.json is written whole around every step. A run that is cut off loses the step that was running, and the
file says which that was. DIR/gpu-check.log has what the steps printed. `steps.py` has what the steps do, `page.py` the
page that is made of the file.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NAME, NOTES = "gpu-check", "notes.json"
TAIL = 40  # lines of a failed step's output that are kept
RESERVE = 4  # seconds kept at the end, to write the file
NOT_SHOWN = "not shown here"  # the status of a step that only ran to see whether it runs
PACK_MIB = 64
PACKAGES = ("triton", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cudnn-cu13", "nvidia-cublas", "cupy-cuda13x")


@dataclass(frozen=True)
class Step:
    """What one step shows, and in how many seconds on an H100. Its name is that of a function in a module."""

    name: str
    seconds: int
    shows: str
    dry: bool = False  # whether a dry run, which has the fake driver and no card, shows something of it
    driver: bool = False  # whether it needs a CUDA driver, real or fake
    module: str = "diffiqa.figures.gpu.steps"


UNET = "diffiqa.figures.gpu.unet"
# In the order of their worth. The seconds are guesses until a card was seen; 8 are for Python, PyTorch and the GPU.
STEPS = (
    Step("facts", 20, "what the card is and reaches at most: matrix products, a copy, NVML's answers"),
    Step("kernels", 55, "our kernels' tests: bit for bit as NumPy or the host build", dry=True, driver=True),
    Step("layer", 40, "the tests of cuda.core as we call it, of events and of NVML", dry=True, driver=True),
    Step("executor", 70, "`mini` on the card: every form of graph and mode, batches, memory", dry=True, driver=True),
    Step("pfd", 40, "`pfd-mini` the same way; images of 4 crops, alone and 8 at a time", dry=True, driver=True),
    Step("unet", 55, "a step of the full-size U-Net in PyTorch: float32, TF32, fp16, CUDA graphs", module=UNET),
    Step("score", 65, "a full-size score through our executor: graph, no graph, launches, energy", driver=True),
    Step("inductor", 110, "`iqa-build --target inductor` of `mini`, its scores and times"),
    Step("compile", 55, "the full-size U-Net step through torch.compile", module=UNET),
    Step("rates", 25, "our kernels' memory rates beside a copy", driver=True),
    Step("training", 75, "`iqa-train restore` in bf16 on the card and on the CPU: pace and loss"),
    Step("pool", 15, "whether freed memory goes back to the card", driver=True),
    Step("embedding", 20, "what the part of a U-Net step that depends on the step alone costs", module=UNET),
    Step("sanitizer", 45, "compute-sanitizer on kernel tests: stray accesses and races", driver=True),
    Step("onnxruntime", 80, "`iqa-build --target onnxruntime` of `mini`, its scores and times"),
    Step("full_size", 300, "the full-size model through both builds: export, build, scores, times"),
    Step("autotune", 85, "the U-Net step through torch.compile in its mode max-autotune", module=UNET),
)


@dataclass(frozen=True)
class Place:
    """Where a step runs."""

    device: str  # of PyTorch: "cuda" or "cpu"
    dry: bool  # tiny networks, the fake driver: nothing is measured
    root: Path
    folder: Path  # for files that may go
    packed: Path | None  # what --pack made


class Notes:
    """What a step finds. It is on disk after every figure, so that a step that is killed keeps what it had."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.figures: dict[str, Any] = {}
        self.checks: dict[str, dict[str, Any]] = {}
        self._write()

    def add(self, **figures: Any) -> None:
        """Note figures by name."""
        self.figures |= figures
        self._write()

    def check(self, name: str, ok: bool, found: Any = None) -> None:
        """Note whether something is as it must be; the step goes on either way."""
        self.checks[name] = {"ok": bool(ok), "found": found}
        if not ok:
            print(f"WRONG: {name}: {found}", flush=True)
        self._write()

    def attempt(self, name: str, work: Callable[..., Any], *given: Any, **more: Any) -> None:
        """Note what `work` returns, if it returns something, as the figure `name`. If it fails, note that and go on."""
        try:
            if (found := work(*given, **more)) is not None:
                self.add(**{name: found})
        except Exception as exc:
            traceback.print_exc()
            self.check(name, ok=False, found=f"{type(exc).__name__}: {str(exc).strip()[:600]}")

    def _write(self) -> None:
        write_json(self._path, {"figures": self.figures, "checks": self.checks})


def write_json(path: Path, data: Any) -> None:
    """Write a file so that it is there whole, or as it was before."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def main(folder: Path) -> None:
    """Do what the command line asks. `folder` is for files that may go."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/{NAME}",
        description="Show on an NVIDIA card what only a card can show. Every step is a process of its own.",
        epilog=f"An H100 takes {sum(step.seconds for step in STEPS)} s for all steps. Exit codes: 0 all is as it must "
        "be, or left out; 1 a step failed or found something wrong.",
    )
    parser.add_argument("--list", action="store_true", help="name the steps and their expected seconds, and leave")
    parser.add_argument("--steps", metavar="A,B", help="run these only, in this order")
    parser.add_argument("--limit", type=float, default=560, metavar="SECONDS", help="leave out what no longer fits")
    parser.add_argument("--out", type=Path, default=Path("out") / NAME, metavar="DIR", help="for the JSON and the log")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: what needs no GPU, for size")
    parser.add_argument("--dry-run", action="store_true", help="run all code without a GPU, on the fake driver")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="make what spares time on the card's machine")
    parser.add_argument("--packed", type=Path, metavar="DIR", help="use what --pack made")
    parser.add_argument("--report", type=Path, nargs="+", metavar="JSON", help="make docs/gpu.md of these files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    if given.list:
        for step in STEPS:
            print(f"{step.name:13} {step.seconds:4} s  {step.shows}")
    elif given.report:
        from .page import publish

        publish(given.report, root)
    elif given.pack:
        pack(given.pack)
    else:
        device = "cpu" if given.dry_run else given.device
        place = Place(device, given.dry_run, root, folder, given.packed and given.packed.resolve())
        if given.child:
            run_here(given.child, place)
        else:
            sys.exit(run_all(chosen(given.steps), place, given.out.resolve(), given.limit))


def chosen(names: str | None) -> list[Step]:
    """Return the steps that were asked for."""
    known = {step.name: step for step in STEPS}
    wanted = [name.strip() for name in names.split(",") if name.strip()] if names else list(known)
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"error: there is no step {', '.join(unknown)}; --list names them all")
    return [known[name] for name in wanted]


def run_all(steps: Iterable[Step], place: Place, out: Path, limit: float) -> int:
    """Run steps one after the other, and write what is known around each of them. Return the exit code."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to stop"))  # so that the running child ends, too
    out.mkdir(parents=True, exist_ok=True)
    file, log = out / f"{NAME}.json", out / f"{NAME}.log"
    log.unlink(missing_ok=True)
    entries: dict[str, Any] = {step.name: {"status": "not begun", "expected_seconds": step.seconds} for step in steps}
    result = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": place.device, "dry": place.dry}
    result |= {"machine": machine(), "steps": entries}
    environment = variables(place)
    for step in steps:
        left, entry = limit - (time.monotonic() - started) - RESERVE, entries[step.name]
        if step.driver and place.device == "cpu" and not place.dry:
            entry |= {"status": "left out", "why": "it needs a CUDA driver"}
        elif step.seconds > left:
            entry |= {"status": "left out", "why": f"{left:.0f} s were left and {step.seconds} s are expected"}
        else:
            entry["status"] = "running"
            write_json(file, result)
            entry |= run_apart(step, place, environment, log, min(left, 1.5 * step.seconds + 10))
            wrong = [name for name, check in entry["checks"].items() if not check["ok"]]
            print(f"{step.name:13} {entry['status']:15} {entry['seconds']:5.0f} s  {'; '.join(wrong)}", flush=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_json(file, result)
    print(f"{file}: {result['seconds']} s")
    return int(any(entry["status"] not in {"ok", NOT_SHOWN, "left out"} for entry in entries.values()))


def run_apart(step: Step, place: Place, environment: Mapping[str, str], log: Path, limit: float) -> dict[str, Any]:
    """Run a step in a process of its own. End it, and all that it started, at its limit. Return what it found."""
    own = place.folder / f"step-{step.name}"
    own.mkdir()
    printed = own / "printed"
    # -P: modules of the checkout must not pass for packages of the same names.
    command = [sys.executable, "-P", "-m", __name__, str(own), "--child", f"{step.module}:{step.name}"]
    command += ["--device", place.device]
    command += [*["--dry-run"] * place.dry, *(["--packed", str(place.packed)] if place.packed else [])]
    begun, code = time.monotonic(), None
    with printed.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=place.root,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # inside the driver it may not end at once: the next step does not wait for it
    found: dict[str, Any] = {"figures": {}, "checks": {}}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((own / NOTES).read_text(encoding="utf-8"))
    text = printed.read_text(encoding="utf-8", errors="replace")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n======== {step.name}\n{text[-600_000:]}")
    if "[fake driver]" in text:
        complaints = [line for line in text.splitlines() if "[fake driver]" in line]
        found["checks"]["the fake driver finds no fault"] = {"ok": False, "found": complaints[:5]}
    status = status_of(code, found["checks"])
    if status == "ok" and "left out" in found["figures"]:
        status = "left out"
    if status == "ok" and place.dry and not step.dry:
        status = NOT_SHOWN
    entry = {"status": status, "seconds": round(time.monotonic() - begun, 1), **found}
    if status not in {"ok", NOT_SHOWN}:
        entry |= {"limit_seconds": round(limit), "exit_code": code, "output": text.splitlines()[-TAIL:]}
    return entry


def status_of(code: int | None, checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how a step ended. One that is `wrong` ran to its end and found something that is not as it must be."""
    if code is None:
        return "timed out"
    if code:
        return "crashed" if code < 0 else "failed"
    return "ok" if all(check["ok"] for check in checks.values()) else "wrong"


def run_here(step: str, place: Place) -> None:
    """Run one step, MODULE:FUNCTION, in this process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux: it ends with the process that watches its time
    if place.device == "cpu":
        importlib.import_module("diffiqa.tests.fake_torch_cuda").install()
    module, _, name = step.partition(":")
    getattr(importlib.import_module(module), name)(place, Notes(place.folder / NOTES))


def variables(place: Place) -> dict[str, str]:
    """Return the environment of the steps: caches that go, and for a dry run the fake driver, which is built here."""
    folder = place.folder
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found |= {"DIFFIQA_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    found |= {"TRITON_CACHE_DIR": str(folder / "triton"), "XDG_STATE_HOME": str(folder / "state")}
    if place.dry:
        from ...tests.fakecuda.driver import build_driver
        from ...tests.kernels.devices import HOST_LIBRARY, build_host

        build_driver(folder)
        build_host(folder)
        libraries = filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))
        found |= {"LD_LIBRARY_PATH": os.pathsep.join(libraries), "FAKE_CUDA_KERNELS": str(folder / HOST_LIBRARY)}
        found |= {"FAKE_CUDA_GPU": "1"}
        found |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        found["MKL_CBWR"] = "COMPATIBLE"  # else, on AMD's CPUs, a row's bits depend on where it lies in memory
    return found


def machine() -> dict[str, Any]:
    """Return what the figures depend on, without touching the card."""
    from ...bench.machine import describe
    from ...runtime.host.onnx_stage import available_cpus

    found = asdict(describe(available_cpus()))
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found["packages"][name] = version(name)
    query = ["name", "driver_version", "compute_cap", "memory.total", "power.limit"]
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        found["card"] = dict(zip(query, map(str.strip, text.partition("\n")[0].split(",")), strict=True))
    return found


def pack(folder: Path) -> None:
    """Make what the steps would else make themselves on the card's machine, and say how large it is."""
    from ... import export

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = Path(__file__).resolve().parents[2]
    export(root / "models" / "mini" / "model.safetensors", folder / "mini", target="none")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    print(f"{folder}: {size:.1f} MiB")
    if size > PACK_MIB:
        sys.exit(f"error: more than {PACK_MIB} MiB cannot be carried")


if __name__ == "__main__":  # a step's process
    main(Path(sys.argv.pop(1)))
