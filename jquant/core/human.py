"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_size(nbytes: int | float) -> str:
    """'124.17 MB': powers of 1000, as model hubs count."""
    unit = 0
    while nbytes >= 1000 and unit < len(_UNITS) - 1:
        nbytes /= 1000
        unit += 1
    return f"{nbytes:.2f} {_UNITS[unit]}" if unit else f"{nbytes:.0f} B"


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
