"""What commands that calibrate do alike: read the text, say what they noticed, show how far they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import _options, _show

if TYPE_CHECKING:
    from jquant.calibration import Progress
    from jquant.checkpoints.model import Model
    from jquant.io.imatrix import Imatrix
    from jquant.text.samples import Samples


def read(model: Model, texts: _options.Texts, *, quiet: bool) -> Samples:
    """Samples of the texts that the user named, with what is to be said of them."""
    from jquant.calibration import load_samples

    data = load_samples(
        model,
        texts.calibration,
        samples=texts.samples,
        sequence_length=texts.sequence_length,
        seed=texts.seed,
        parse_special=texts.parse_special,
    )
    if not quiet:
        for remark in data.remarks:
            _show.remark(f"note: {remark}")
    return data


def unreached(found: Imatrix, *, quiet: bool) -> dict[str, list[int]]:
    """Experts whose importance is a guess, by tensor; they are named."""
    from jquant import calibration

    guessed = calibration.unreached(found)
    if not quiet:
        for note in calibration.unreached_notes(guessed):
            _show.remark(f"note: {note}")
    return guessed


def progress(data: Samples, *, quiet: bool) -> Progress:
    """A line for each block, over the last one on a terminal."""
    return block_lines(int(data.lengths.sum()), quiet=quiet)


def block_lines(tokens: int, *, quiet: bool) -> Progress:
    """The same where so many tokens go through each block."""
    start, here = time.monotonic(), 0  # blocks done by this run

    def show(done: int, count: int) -> None:
        nonlocal here
        here += 1
        if quiet:
            return
        elapsed = time.monotonic() - start
        left = elapsed / here * (count - done)
        text = f"block {done} of {count}, {tokens * here / count / elapsed:.0f} tokens/s, {left:.0f} s left"
        _over_last_line(text, last=done == count, often=done % max(count // 8, 1) == 0)

    return show


def tuning_lines(*, quiet: bool) -> Callable[[int, int, str], None]:
    """A line for each step with what it reached, over the last one on a terminal. The first is for none."""
    start = None

    def show(done: int, count: int, reached: str) -> None:
        nonlocal start
        now = time.monotonic()
        start = now if start is None else start
        if quiet:
            return
        left = f", {(now - start) / done * (count - done):.0f} s left" if done else ""
        text = f"tuning: step {done} of {count}, {reached}{left}"
        _over_last_line(text, last=done == count, often=done % max(count // 8, 1) == 0)

    return show


def by_block(done_so: str, *, quiet: bool) -> Progress:
    """A line now and then: "searched block 8 of 32"."""

    def show(done: int, count: int) -> None:
        if not quiet and (done == count or done % max(count // 8, 1) == 0):
            _show.remark(f"{done_so} block {done} of {count}")

    return show


def _over_last_line(text: str, *, last: bool, often: bool) -> None:
    """On a terminal; in a log a line where it is the last one or due."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last or often:
        _show.remark(text)
