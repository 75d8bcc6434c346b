"""How many weights a device searches at once."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Grain(NamedTuple):
    """How many weights a device searches at once."""

    tile: int  # weights that go through the whole search before the next do
    chunk: int  # weights of one step of a compiled loop: its fixed shape means one compilation per format


# A CPU's tile is small enough that a block's whole search stays in a core's cache, large enough that the
# vector units are full. An accelerator has a hundred thousand lanes to fill; with twice as many weights what
# a search passes through memory leaves an H200's cache (IQ3_S without a kernel took three times as long).
CPU_GRAIN = Grain(1 << 14, 1 << 15)
ACCELERATOR_GRAIN = Grain(1 << 21, 1 << 21)


def grain() -> Grain:
    """That of the devices in use."""
    return CPU_GRAIN if jax.default_backend() == "cpu" else ACCELERATOR_GRAIN
