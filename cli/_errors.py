"""Exit codes, and one line instead of a traceback for what a user can mend."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, ParamSpec, get_type_hints

import typer

_Options = ParamSpec("_Options")

INTERNAL = 1  # a fault of ours: Python's own exit code, with the traceback that a bug report needs
USAGE = 2  # typer's: an unknown option, a missing argument
INPUT = 3  # the model, the imatrix or a rule cannot be used
OUTPUT = 4  # the output exists, cannot be written, or the disk is full
INCOHERENT = 5  # --check: the file was written, but does not speak
UNREACHED = 6  # --target-error: the folder was written, but smoothing leaves more error than that
INTERRUPTED = 130  # Ctrl-C or SIGTERM; --resume continues

EXIT_CODES = (
    "Exit codes: 0 done; 1 internal error; 2 wrong command line; 3 the input cannot be used; "
    "4 the output cannot be written; 5 the file fails --check; "
    "6 smoothing misses --target-error; 130 interrupted."
)


# Where an option is not called as the library's argument, or says the opposite.
_NAMED_OTHERWISE = {
    "allow_fallback=False": "--no-fallback",
    "bpw": "--target-bpw",
    "kld": "--target-kld",
    "nbytes": "--target-size",
    "out=None": "--dry-run",
    "record": "--sensitivity",
    "rules": "--rule",
    "scheme": "--type",
    "sensitivity": "--weights",
    "smooth=False": "--no-smooth",
}
# name=value, name=… or name= alone, at the start of a word.
_ARGUMENT = re.compile(r"(?<![^\s(])(?P<name>[a-z][a-z_]*)=(?P<value>True|False|None|…|\[?'[^']*'\]?|)")
_commands: list[Callable[..., None]] = []


def as_options(message: str) -> str:
    """A message of the library, which names arguments, as the command line says it: search_seconds=60 is
    --search-seconds 60, force=True is --force, rules=['a=Q8_0'] is --rule 'a=Q8_0'.

    What is no option of any command stays as it is.
    """
    return _ARGUMENT.sub(_as_option, message)


def _as_option(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    if (whole := f"{name}={value}") in _NAMED_OTHERWISE:
        return _NAMED_OTHERWISE[whole]
    option = _NAMED_OTHERWISE.get(name) or _options().get(name)
    if option is None:
        return match[0]
    if value == "False":
        return f"--no-{option[2:]}"
    if value in ("True", "None", "…"):
        return option
    if value == "" and re.match(r"[\s:;,.)]|$", match.string[match.end() :]):
        return option
    quoted = value.strip("[]")
    plain = re.fullmatch(r"'([\w.+-]+)'", quoted)
    return f"{option} {plain[1] if plain else quoted}"


@functools.cache
def _options() -> dict[str, str]:
    """--name of every option of every command, by the name of its parameter."""
    found = {}
    for command in _commands:
        for name, hint in get_type_hints(command, include_extras=True).items():
            for about in getattr(hint, "__metadata__", ()):
                if not isinstance(about, typer.models.OptionInfo):
                    continue
                long = [
                    part for text in about.param_decls or () for part in text.split("/") if part[:2] == "--"
                ]
                found[name] = long[0] if long else f"--{name.replace('_', '-')}"
    return found


def one_line_errors(command: Callable[_Options, None]) -> Callable[_Options, None]:
    """The command, with user errors turned into a line on stderr and an exit code."""
    _commands.append(command)

    @functools.wraps(command)
    def wrapped(*args: _Options.args, **kwargs: _Options.kwargs) -> None:
        from jquant.core import OutputError, UserError
        from jquant.distributed.mesh import LostError, leave, together

        try:
            with _ending_as_ctrl_c(), together():
                command(*args, **kwargs)
                sys.stdout.flush()  # here, where a full disk can still be told
        except LostError as error:
            print(f"jquant: {as_options(str(error))}", file=sys.stderr, flush=True)
            leave(INPUT)
        except UserError as error:
            _fail(str(error), OUTPUT if isinstance(error, OutputError) else INPUT)
        except BrokenPipeError:
            # Whoever read the results has enough; Python would flush the rest at its end, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(OUTPUT) from None
        except OSError as error:
            if error.filename is None:
                if error.errno in (errno.ENOSPC, errno.EBADF, errno.EIO):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    _fail(f"standard output cannot be written: {error.strerror}.", OUTPUT)
                raise
            _fail(f"{error.filename}: {error.strerror}.", INPUT)
        except (RuntimeError, AssertionError) as error:
            if not _of_the_platform(error):
                raise
            _fail(
                f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such device"
                f"{f' ({error})' if str(error) else ''}; unset it to compute on what there is, or install "
                "the JAX of this device.",
                INPUT,
            )
        except KeyboardInterrupt:
            _fail("interrupted; --resume continues (of analyze: with --checkpoint-dir).", INTERRUPTED)

    return wrapped


def _of_the_platform(error: BaseException) -> bool:
    """Whether JAX could not start its devices, for which it has no type of error: an assertion or a text."""
    frames = traceback.extract_tb(error.__traceback__)
    return "nitialize backend" in str(error) or Path(frames[-1].filename).name == "xla_bridge.py"


@contextlib.contextmanager
def _ending_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, which schedulers send, ends a run as Ctrl-C does: a sentence, and what a later run resumes."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread: whoever runs us there has handlers of their own
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # stderr may be closed or full too
        print(f"jquant: {as_options(' '.join(message.splitlines()))}", file=sys.stderr)
    raise typer.Exit(code)
