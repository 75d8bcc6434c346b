"""Options that several commands have, with one meaning each."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import typer

INPUT, CALIBRATION, OUTPUT, REPORTING = "Input", "Calibration", "Output", "Reporting"
PROCESSES = "Several devices and processes"

Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit on the hub.", rich_help_panel=INPUT),
]
PreTokenizer = Annotated[
    str | None,
    typer.Option(
        "--pre-tokenizer",
        help="GGUF's name of the tokenizer's splitting rule, where it is not recognised.",
        rich_help_panel=INPUT,
    ),
]

# How a command is given the text that it calibrates on.
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "-c",
        help="Text file, JSON lines, parquet, dataset on the hub (org/name:config:split), wikitext2, pydoc, "
        "python (source code). Repeatable, for equal shares. Default: python, and wikitext2 or else pydoc.",
        rich_help_panel=CALIBRATION,
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", min=1, help="At most so many samples.", rich_help_panel=CALIBRATION)
]
SequenceLength = Annotated[
    int, typer.Option("--sequence-length", min=2, help="Tokens of a sample.", rich_help_panel=CALIBRATION)
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", help="Choose samples at random. Default: the first ones.", rich_help_panel=CALIBRATION
    ),
]
ParseSpecial = Annotated[
    bool,
    typer.Option(
        "--parse-special",
        help="Read the texts of special tokens as these tokens.",
        rich_help_panel=CALIBRATION,
    ),
]


class Texts(NamedTuple):
    """What these five say: which text to calibrate on, and how much of it."""

    calibration: list[str] | None
    samples: int
    sequence_length: int
    seed: int | None
    parse_special: bool


Batch = Annotated[
    int, typer.Option("--batch", min=1, help="Samples on the device at a time.", rich_help_panel=CALIBRATION)
]

Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="data=N,model=M: samples over N, weights of a block over M devices. Default: all along data.",
        rich_help_panel=PROCESSES,
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        help="HOST:PORT of process 0, the same for all; or auto: what Cloud TPU, SLURM, Open MPI or "
        "Kubernetes say.",
        rich_help_panel=PROCESSES,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="How many share the work.", rich_help_panel=PROCESSES),
]
Process = Annotated[
    int | None,
    typer.Option(
        "--process", min=0, help="Which of them this is, from 0; that one reports.", rich_help_panel=PROCESSES
    ),
]

Force = Annotated[
    bool,
    typer.Option("--force", "-f", help="Replace the output if it exists.", rich_help_panel=OUTPUT),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=REPORTING)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no remarks.", rich_help_panel=REPORTING)
]


def size_in_bytes(text: str) -> int:
    """Of an option. A wrong command line where it is none."""
    from jquant.core import UserError, human

    try:
        return human.size_in_bytes(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
