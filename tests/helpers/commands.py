"""`jquant …` as a user gives it: in this process, or (JQUANT) in one of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from jquant_cli.main import app

JQUANT = str(Path(sys.executable).with_name("jquant"))


def attempt(*arguments: object) -> Result:
    """The command, however it ends."""
    return CliRunner().invoke(app, [*map(str, arguments)])


def run(*arguments: object, code: int = 0) -> Result:
    """A command that ends with this exit code."""
    result = attempt(*arguments)
    assert result.exit_code == code, result.output
    return result


def printed(*arguments: object) -> str:
    """Standard output of a command that succeeds."""
    return run(*arguments).stdout
