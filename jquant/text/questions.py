"""Multiple-choice questions from JSON lines, in the form of ARC's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jquant.core import UserError, parse_json


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice


def read(path: Path) -> list[Question]:
    """{"question": …, "choices": {"text": […], "label": […]}, "answerKey": …} on each line.

    Raises UserError, with the line, where the file cannot be read or a line is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a file of JSON lines.") from None
    found = [_question(line, f"{path.name}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: has no questions.")
    return found


def _question(line: str, where: str) -> Question:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}).") from None
    entry = entry if isinstance(entry, Mapping) else {}
    text, choices, key = entry.get("question"), entry.get("choices"), entry.get("answerKey")
    texts, labels = (choices.get(k) if isinstance(choices, Mapping) else None for k in ("text", "label"))
    if not isinstance(text, str) or not isinstance(texts, list) or not isinstance(labels, list):
        raise UserError(
            f'{where}: expected {{"question": …, "choices": {{"text": […], "label": […]}}, "answerKey": …}}.'
        )
    if len(texts) != len(labels) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
        found = f"{len(texts)} choices for {len(labels)} labels"
        raise UserError(f"{where}: has {found}; give two or more, all with a text.")
    return Question(text, tuple(texts), labels.index(key))
