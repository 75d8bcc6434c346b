"""Notes and progress of the library's jobs as lines on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from . import _calibration, _errors, _show
from ._progress import ProgressBar

if TYPE_CHECKING:
    from jquant.core import Progress, Reporter


@contextlib.contextmanager
def reporter(*, quiet: bool, details: bool) -> Iterator[Reporter]:
    """Who hears a job. details: whether its tables are shown."""
    from jquant.core import SILENT, Reporter

    heard = Reporter(details=_show.remark) if details else SILENT
    if quiet:
        yield heard
        return
    with contextlib.ExitStack() as shown:
        yield replace(heard, note=_note, warning=_warning, progress=_Lines(shown))


def _note(text: str) -> None:
    _show.remark(f"note: {_errors.as_options(text)}")


def _warning(text: str) -> None:
    _show.remark(f"warning: {_errors.as_options(text)}")


class _Lines:
    """Each task in its own manner: blocks with a rate, bytes as a bar, others in a line now and then."""

    def __init__(self, shown: contextlib.ExitStack) -> None:
        self._shown = shown
        self._tasks: dict[str, Callable[[Progress], None]] = {}

    def __call__(self, event: Progress) -> None:
        if event.task not in self._tasks or (event.done == 0 and event.task != "write"):
            self._tasks[event.task] = self._manner(event)
        if event.of:
            self._tasks[event.task](event)

    def _manner(self, event: Progress) -> Callable[[Progress], None]:
        if event.task == "write":
            return _Bar(self._shown.enter_context(ProgressBar(int(event.of), shown=True)))
        if event.task == "search":
            return _search
        if event.task == "tuning":
            steps = _calibration.tuning_lines(quiet=False)
            return lambda event: steps(int(event.done), int(event.of), event.detail)
        lines = {"sensitivity": _counted, "measured": _counted, "balance": _balanced, "smoothing": _searched}
        if event.task in lines:
            return lines[event.task]
        blocks = _calibration.block_lines(event.tokens, quiet=False)
        return lambda event: blocks(int(event.done), int(event.of))


class _Bar:
    """The bar counts what is new."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar, self._done = bar, 0

    def __call__(self, event: Progress) -> None:
        done = int(event.done)
        self._bar(event.detail, done - self._done)
        self._done = done


def _counted(event: Progress) -> None:
    """A line now and then, over the last one on a terminal."""
    is_last = event.done == event.of
    text = f"{event.task}: {event.done:.0f} of {event.of:.0f}"
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\n" if is_last else "", file=sys.stderr)
    elif is_last:
        _show.remark(text)


def _balanced(event: Progress) -> None:
    _calibration.by_block("balanced", quiet=False)(int(event.done), int(event.of))


def _searched(event: Progress) -> None:
    _calibration.by_block("searched", quiet=False)(int(event.done), int(event.of))


def _search(event: Progress) -> None:
    _show.remark(f"search: {event.detail}, at most {event.of - event.done:.0f} s left")
