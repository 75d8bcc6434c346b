"""What a long job says while it runs, and to whom: the same few things, whatever shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Progress(NamedTuple):
    """How far a task is. A task begins with `done` 0; how much there is to do may not be known before."""

    task: str  # "importance", "balance", "sensitivity", "feedback", "write", …
    done: float
    of: float  # blocks, steps, bytes of the source, or seconds
    detail: str = ""  # in words: the tensor that is being written, what a search has reached
    tokens: int = 0  # that go through each block, where a model runs


def _nobody(event: object) -> None:
    pass


@dataclass(frozen=True)
class Reporter:
    """Who hears what a job says; by default nobody. Called from several threads, but not at once."""

    note: Callable[[str], None] = _nobody  # what the user should know: one sentence
    warning: Callable[[str], None] = _nobody  # what should be done about the result
    progress: Callable[[Progress], None] = _nobody
    details: Callable[[str], None] = _nobody  # tables for those who ask for more

    @property
    def is_heard(self) -> bool:
        """Whether notes reach anyone: some take time to find."""
        return self.note is not _nobody

    def steps(self, task: str, *, tokens: int = 0) -> Callable[[int, int], None]:
        """What a task that counts its steps calls after each with (done, of). The task begins now."""
        self.progress(Progress(task, 0, 0, tokens=tokens))
        return lambda done, of: self.progress(Progress(task, done, of, tokens=tokens))


SILENT = Reporter()
