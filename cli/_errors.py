"""Exit codes, and one line instead of a traceback for what a user can mend."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

_Options = ParamSpec("_Options")

INTERNAL = 1  # a fault of ours: Python's own exit code, with the traceback that a bug report needs
USAGE = 2  # typer's: an unknown option, a missing argument
INPUT = 3  # the model, the imatrix or a rule cannot be used
OUTPUT = 4  # the output exists, cannot be written, or the disk is full
INCOHERENT = 5  # --check: the file was written, but does not speak
UNREACHED = 6  # --target-error: the folder was written, but smoothing leaves more error than that
INTERRUPTED = 130  # Ctrl-C; --resume continues

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
            with together():
                command(*args, **kwargs)
        except LostError as error:
            print(f"jquant: {error}", file=sys.stderr, flush=True)
            leave(INPUT)
        except UserError as error:
            _fail(str(error), OUTPUT if isinstance(error, OutputError) else INPUT)
        except OSError as error:
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}.", INPUT)
        except KeyboardInterrupt:
            _fail("interrupted; --resume continues (of analyze: with --checkpoint-dir).", INTERRUPTED)

    return wrapped


def _fail(message: str, code: int) -> None:
    print(f"jquant: {' '.join(message.splitlines())}", file=sys.stderr)
    raise typer.Exit(code)
