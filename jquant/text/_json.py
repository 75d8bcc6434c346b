"""JSON files as the tokenizers' readers want them: absent files and entries are empty."""

from __future__ import annotations

from collections.abc import Mapping

from jquant.core import UserError, parse_json
from jquant.io.paths import AnyPath

Json = Mapping[str, object]


def read_file(path: AnyPath) -> Json:
    """A JSON table; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); the download may be incomplete.") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: expected a JSON table, found {type(value).__name__}.")
    return value


def read_text(path: AnyPath) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; the download may be incomplete.") from None


def table(value: object) -> Json:
    return value if isinstance(value, Mapping) else {}


def entries(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def steps(value: object, inner: str) -> list[Json]:
    """A step, or the steps of a `Sequence`, which keeps them under `inner`."""
    step = table(value)
    if step.get("type") == "Sequence":
        return [table(part) for part in entries(step.get(inner))]
    return [step] if step else []
