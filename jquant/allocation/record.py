"""What was measured of tensors, kept in a file, so that an interrupted run goes on and others take it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jquant.core import UserError


class Record:
    """Errors and weights in a file of one JSON object a line, so that an interrupted run goes on.

    The first line says what they were measured on; a file that says otherwise is refused.
    """

    def __init__(self, path: Path | None, run: Mapping[str, object]):
        """Reads the file where it is there. Raises UserError where it is of another run or damaged."""
        self.path = path
        self.errors: dict[str, dict[str, float]] = {}
        self.weights: dict[str, float] = {}
        if path is None:
            return
        lines = _lines(path)
        about = next(lines, None)
        if about is None:
            path.write_text(json.dumps(run) + "\n", encoding="utf-8")
        elif about != json.loads(json.dumps(run)):
            differ = sorted(key for key in run if about.get(key) != json.loads(json.dumps(run[key])))
            raise UserError(
                f"{path}: was measured with another {', '.join(differ) or 'version'}; "
                "name another file, or remove this one."
            )
        for line in lines:
            if "weights" in line:
                self.weights |= line["weights"]
            else:
                self.errors.setdefault(line["tensor"], {}).update(line["errors"])

    def add_errors(self, name: str, errors: Mapping[str, float]) -> None:
        self.errors.setdefault(name, {}).update(errors)
        self._write({"tensor": name, "errors": dict(errors)})

    def add_weights(self, weights: Mapping[str, float]) -> None:
        self.weights |= weights
        self._write({"weights": dict(weights)})

    def _write(self, line: Mapping[str, object]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> Iterator[dict]:
    """The objects of a file, none where there is no file; a last line that was cut off is left out."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines = lines[:-1]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: no JSON object; it is not what jquant wrote. Remove it.")
        yield value
