"""What commands that calibrate do alike: read the text, say what they noticed, show how far they are."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from . import _runtime, _show

if TYPE_CHECKING:
    from jquant.calibrate import Progress
    from jquant.convert import Model
    from jquant.io.imatrix import Imatrix
    from jquant.io.samples import Samples

_NAMED = 8  # experts in a line


def read(
    model: Model,
    calibration: str | None,
    *,
    samples: int,
    sequence_length: int,
    seed: int | None,
    parse_special: bool,
    quiet: bool,
) -> Samples:
    """Samples of the text that the user named, with what is to be said of them."""
    from jquant.analyze import load_samples

    data = load_samples(
        model,
        calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        parse_special=parse_special,
    )
    if not quiet:
        for remark in data.remarks:
            _show.remark(f"note: {remark}")
    return data


def importance(model: Model, data: Samples, *, batch: int, quiet: bool) -> Imatrix:
    """The importance matrix, measured on all devices."""
    from jquant import analyze

    shown = progress(data, quiet=quiet)
    found = analyze.importance(model, data, batch=batch, mesh=_runtime.mesh(None), progress=shown)
    unreached(found, quiet=quiet)
    return found


def unreached(found: Imatrix, *, quiet: bool) -> dict[str, list[int]]:
    """Experts whose importance is a guess, by tensor; they are named."""
    from jquant import analyze

    guessed = analyze.unreached(found)
    if not quiet:
        for tensor, experts in guessed.items():
            more = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
            _show.remark(
                f"note: {tensor}: no or one token for experts {experts[:_NAMED]}{more}; "
                "they have their stack's mean."
            )
    return guessed


def progress(data: Samples, *, quiet: bool) -> Progress:
    """A line for each block, over the last one on a terminal."""
    tokens = int(data.lengths.sum())
    start, here = time.monotonic(), 0  # blocks done by this run

    def show(done: int, count: int) -> None:
        nonlocal here
        here += 1
        if quiet:
            return
        elapsed = time.monotonic() - start
        left = elapsed / here * (count - done)
        text = f"block {done} of {count}, {tokens * here / count / elapsed:.0f} tokens/s, {left:.0f} s left"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if done == count else "", file=sys.stderr, flush=True)
        elif done == count or done % max(count // 8, 1) == 0:
            _show.remark(text)

    return show
