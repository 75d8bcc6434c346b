"""JSON that someone else wrote."""

from __future__ import annotations

import json
from collections.abc import Callable


def parse_json(
    text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, object]]], object] | None = None
) -> object:
    """What the text says. Raises ValueError where it is no JSON, and where it is nested too deeply to be
    read, for which Python raises a RecursionError."""
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
