"""What error feedback and tuning gain: files of the same types and bytes, run in llama.cpp on several texts.

    python benchmarks/feedback.py smol768-f16.gguf --imatrix imatrix.gguf --folder files \
        --calibration wikitext2-train-1MB.txt --types IQ2_XXS Q2_K \
        --texts wikitext2-test-120kB.txt tinystories-130kB.txt

Files that are in the folder already are not made again, so a run goes on where another stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from peers import llama_quantize
from scores import CONTEXT, score

from jquant.calibration import Texts
from jquant.writers import to_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="16-bit GGUF file")
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--calibration", nargs="+", required=True, help="texts, in equal shares")
    parser.add_argument("--samples", type=int, default=42)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--types", nargs="+", default=["IQ2_XXS"])
    parser.add_argument("--kinds", nargs="+", default=["llama.cpp", "importance", "feedback", "tuned"])
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--chunks", type=int, help="only the first so many chunks of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {args.model: "original"}
    for type in args.types:
        for kind in args.kinds:
            file = args.folder / f"{type}-{kind}.gguf"
            if not file.exists():
                start = time.monotonic()
                make(args, file, type, kind)
                print(f"{type} {kind}: {time.monotonic() - start:.0f} s", flush=True)
            files[file] = f"{type} {kind}"
    for text in args.texts:
        print(f"\n{text.name}", flush=True)
        args.text = text
        score(args, files)


def make(args: argparse.Namespace, file: Path, type: str, kind: str) -> None:
    if kind == "llama.cpp":
        llama_quantize(args.model, file, type, args.threads, args.imatrix)
        return
    to_gguf(
        args.model,
        file,
        type=type,
        imatrix=args.imatrix,
        feedback=kind != "importance",
        samples=Texts(args.calibration, args.samples, args.sequence_length),
        effort="best" if kind == "tuned" else "fast",
        resume=True,
    )


if __name__ == "__main__":
    main()
