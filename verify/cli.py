"""`iqa-verify`: options in, a verdict as table, JSON and page, an exit code out."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command import Command
from ..errors import OutputError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from .bisect import Culprits
    from .limits import Check, Limits
    from .run import Findings

_PATH = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--engine", type=_PATH, metavar="DIR", help="The engine directory that is verified.")
@click.argument("images", nargs=-1)
@click.option(
    "--against",
    type=_PATH,
    metavar="PATH",
    help="The reference: another engine directory, or the checkpoint. Default: the engine's own ONNX stages.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16"]),
    help="Verify the engine as iqa-build would round it, emulated in float32.",
)
@click.option("--plan", "plan_file", type=_PATH, metavar="FILE", help="Likewise, by this precision plan.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    help="What runs the engine: its ONNX stages on the CPU (default), or the build that fits this machine's GPU.",
)
@click.option("--device", type=click.IntRange(0), metavar="N", help="Which GPU. Default: 0.")
@click.option("--any-weights", is_flag=True, help="Compare although the two were made from other weights files.")
@click.option("--crops", type=click.IntRange(1, 10_000), metavar="N", help="Crops per image. Default: the engine's.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the noise.")
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="Seeds that the reference's spread is taken over, on the first 4 images.",
)
@click.option(
    "--mode",
    type=click.Choice(["whole", "tile", "crop"]),
    default="whole",
    show_default=True,
    help="How images are restored.",
)
@click.option(
    "--forced",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    metavar="N",
    help="Images on which each stage and step is also run on the reference's own inputs.",
)
@click.option(
    "--quantile",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="Q",
    help="Quantile of the errors that is reported. Default: 0.99, or that of --saved.",
)
@click.option(
    "--limits",
    "precision_limits",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "fp8"]),
    help="Whose default limits to apply. Default: those of what the candidate computes in.",
)
@click.option(
    "--limit", "changes", multiple=True, metavar="NAME=VALUE", help="Change one limit (repeatable); none lifts it."
)
@click.option("--fail-fast", is_flag=True, help="End at the first image beyond a limit.")
@click.option("--save", type=_PATH, metavar="DIR", help="Keep all inputs and outputs in this new folder.")
@click.option("--saved", type=_PATH, metavar="DIR", help="Judge what --save kept, without a run.")
@click.option("--json", "json_file", type=_PATH, metavar="FILE", help="Write every figure and the verdict.")
@click.option("--html", "html_file", type=_PATH, metavar="FILE", help="Write a page with curves over the steps.")
@click.option(
    "--bisect",
    "bisect_file",
    type=_PATH,
    metavar="FILE",
    help="If beyond a limit: find the fewest nodes that must be float32, and write the plan with them.",
)
@click.option("--trials", type=click.IntRange(2), default=64, show_default=True, help="Runs that --bisect may take.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: the CPUs this process may use.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no table: the exit code alone.")
def verify(engine: Path | None, images: tuple[str, ...], **given: Any) -> None:
    """Is this engine the model? Compare it with a float32 reference over the whole loop, with the same noise.

    IMAGES are files, folders or glob patterns. The table names, for every limit, the worst image and step.

    \b
    Limits, by --limit NAME=VALUE (errors are shares of the largest value, of scores shares of their range):
      unet-max unet-mean unet-cosine vit-mean vit-cosine    a stage on the reference's own inputs
      state-mean tap-mean tap-psnr maps-mean                the loop as the candidate runs it
      branch score score-mean spread srcc plcc              scores
      batch repeat order graph device                       what must not matter

    \b
    Examples:
      iqa-verify --engine engine/ --precision fp16 photos/ --html verify.html
      iqa-verify --engine int8/ --against engine/ photos/ --save kept/
      iqa-verify --engine engine/ --backend tensorrt photos/
      iqa-verify --saved kept/ --limit score-mean=0.005
      iqa-verify --engine engine/ --plan plan.json photos/ --bisect better.json

    Exit codes: 0 within all limits, 1 beyond one, 2 could not run.
    """
    from rich.console import Console

    from .report import is_within, show, to_json, write

    console = Console(stderr=True, quiet=given["quiet"])
    _refuse_contradictions(engine, images, given)
    if given["saved"]:
        findings, limits = _judge_saved(engine, given)
        checks, culprits = findings.judge(limits), None
    else:
        assert engine is not None  # noqa: S101 — refused above
        findings, checks, culprits = _run(console, engine, images, given)
    if not given["quiet"]:
        show(findings, checks, sys.stdout)
    if given["json_file"]:
        write(given["json_file"], to_json(findings, checks))
    if given["html_file"]:
        from .page import render

        write(given["html_file"], render(findings, checks))
    if culprits and not given["quiet"]:
        _show_culprits(culprits, given["bisect_file"])
    if not is_within(checks):
        sys.exit(1)


def _refuse_contradictions(engine: Path | None, images: tuple[str, ...], given: dict[str, Any]) -> None:
    if given["saved"]:
        if images:
            raise UsageError("--saved judges the images that were saved; leave IMAGES out, or run without --saved")
        for name in ("save", "bisect_file", "fail_fast", "backend", "device"):
            if given[name] is not None and given[name] is not False:
                option = "--" + name.removesuffix("_file").replace("_", "-")
                raise UsageError(f"{option} takes a run, which --saved spares; leave one of them out")
        return
    if engine is None:
        raise UsageError("give --engine DIR to verify one, or --saved DIR to judge saved results")
    if given["backend"] == "tensorrt" and (given["plan_file"] or given["precision"] or given["bisect_file"]):
        raise UsageError(
            "a build has a plan of its own; leave --plan, --precision and --bisect out, or --backend tensorrt"
        )
    if given["backend"] != "tensorrt" and given["device"] is not None:
        raise UsageError("--device names a GPU, which takes --backend tensorrt")
    if given["bisect_file"] and not (given["plan_file"] or given["precision"]):
        raise UsageError("--bisect changes a precision plan: give one with --plan, or --precision")
    if given["bisect_file"] and given["fail_fast"]:
        raise UsageError("--bisect needs the worst of all images, --fail-fast ends before: choose one")
    for option in ("json_file", "html_file", "bisect_file"):
        if given[option] and not given[option].absolute().parent.is_dir():
            raise OutputError(f"cannot write {given[option]}: its folder does not exist; make it first")


def _judge_saved(engine: Path | None, given: dict[str, Any]) -> "tuple[Findings, Limits]":
    """Read saved results, refusing those of another engine, plan or reference than are named."""
    from ..engine.manifest import read_manifest
    from .limits import few_images, make_limits
    from .saved import read_saved
    from .sides import default_limits, plan_id

    findings, engine_id = read_saved(given["saved"], given["quantile"])

    def require(name: Path | str, wanted: str, saved: str) -> None:
        if wanted != saved:
            raise UsageError(
                f"{given['saved']} holds results of another engine: {saved}, while {name} is {wanted}; verify that one "
                f"anew, or name the one that was saved"
            )

    if engine:
        manifest = read_manifest(engine)
        require(engine, manifest.engine_id, engine_id)
        if given["plan_file"]:
            from ..export.precision import read_plan

            require(given["plan_file"], plan_id(manifest, read_plan(given["plan_file"])), findings.candidate.id)
    if given["precision"]:
        require("--precision", given["precision"], findings.candidate.cast or findings.candidate.precision)
    if given["against"] and given["against"].is_dir():
        require(given["against"], read_manifest(given["against"]).engine_id, findings.reference.id)
    default = default_limits(findings.reference, findings.candidate)
    limits = make_limits(given["precision_limits"] or default, given["changes"])
    return findings, few_images(limits, given["changes"], len(findings.images))


def _run(
    console: "Console", engine: Path, images: tuple[str, ...], given: dict[str, Any]
) -> "tuple[Findings, tuple[Check, ...], Culprits | None]":
    from ..engine.manifest import Precision, read_manifest
    from ..export.precision import read_plan
    from ..runtime.host.onnx_stage import OnnxRuntime
    from ..runtime.inputs import find_images
    from ..runtime.results import Mode, Options
    from . import bisect
    from .figures import QUANTILE
    from .limits import few_images, make_limits
    from .report import is_within, write
    from .run import Choices, read_subjects
    from .run import verify as run
    from .saved import Store
    from .sides import Given, chosen_plan, default_limits, open_sides, open_verified, reference_side

    plan = read_plan(given["plan_file"]) if given["plan_file"] else None
    precision = Precision(given["precision"]) if given["precision"] else None
    asked = Given(engine, given["against"], plan, precision, given["any_weights"])
    settings = OnnxRuntime(threads=given["threads"])
    options = Options(given["crops"], given["seed"], given["seeds"], Mode(given["mode"]))
    choices = Choices(options, given["forced"], quantile=given["quantile"] or QUANTILE, fail_fast=given["fail_fast"])
    with console.status("loading") as status, contextlib.ExitStack() as opened:
        # What is soon found wrong is said before networks are loaded; which limits are lifted, no default changes.
        lifted = make_limits("fp32", given["changes"])
        subjects = read_subjects(find_images(images), read_manifest(engine), options, lifted)
        if given["backend"] == "tensorrt":
            from .device import open_device_side

            directory = open_verified(engine)
            reference = reference_side(asked, directory, settings)
            candidate = opened.enter_context(open_device_side(directory, given["device"] or 0))
        else:
            reference, candidate = open_sides(asked, settings)
        default = default_limits(reference.party, candidate.party)
        limits = make_limits(given["precision_limits"] or default, given["changes"])
        limits = few_images(limits, given["changes"], len(subjects))
        store = Store(given["save"]) if given["save"] else None
        findings = run(
            reference,
            candidate,
            subjects,
            choices,
            limits,
            keep=store.add if store else lambda kept: None,
            progress=status.update,
        )
        if store:
            store.finish(findings, candidate.manifest)
        checks = findings.judge(limits)
        if not given["bisect_file"] or is_within(checks):
            return findings, checks, None
        directory = open_verified(engine)
        chosen = chosen_plan(asked, directory)
        assert chosen is not None  # noqa: S101 — refused above
        culprits = bisect.bisect(
            directory,
            chosen,
            reference,
            subjects,
            findings,
            limits,
            choices=choices,
            settings=settings,
            trials=given["trials"],
            progress=status.update,
        )
        write(given["bisect_file"], culprits.plan.to_json())
    return findings, checks, culprits


def _show_culprits(culprits: "Culprits", path: Path) -> None:
    names = [f"{group.stage}: {name} ({op})" for group in culprits.groups for name, op in group.nodes]
    click.echo(f"\nnodes to keep in float32 ({len(names)}, found in {culprits.trials} trials):")
    for name in names:
        click.echo(f"  {name}")
    if not culprits.minimal:
        click.echo("The trials were used up: fewer nodes may do. Raise --trials to go on looking.")
    beyond = [check.name for check in culprits.checks if not check.within]
    verdict = f"still beyond {', '.join(beyond)}" if beyond else "within all limits"
    click.echo(f"{path}: the plan with them is {verdict}")
