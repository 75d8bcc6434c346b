"""Damaged files, the same for the same seed: what a broken download or an attacker makes of a good one."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable

HUGE = (
    0,
    1,
    0x7F,
    0xFF,
    0xFFFF,
    1 << 20,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
NESTED = 100_000  # deeper than a recursive reader goes


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def with_a_number(data: bytes, rng: random.Random) -> bytes:
    """Four or eight bytes, most of them near the beginning, where headers are, become another count."""
    width = rng.choice((4, 8))
    limit = len(data) if rng.random() < 0.3 else min(len(data), 256)
    at = rng.randrange(max(limit - width, 1))
    value = rng.choice(HUGE) & ((1 << 8 * width) - 1)
    return data[:at] + struct.pack("<I" if width == 4 else "<Q", value) + data[at + width :]


def doubled(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    stop = min(start + rng.randrange(1, 200), len(data))
    return data[:stop] + data[start:stop] + data[stop:]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 200) :]


def with_another_value(data: bytes, rng: random.Random) -> bytes:
    """One value somewhere in a JSON tree becomes one of another type or size; else as `flipped`."""
    try:
        tree = json.loads(data)
    except ValueError:
        return flipped(data, rng)
    place = tree
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            strange = (
                None,
                -1,
                0,
                1e308,
                1 << 70,
                "",
                "\x00",
                [],
                {},
                [[]],
                True,
                "../../etc/passwd",
                "x" * 10_000,
            )
            place[key] = rng.choice(strange)
            break
        place = inner
    return json.dumps(tree).encode()


def nested(data: bytes, rng: random.Random) -> bytes:
    """Brackets without end where a value may stand."""
    at = data.find(b":") + 1
    opening = rng.choice((b"[", b'{"a":'))
    return data[:at] + opening * NESTED + data[at:]


Mutation = Callable[[bytes, random.Random], bytes]
OF_BINARY: tuple[Mutation, ...] = (
    truncated,
    flipped,
    flipped,
    with_a_number,
    with_a_number,
    doubled,
    cut_out,
)
OF_TEXT: tuple[Mutation, ...] = (truncated, flipped, doubled, cut_out, *[with_another_value] * 6, nested)
