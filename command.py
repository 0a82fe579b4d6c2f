"""What all `iqa` commands share: how an error ends them, and `--debug`."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from .errors import DiffiqaError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
_DEBUG = "diffiqa.debug"
HELP = {"help_option_names": ["-h", "--help"]}
# Packages that modules import at their top, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(["onnx", "onnxscript", "safetensors", "torch"], "export"),
    "ml_dtypes": "calibration",
    "starlette": "serve",
    "uvicorn": "serve",
}


class Command(click.Command):
    """A command whose errors are one line on stderr and an exit code; `--debug` shows the traceback too."""

    interrupt_exit_code = 2  # of commands that do everything or nothing

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = HELP | (kwargs.get("context_settings") or {})
        super().__init__(*args, **kwargs)
        debug = click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, _param, value: ctx.meta.update({_DEBUG: value}),
            help="Show the traceback of an error.",
        )
        self.params.append(debug)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; every error becomes a message and an exit code."""
        debug = bool(ctx.meta.get(_DEBUG))
        _open_streams()
        try:
            with _terminate_as_interrupt():
                return super().invoke(ctx)
        except DiffiqaError as exc:
            _fail(ctx, str(exc), exc.exit_code, exc, debug=debug)
        except KeyboardInterrupt as exc:
            _fail(ctx, "interrupted", self.interrupt_exit_code, exc, debug=debug)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except MemoryError as exc:
            _fail(ctx, "not enough memory", 2, exc, debug=debug)
        except Exception as exc:
            what = f"unexpected {type(exc).__name__}: {exc}; please report this with the output of --debug"
            _fail(ctx, _missing(exc) or what, 2, exc, debug=debug)


def refuse_given(names: Collection[str], message: str, *, all_but: bool = False) -> None:
    """Raise UsageError if the command line gives one of these options, or, with `all_but`, one of the others.

    The option takes the place of {} in the message.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) not in {None, click.core.ParameterSource.DEFAULT}
        if given and (name in names) is not all_but:
            raise UsageError(message.replace("{}", parameter.opts[0], 1))


def _missing(exc: Exception) -> str | None:
    """Return what to install, if a package is missing that a machine without this command's extra does not have."""
    package = (exc.name or "").partition(".")[0] if isinstance(exc, ModuleNotFoundError) else ""
    if package not in EXTRAS:
        return None
    return f"{package} is not installed; install what this command needs: pip install 'diffiqa[{EXTRAS[package]}]'"


def _open_streams() -> None:
    """Open the null device in place of streams that the caller closed (`>&-`)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 — for the whole run


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    It has its own type because of CPython: when KeyboardInterrupt itself passes through `exec`, as in many imports,
    `python -m` ends by SIGINT in the end, whatever our exit code is.
    """


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Have SIGTERM end a command as Ctrl-C does, with its clean-up. Only the main thread can set signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _as_interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored: then leave it so
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _as_interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise Interrupted


def _fail(ctx: click.Context, message: str, code: int, exc: BaseException, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(exc)
    click.echo(f"{click.style('error:', fg='red')} {message}", err=True)
    ctx.exit(code)
