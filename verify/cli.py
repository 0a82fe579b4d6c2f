"""`iqa-verify`: options in; a verdict as table, JSON and page, and an exit code, out."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..command import Command, refuse_given
from ..engine.atomic import check_folder_of
from ..errors import UsageError

_PATH = click.Path(path_type=Path)
BUILDS = (
    "tensorrt",
    "inductor-gpu",
    "onnxruntime-gpu",
    "inductor",
)  # backends that run builds; the last one on the CPU
_OF_SELF_TEST = {"self_test", "engine", "backend", "device", "threads", "json_file", "quiet", "debug"}
# Options that a comparison of scores, or of what was saved, has no use for.
_OF_TENSORS = {"precision", "plan_file", "backend", "device", "any_weights", "quantile", "limits_of", "changes"}
_OF_TENSORS |= {"fail_fast", "save", "saved", "html_file", "bisect_file"}
_OF_A_RUN = {"save", "bisect_file", "fail_fast", "backend", "device", "fast"}


@click.command(cls=Command)
@click.option("--engine", type=_PATH, metavar="DIR", help="The engine directory to verify.")
@click.argument("images", nargs=-1)
@click.option(
    "--against",
    type=_PATH,
    metavar="PATH",
    help="The reference: another engine directory, a checkpoint, or your program's scores of IMAGES (.csv with the "
    "columns name and score). Default: the engine's own ONNX stages.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16"]),
    help="Verify the engine as iqa-build would round it to this precision, emulated in float32.",
)
@click.option(
    "--plan",
    "plan_file",
    type=_PATH,
    metavar="FILE",
    help="Verify the engine as iqa-build would round it by this precision plan, emulated in float32.",
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "openvino", *BUILDS]),
    help="What runs the engine: onnxruntime its ONNX stages on the CPU (default), another one its build for this "
    "machine. With --self-test also openvino; the default is then what iqa-run takes.",
)
@click.option("--device", type=click.IntRange(0), metavar="N", help="Which GPU runs the build. Default: 0.")
@click.option("--fast", is_flag=True, help="Verify the fast sampling from iqa-calibrate --steps, against all steps.")
@click.option("--any-weights", is_flag=True, help="Compare two engines even if they have different weights.")
@click.option("--crops", type=click.IntRange(1, 10_000), metavar="N", help="Crops per image. Default: the engine's.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="The seed of the noise.")
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="Score the first 4 images with this many seeds, to measure the spread of the reference's scores.",
)
@click.option(
    "--mode",
    type=click.Choice(["whole", "tile", "crop"]),
    default="whole",
    show_default=True,
    help="Restore images whole, in overlapping tiles, or crop by crop.",
)
@click.option(
    "--forced",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    metavar="N",
    help="On the first N images, also run each stage on the reference's own inputs.",
)
@click.option(
    "--quantile",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="Q",
    help="Report this quantile of the errors. Default: 0.99, or that of --saved.",
)
@click.option(
    "--limits",
    "limits_of",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8", "fast"]),
    help="Apply the default limits of this precision. Default: the precision of the candidate, or fast with --fast.",
)
@click.option(
    "--limit",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change one limit (repeatable). The value none lifts it.",
)
@click.option("--fail-fast", is_flag=True, help="End at the first image beyond a limit.")
@click.option("--save", type=_PATH, metavar="DIR", help="Keep all inputs and outputs in this new folder.")
@click.option("--saved", type=_PATH, metavar="DIR", help="Judge what --save kept; run nothing.")
@click.option("--json", "json_file", type=_PATH, metavar="FILE", help="Write all figures and the verdict.")
@click.option("--html", "html_file", type=_PATH, metavar="FILE", help="Write a page with curves over the steps.")
@click.option(
    "--bisect",
    "bisect_file",
    type=_PATH,
    metavar="FILE",
    help="If a limit is exceeded, find the fewest nodes that must be float32, and write the plan with them.",
)
@click.option(
    "--trials",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="Runs that --bisect may take; images scored in other ways where your program's scores differ.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: the CPUs this process may use.")
@click.option(
    "--self-test",
    is_flag=True,
    help="Without IMAGES: does this machine give the model's answers to the pictures in the engine? Takes seconds.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no table, only set the exit code.")
def verify(engine: Path | None, images: tuple[str, ...], **given: Any) -> None:
    """Check that an engine still computes the model: compare it with a float32 reference, and judge the difference.

    Both score the same IMAGES (files, folders or glob patterns) with the same noise. The table shows, for each limit,
    the worst image and step.

    Errors of tensors are shares of the reference's largest value, errors of scores are shares of the range of scores.

    \b
    Limits, changed with --limit NAME=VALUE:
      unet-max unet-mean unet-cosine vit-mean vit-cosine    one stage, given the reference's inputs
      state-mean tap-mean tap-psnr maps-mean                tensors, in a whole run of the candidate
      branch score score-mean spread srcc plcc              scores, of whole runs
      batch repeat order graph device                       what must not change a result

    \b
    Examples:
      iqa-verify --engine engine/ --self-test                              does this machine give the model's answers?
      iqa-verify --engine engine/ --precision fp16 photos/ --html verify.html
      iqa-verify --engine int8/ --against engine/ photos/ --save kept/
      iqa-verify --engine engine/ --against program.csv photos/           your program's scores: why do they differ?
      iqa-verify --engine engine/ --backend inductor photos/ --mode crop
      iqa-verify --engine engine/ --fast photos/
      iqa-verify --saved kept/ --limit score-mean=0.005
      iqa-verify --engine engine/ --plan plan.json photos/ --bisect better.json

    Exit codes: 0 within all limits, 1 beyond one, 2 could not run.
    """
    from .scores import is_scores

    if given["self_test"]:
        _self_test(engine, given)
    elif given["against"] and is_scores(given["against"]):
        _against_scores(engine, images, given)
    else:
        _tensors(engine, images, given)


def _tensors(engine: Path | None, images: tuple[str, ...], given: dict[str, Any]) -> None:
    """Compare what two forms of a model compute, or judge again what was saved of that."""
    from rich.console import Console

    from ..export.precision import read_plan
    from . import api
    from .figures import QUANTILE
    from .limits import parse_limit
    from .page import render
    from .report import show, show_culprits, to_json

    _refuse_contradictions(engine, images, given)
    _check_folders(given)
    judged: dict[str, Any] = {
        "against": given["against"],
        "precision": given["precision"],
        "plan": read_plan(given["plan_file"]) if given["plan_file"] else None,
        "limits_of": given["limits_of"],
        "limits": dict(map(parse_limit, given["changes"])),
    }
    if given["saved"]:
        result = api.verify_saved(given["saved"], engine=engine, quantile=given["quantile"], **judged)
    else:
        assert engine is not None  # noqa: S101 — refused above
        with Console(stderr=True, quiet=given["quiet"]).status("loading") as status:
            result = api.verify(
                engine,
                images,
                backend=_backend(given["backend"], given["device"]),
                options=_options(given, fast=given["fast"]),
                quantile=given["quantile"] or QUANTILE,
                bisect=given["bisect_file"] is not None,
                say=status.update,
                **judged,
                **{name: given[name] for name in ("any_weights", "forced", "fail_fast", "save", "trials", "threads")},
            )
    found, culprits = (result.findings, result.checks), result.culprits
    files = {"json_file": lambda: to_json(*found), "html_file": lambda: render(*found)}
    if culprits:
        files["bisect_file"] = culprits.plan.to_json

    def show_all() -> None:
        show(*found, sys.stdout)
        if culprits:
            show_culprits(culprits, given["bisect_file"], sys.stdout)

    _conclude(given, result.within, show_all, **files)


def _self_test(engine: Path | None, given: dict[str, Any]) -> None:
    """Test the engine with the pictures that it carries."""
    from ..runtime.backends import from_options
    from ..runtime.selftest import self_test
    from .report import self_test_to_json, show_self_test

    refuse_given(_OF_SELF_TEST, "--self-test takes the engine's own pictures: leave out {}", all_but=True)
    if engine is None:
        raise UsageError("give --engine DIR, which is tested")
    _check_folders(given)
    backend = from_options(given["backend"] or "auto", device=given["device"], threads=given["threads"])
    tested = self_test(engine, backend)
    show = partial(show_self_test, tested, sys.stdout)
    _conclude(given, tested.within, show, json_file=lambda: self_test_to_json(tested))


def _against_scores(engine: Path | None, images: tuple[str, ...], given: dict[str, Any]) -> None:
    """Compare with the scores of another program."""
    from rich.console import Console

    from .report import scores_to_json, show_scores
    from .scores import compare_scores

    if engine is None:
        raise UsageError("give --engine DIR, whose scores are compared")
    why = f"{{}} is about tensors, and {given['against']} has scores alone; leave one of them out"
    refuse_given(_OF_TENSORS, why)
    _check_folders(given)
    with Console(stderr=True, quiet=given["quiet"]).status("loading") as status:
        found = compare_scores(
            engine,
            images,
            given["against"],
            options=_options(given),
            trials=given["trials"],
            threads=given["threads"],
            say=status.update,
        )
    show = partial(show_scores, found, sys.stdout)
    _conclude(given, found.within, show, json_file=lambda: scores_to_json(found))


def _refuse_contradictions(engine: Path | None, images: tuple[str, ...], given: dict[str, Any]) -> None:
    """Refuse options that only the command has; `api.verify` refuses the others."""
    if given["saved"]:
        if images:
            raise UsageError("--saved judges the images that were saved; leave IMAGES out, or run without --saved")
        refuse_given(_OF_A_RUN, "{} needs a run, and --saved does without; leave one of them out")
    elif engine is None:
        raise UsageError("give --engine DIR to verify one, or --saved DIR to judge saved results")
    elif given["backend"] == "openvino":
        raise UsageError(
            "--backend openvino is for --self-test; without it, compare with the builds or the ONNX stages"
        )
    elif given["device"] is not None and given["backend"] not in BUILDS[:-1]:
        raise UsageError(f"--device names a GPU, and needs --backend {', '.join(BUILDS[:-1])}")


def _check_folders(given: dict[str, Any]) -> None:
    for option in ("json_file", "html_file", "bisect_file"):
        if given[option]:
            check_folder_of(given[option])


def _options(given: dict[str, Any], **more: Any) -> Any:
    from ..runtime.results import Mode, Options

    return Options(given["crops"], given["seed"], given["seeds"], Mode(given["mode"]), **more)


def _backend(name: str | None, device: int | None) -> Any:
    """Return the backend whose build is verified; None for the ONNX stages on the CPU."""
    from ..runtime.backends import from_options

    return from_options(name, device=device) if name in BUILDS else None


def _conclude(given: dict[str, Any], within: bool, show: Callable[[], object], **files: Callable[[], str]) -> None:
    """Show what was found, write the files that were asked for, and exit with the verdict."""
    from .report import write

    if not given["quiet"]:
        show()
    for option, text in files.items():
        if given[option]:
            write(given[option], text())
    if not within:
        sys.exit(1)
