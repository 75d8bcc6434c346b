"""`jquant analyze MODEL -o importance.gguf`."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import _calibration, _errors, _options, _runtime, _show
from ._options import OUTPUT


class Method(str, Enum):
    imatrix = "imatrix"
    fisher = "fisher"
    hessian = "hessian"
    ranges = "ranges"


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@_errors.one_line_errors
def analyze(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, GGUF file, hub id such as org/name, or URL: gs://….")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write: GGUF, or llama.cpp's older form where its name ends in .dat; safetensors "
            "for the methods hessian and ranges.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            "--method",
            "-m",
            help="imatrix: mean squares of inputs. fisher: mean squares of gradients; --imatrix takes both. "
            "hessian: products of inputs. ranges: extremes, moments, histograms.",
            rich_help_panel=OUTPUT,
        ),
    ] = Method.imatrix,
    calibration: _options.Calibration = None,
    samples: _options.Samples = 512,
    sequence_length: _options.SequenceLength = 512,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            "--merge",
            help="Importance matrix, GGUF or .dat, of the same model to add to the output. Repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    seed: _options.Seed = None,
    parse_special: _options.ParseSpecial = False,
    batch: _options.Batch = 4,
    revision: _options.Revision = None,
    pre_tokenizer: _options.PreTokenizer = None,
    super_weights: Annotated[
        bool,
        typer.Option(
            "--super-weights",
            help="Search single weights without which the model is lost, and measure the loss without each.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint-dir",
            help="Folder to keep activations and results in after each block; of no use to later runs.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run that --checkpoint-dir holds.", rich_help_panel=OUTPUT
        ),
    ] = False,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            help="Folder for figures, PNG and SVG: importance, outlier channels, super weights.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: _options.Force = False,
    precision: Annotated[
        Precision | None,
        typer.Option(
            "--precision",
            help="Of the factors of products; sums are float32. Default: float32 on a CPU, else bfloat16.",
            rich_help_panel=_options.CALIBRATION,
        ),
    ] = None,
    mesh: _options.Mesh = None,
    coordinator: _options.Coordinator = None,
    processes: _options.Processes = None,
    process: _options.Process = None,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Measure which input channels of each matrix matter, on a text: an importance matrix.

    jquant analyze SmolLM2-135M/ -o importance.gguf --calibration train.txt
    """
    if resume and checkpoint_dir is None:
        raise typer.BadParameter("needs --checkpoint-dir", param_hint="--resume")
    if method in (Method.hessian, Method.ranges):
        if output is None or output.suffix != ".safetensors":
            hint = f"--method {method.value}"
            raise typer.BadParameter("needs --output with a name that ends in .safetensors", param_hint=hint)
        if merge:
            raise typer.BadParameter(f"adds to no {method.value}", param_hint="--merge")
    if method is Method.fisher and output is not None and output.suffix == ".dat":
        raise typer.BadParameter(
            "a .dat file cannot say that it is of --method fisher", param_hint="--output"
        )
    if method is Method.fisher and precision is Precision.bfloat16:
        raise typer.BadParameter("--method fisher computes in float32", param_hint="--precision")
    start = time.monotonic()
    _runtime.start_jax()
    reports = _runtime.join(coordinator, processes, process)
    quiet = quiet or not reports

    from jquant.calibration import STATISTICS, Found, measure, report
    from jquant.calibration import super_weights as protection
    from jquant.calibration.report import as_json, rows, table
    from jquant.checkpoints import open_model
    from jquant.io import check_no_input, check_target
    from jquant.io import imatrix as imatrix_file
    from jquant.text.samples import check

    devices = _runtime.mesh(mesh)
    # Slips of the command line show before a download, and those that need the model before the calibration.
    if output is not None:
        check_target(output, force=force)
        check_no_input(output, [model, *(merge or ()), *(calibration or ())])
    if figures is not None:
        report.check_figures(figures, force=force)
    earlier = [imatrix_file.read(file) for file in merge or []]
    for name in calibration or ():
        check(name)
    opened = open_model(model, pre_tokenizer=pre_tokenizer, revision=revision)
    if output is not None:
        check_no_input(output, opened.files)
    for file, matrix in zip(merge or [], earlier, strict=True):
        imatrix_file.check_model(file, matrix, opened.source.specs)
        imatrix_file.check_method(file, matrix, method.value)
    texts = _options.Texts(calibration, samples, sequence_length, seed, parse_special)
    data = _calibration.read(opened, texts, quiet=quiet)
    if super_weights:
        protection.loss_tokens(data)
    found = measure(
        method.value,
        opened,
        data,
        output=output,
        seed=seed or 0,
        batch=batch,
        checkpoint=checkpoint_dir,
        resume=resume,
        force=force,
        mesh=devices,
        precision=None if precision is None else precision.value,
        progress=_calibration.progress(data, quiet=quiet),
    )
    if not reports:
        return
    guessed = _calibration.unreached(found, quiet=quiet)
    found = imatrix_file.merge([*earlier, found])
    if output is not None and method.value not in STATISTICS:  # which are written block by block
        found.write(output, force=force)
    single = protection.super_weights(opened, data) if super_weights else Found([], [])
    specs = opened.source.specs
    drawn = [] if figures is None else report.write_figures(figures, found, single.harmful, specs)
    named = {"super_weights": single.harmful, "harmless_spikes": single.harmless}
    about = {
        "model": model,
        "method": method.value,
        "output": None if output is None else str(output),
        "dataset": data.dataset,
        "sha256": data.digest,
        "samples": len(data.tokens),
        "sequence_length": sequence_length,
        "tokens": int(data.lengths.sum()),
        "experts_without_data": guessed,
        **({"figures": [str(path) for path in drawn]} if drawn else {}),
        **({name: as_json(weights) for name, weights in named.items()} if super_weights else {}),
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": _runtime.peak_memory(),
    }
    if json:
        _show.result_json({**about, "rows": as_json(rows(found))})
        return
    _show.result(table(rows(found)))
    if super_weights:
        _show.result(f"\n{protection.table(single)}")
    where = f"; written to {output}" if output is not None else ""
    where += f"; {len(drawn)} figures in {figures}" if drawn else ""
    _show.result(
        f"\n{about['tokens']} tokens of {data.dataset} in {about['samples']} samples, "
        f"{about['seconds']:.1f} s{where}"
    )
