"""Exit codes, and one line instead of a traceback for what a user can mend."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, ParamSpec

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


def one_line_errors(command: Callable[_Options, None]) -> Callable[_Options, None]:
    """The command, with user errors turned into a line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: _Options.args, **kwargs: _Options.kwargs) -> None:
        from jquant.core import OutputError, UserError
        from jquant.distributed.mesh import LostError, leave, together

        try:
            with _ending_as_ctrl_c(), together():
                command(*args, **kwargs)
                sys.stdout.flush()  # here, where a full disk can still be told
        except LostError as error:
            print(f"jquant: {error}", file=sys.stderr, flush=True)
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
        print(f"jquant: {' '.join(message.splitlines())}", file=sys.stderr)
    raise typer.Exit(code)
