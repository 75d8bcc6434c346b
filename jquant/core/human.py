"""Numbers and tables as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from jquant.core._errors import UserError

_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_size(nbytes: int | float) -> str:
    """'124.17 MB': powers of 1000, as model hubs count."""
    unit = 0
    while nbytes >= 1000 and unit < len(_UNITS) - 1:
        nbytes /= 1000
        unit += 1
    return f"{nbytes:.2f} {_UNITS[unit]}" if unit else f"{nbytes:.0f} B"


def size_in_bytes(text: str) -> int:
    """'89248832B' → 89248832, '2GB' → 2 · 10⁹, '1.5GiB' → 1.5 · 2³⁰. Raises UserError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i)?B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UserError(f"expected a size such as 2GB or 1.5GiB; got {text!r}")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def human_shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their longest cell; those numbered in `right` are aligned to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(text, [lines[0], ["-" * w for w in widths], *lines[1:]]))
