"""The `jquant` command: one file per subcommand, heavy imports inside them so that --help answers at once."""

from __future__ import annotations

import io
import sys

import typer

from jquant import __version__

from . import _errors, _serves, analyze, demo, evaluate, inspect, profile, quantize

app = typer.Typer(
    name="jquant",
    help="Quantize language models to GGUF files that llama.cpp runs.",
    epilog=_errors.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"jquant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


app.command("quantize", cls=_serves.Once, epilog=_errors.EXIT_CODES)(quantize.quantize)
app.command("analyze", epilog=_errors.EXIT_CODES)(analyze.analyze)
app.command("evaluate", epilog=_errors.EXIT_CODES)(evaluate.evaluate)
app.command("inspect", epilog=_errors.EXIT_CODES)(inspect.inspect)
app.add_typer(profile.app, name="profile")
app.command("demo", epilog=_errors.EXIT_CODES)(demo.demo)


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    app()
