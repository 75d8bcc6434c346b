"""Perplexity and KL divergence of our files beside llama.cpp's of the same file type, all run in llama.cpp by
what `jquant evaluate` is made of.

    python benchmarks/quality.py smol768-f16.gguf wikitext2-test-120kB.txt --types Q8_0 Q4_K_M Q2_K

With --imatrix both use it. The text is one that neither has seen.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peers import llama_quantize
from scores import score

from jquant.writers import to_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="16-bit GGUF file")
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M"])
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--chunks", type=int, help="only the first so many chunks of the text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {args.model: "original"}
        for kind in args.types:
            ours, theirs = Path(folder, f"jquant-{kind}.gguf"), Path(folder, f"llama.cpp-{kind}.gguf")
            to_gguf(args.model, ours, type=kind, imatrix=args.imatrix)
            llama_quantize(args.model, theirs, kind, args.threads, args.imatrix)
            files |= {ours: f"{kind} jquant", theirs: f"{kind} llama.cpp"}
        score(args, files)


if __name__ == "__main__":
    main()
