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
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from peers import llama_quantize
from scores import CONTEXT, score

from jquant.allocation import Target
from jquant.calibration import Texts
from jquant.checkpoints.model import Model, open_model
from jquant.checkpoints.weights import Weights
from jquant.io import imatrix as imatrix_file
from jquant.io.imatrix import Imatrix
from jquant.writers import to_gguf

WEIGHTS = {"search": "gradients", "feedback": "usual"}  # of ways that are none themselves


def energies(model: Model, imatrix: Imatrix) -> dict[str, float]:
    """Σ w x² of each matrix: the factor from relative to absolute errors."""
    found, importance = {}, imatrix.by_tensor(model.source.specs.values())
    for name, spec in model.source.specs.items():
        if len(spec.shape) > 1:
            x = Weights(model.source).rows(name)
            w = importance.get(name, np.ones((1, x.shape[1]), np.float32))
            found[name] = float((np.repeat(w, len(x) // len(w), axis=0) * x * x).sum(dtype=np.float64))
    return found


def make(args: argparse.Namespace, out: Path, size: int, by: str, folder: Path) -> None:
    """A file of this size: of least weighted squared error, or as `jquant quantize` makes it."""
    start, kind = time.monotonic(), WEIGHTS.get(by, by)
    model = open_model(args.model)
    imatrix = imatrix_file.read(args.imatrix)
    texts = Texts([str(args.calibration)] if args.calibration else None, sequence_length=args.context)
    file = to_gguf(
        model,
        out,
        imatrix=imatrix if by == "errors" else args.imatrix,
        target=Target(nbytes=size),
        sensitivity=energies(model, imatrix) if by == "errors" else kind,
        record=folder / f"{'usual' if by == 'errors' else kind}.jsonl",
        samples=replace(texts, samples=args.samples) if by == "feedback" else texts,
        feedback=by == "feedback",
        search_seconds=args.search_seconds if by == "search" else 0.0,
        threads=args.threads,
    )
    if by == "search":
        print(f"search at {size:,} bytes: {file.search}", flush=True)
    print(f"{out.name}: {time.monotonic() - start:.0f} s", flush=True)


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
    parser.add_argument("--samples", type=int, default=32, help="of the calibration text, for feedback")
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


if __name__ == "__main__":
    main()
