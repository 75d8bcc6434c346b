"""KL divergence of files of a target size beside those of llama.cpp of the same size, run by llama.cpp.

    python benchmarks/dynamic.py smol768-f16.gguf wikitext2-test.txt --imatrix imatrix.gguf \\
        --calibration wikitext2-train.txt --types Q4_K_M Q2_K IQ2_XXS --by errors usual gradients

Each type is made by llama.cpp's quantizer; its size is the target of the others. `errors` minimises the sum
of weighted squared errors alone; `usual`, `gradients` and `measured` are what --weights takes; `search` goes
on from the gradients for --search-seconds; `feedback` is the usual weights' plan with error feedback. Neither
calibration nor tuning has seen the text. Files that are in the folder are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from peers import llama_quantize
from scores import CONTEXT, score

from jquant.allocation import _fit as dynamic
from jquant.allocation.candidates import candidates
from jquant.checkpoints.model import Model, open_model
from jquant.checkpoints.weights import Weights
from jquant.io import imatrix as imatrix_file
from jquant.plan import runtime_types, settle
from jquant.writers.gguf import write_gguf

WEIGHTS = {"search": "gradients", "feedback": "usual"}  # of ways that are none themselves
JQUANT = str(Path(sys.executable).with_name("jquant"))


def energies(model: Model, importance: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
    """Σ w x² of each tensor: the factor from relative to absolute errors."""
    found = {}
    for name in names:
        x = Weights(model.source).rows(name)
        w = importance.get(name, np.ones((1, x.shape[1]), np.float32))
        found[name] = float((np.repeat(w, len(x) // len(w), axis=0) * x * x).sum(dtype=np.float64))
    return found


def by_errors(args: argparse.Namespace, out: Path, size: int, record_file: Path) -> None:
    """The file of least weighted squared error."""
    model, imatrix = open_model(args.model), imatrix_file.read(args.imatrix)
    settled = settle(model.source.specs, model.metadata, has_imatrix=True)
    found = candidates(settled, None, runtime_types("llama.cpp-cpu"), imatrix.entries)
    target = dynamic.Target(nbytes=size)
    weights = energies(model, dynamic.importance_of(model, imatrix), list(found.within))
    found = dynamic.shortlist(model, settled, found, weights, target)
    record = dynamic.open_record(model, imatrix, record_file)
    measured = dynamic.measured(model, imatrix, found, weights, record)
    plan = dynamic.fit(model, settled, found, measured, target, imatrix=imatrix)
    write_gguf(model, plan, out, imatrix=imatrix, threads=args.threads)


def by_command(args: argparse.Namespace, out: Path, size: int, by: str, record_file: Path) -> None:
    """The file that `jquant quantize` makes."""
    command = [
        JQUANT,
        "quantize",
        str(args.model),
        str(out),
        "--target-size",
        f"{size}B",
        "--quiet",
        "--json",
    ]
    command += ["--imatrix", str(args.imatrix), "--sensitivity", str(record_file)]
    command += ["--weights", WEIGHTS.get(by, by)]
    if args.calibration and by != "usual":
        command += ["--calibration", str(args.calibration), "--sequence-length", str(args.context)]
    command += ["--feedback", "--samples", args.samples] if by == "feedback" else []
    command += ["--search-seconds", str(args.search_seconds)] if by == "search" else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    if by == "search":
        print(f"search at {size:,} bytes: {json.loads(done.stdout)['search']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="16-bit GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="text for gradients and search")
    kinds = ["Q4_K_M", "Q3_K_M", "Q2_K", "IQ3_XXS", "IQ2_M", "IQ2_XXS"]
    parser.add_argument("--types", nargs="+", default=kinds)
    ways = ["errors", "usual", "gradients", "measured", "search", "feedback"]
    parser.add_argument("--by", nargs="+", choices=ways, default=["errors", "usual", "gradients"])
    parser.add_argument("--search-seconds", type=float, default=600.0)
    parser.add_argument("--samples", default="32", help="of the calibration text, for feedback")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of samples and chunks")
    parser.add_argument("--folder", type=Path, help="to keep the files in, and what is measured of the model")
    parser.add_argument("--chunks", type=int, help="only the first so many chunks of the text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = {args.model: "original"}
        for kind in args.types:
            theirs = folder / f"{kind}-llama.cpp.gguf"
            if not theirs.exists():
                llama_quantize(args.model, theirs, kind, args.threads, args.imatrix)
            files[theirs] = f"{kind} llama.cpp"
            for by in args.by:
                ours, size = folder / f"{kind}-{by}.gguf", theirs.stat().st_size
                if not ours.exists():
                    make(args, ours, size, by, folder)
                assert ours.stat().st_size <= size
                files[ours] = f"{kind} {by}"
        score(args, files)


def make(args: argparse.Namespace, out: Path, size: int, by: str, folder: Path) -> None:
    start = time.monotonic()
    if by == "errors":
        by_errors(args, out, size, folder / "usual.jsonl")
    else:
        by_command(args, out, size, by, folder / f"{WEIGHTS.get(by, by)}.jsonl")
    print(f"{out.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
