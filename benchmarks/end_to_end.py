"""Whole-process time of `jquant quantize` beside llama.cpp's quantizer, on one file, in turn.

    python benchmarks/end_to_end.py smol768-f16.gguf --type Q4_K_M

Reports the cold first run (empty compilation cache), then warm runs in turn with the peer: start-up, reading,
encoding and writing are all counted, for both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

PEER = """
import sys, llama_cpp
source, out, kind, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.nthread = int(threads)
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
log = llama_cpp.llama_log_callback(lambda *args: None)
llama_cpp.llama_log_set(log, None)
assert llama_cpp.llama_model_quantize(source.encode(), out.encode(), params) == 0
"""


def seconds(command: list[str], cache: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "JQUANT_CACHE": str(cache)})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="16-bit GGUF file")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, cache = Path(folder, "ours.gguf"), Path(folder, "theirs.gguf"), Path(folder, "cache")
        quantize = [str(Path(sys.executable).with_name("jquant")), "quantize", str(args.model), str(ours)]
        quantize += ["--type", args.type, "--threads", str(args.threads), "--force", "--quiet"]
        peer = [sys.executable, "-c", PEER, str(args.model), str(theirs), args.type, str(args.threads)]
        cold = seconds(quantize, cache)
        seconds(peer, cache)  # warms the page cache for both
        warm = [(seconds(quantize, cache), seconds(peer, cache)) for _ in range(args.repeats)]
        sizes = ours.stat().st_size, theirs.stat().st_size
    jquant_s, peer_s = (statistics.median(times) for times in zip(*warm, strict=True))
    ratio = statistics.median(ours / theirs for ours, theirs in warm)
    print(f"{args.model.name} → {args.type}, {args.threads} threads, median of {args.repeats}")
    print(f"  jquant, warm cache   {jquant_s:6.2f} s   {sizes[0]:,} bytes")
    print(f"  llama.cpp            {peer_s:6.2f} s   {sizes[1]:,} bytes")
    print(f"  ratio, pair by pair  {ratio:6.2f}")
    print(f"  jquant, first run    {cold:6.2f} s   (compiles)")
    if args.json:
        record(args, {"cold_s": cold, "pairs_s": warm, "bytes": sizes})


if __name__ == "__main__":
    main()
