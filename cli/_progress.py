"""Progress with rate and remaining time, on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from . import _show

LOG_SECONDS = 15.0  # between two lines where stderr is no terminal


class ProgressBar:
    """Counts bytes of the source. Called from several threads."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._done, self._earlier, self._shown = max(total, 1), 0, 0, shown
        self._lock = threading.Lock()
        self._start = self._last_line = time.monotonic()
        self._bar = self._task = None

    def __enter__(self) -> ProgressBar:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            columns = (
                TextColumn("{task.description:<32}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, name: str, done: int) -> None:
        """`done` more bytes, the last of them of tensor `name`; without name, those that lay there before."""
        with self._lock:
            self._done += done
            if not name:
                self._earlier += done
                self._start = time.monotonic()  # error feedback may have taken its time
                if self._bar is not None and self._task is not None:
                    self._bar.reset(self._task, completed=self._done)
            elif self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=self._done, description=name)
            elif self._shown and time.monotonic() - self._last_line > LOG_SECONDS:
                self._last_line = time.monotonic()
                _show.remark(self._line(name))

    def _line(self, name: str) -> str:
        from jquant.core.human import human_size  # here, for jquant brings JAX with it

        elapsed = time.monotonic() - self._start
        left = elapsed * (self._total - self._done) / (self._done - self._earlier)
        return f"{100 * self._done / self._total:3.0f}%  {human_size(self._done)}  {left:.0f} s left  {name}"


class TaskProgress:
    """Share and remaining time of one task after another: over the last line on a terminal, else in lines
    now and then."""

    def __init__(self, shown: bool) -> None:
        self._shown, self._task = shown, ""
        self._start = self._last_line = time.monotonic()

    def __call__(self, name: str, task: str, share: float) -> None:
        now, label = time.monotonic(), f"{name}: {task}"
        if label != self._task:
            self._task, self._start = label, now
        if not self._shown:
            return
        left = (now - self._start) / share * (1 - share) if share > 0 else 0.0
        line = f"{label} {share:.0%}, {left:.0f} s left" if now > self._start else f"{label} {share:.0%}"
        if sys.stderr.isatty():
            end = "\n" if share >= 1 else ""
            print(f"\r\x1b[K{line}", end=end, file=sys.stderr, flush=True)
        elif now - self._last_line > LOG_SECONDS:
            self._last_line = now
            _show.remark(line)
