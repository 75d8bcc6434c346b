"""Tokens per second of calibration beside llama.cpp's batch evaluation, and peak memory against depth.

    python benchmarks/calibrate.py smol768-f16.gguf wikitext2-train-1MB.txt

Both go through the same samples, with the same number of threads, by turns; llama.cpp computes the logits of
each sample's last token only and collects nothing; its weights are float16, as the file's. The second table
is of models of zeros with more and more blocks of 436 MB in float32: a block, and its activations, are in
memory at a time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from memory import peak
from record import record

from jquant import models
from jquant.calibration import HESSIAN, SECOND_MOMENTS, Calibrator, collect, load_samples
from jquant.checkpoints.model import open_model

WIDTH, FFN, HEADS, VOCAB = 3072, 8192, 24, 1000
SEVEN_B = {"blocks": 32, "width": 4096, "weights": 6.5e9, "tokens": 512 * 2048, "length": 2048}


def rate(tokens: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - start)


def throughput(args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second: medians over the rounds."""
    model = open_model(args.model)
    tokens = load_samples(
        model, str(args.text), samples=args.samples, sequence_length=args.sequence_length
    ).tokens
    decoder = model.decoder()
    llm = llama_cpp.Llama(
        str(args.model), n_ctx=tokens.shape[1], n_batch=tokens.shape[1], n_ubatch=tokens.shape[1],
        n_threads=args.threads, n_threads_batch=args.threads, verbose=False,
    )  # fmt: skip

    def ours(calibrator: Calibrator, precision: models.Precision = "float32") -> None:
        collect(decoder.at(precision), tokens, calibrator)

    def theirs() -> None:
        for sample in tokens:
            llm.reset()
            llm.eval(sample.tolist())

    work = {
        "jquant, second moments": lambda: ours(SECOND_MOMENTS),
        "jquant, second moments, bfloat16": lambda: ours(SECOND_MOMENTS, "bfloat16"),
        "jquant, Hessians": lambda: ours(HESSIAN),
        "llama.cpp": theirs,
    }
    for calibrator, precision in (
        (SECOND_MOMENTS, "float32"),
        (SECOND_MOMENTS, "bfloat16"),
        (HESSIAN, "float32"),
    ):
        collect(decoder.at(precision), tokens[:4], calibrator)  # compiles
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.repeats):
        for name, run in work.items():
            found[name].append(rate(tokens.size, run))
    return {name: statistics.median(rates) for name, rates in found.items()}


def zeros(path: Path, blocks: int) -> None:
    """A float16 GGUF file of a Llama whose weights are a hole in the disk."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(blocks)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_feed_forward_length(FFN)
    writer.add_context_length(2048)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(blocks):
        shapes |= {f"blk.{i}.{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (FFN, WIDTH) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (WIDTH, FFN)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float16), sizes[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 32 + sum(-(-size // 32) * 32 for size in sizes.values()))


def collect_zeros(path: Path) -> None:
    model = open_model(path)
    tokens = np.zeros((8, 128), np.int32)
    collect(model.decoder(), tokens, SECOND_MOMENTS)


def projection(flops_per_second: float) -> str:
    """How long a 7 B model and 512 samples of 2048 tokens would take."""
    s = SEVEN_B
    # Attention: two products over the half of the keys that a token sees.
    attention = 2 * s["blocks"] * s["width"] * s["length"]
    flops = s["tokens"] * (2 * s["weights"] + attention)
    minutes = flops / flops_per_second / 60
    return f"{flops / 1e15:.1f} PFLOP, {minutes:.1f} min at {flops_per_second / 1e12:g} TFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = throughput(args)
    print(f"{args.samples} samples of {args.sequence_length} tokens, tokens/s:")
    for name, value in rates.items():
        print(f"  {name:<24}{value:8.0f}")
    memory = {}
    print("blocks, peak memory:")
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "zeros.gguf")
            zeros(path, blocks)
            command = [sys.executable, __file__, "--zeros", str(path)]
            memory[blocks], seconds = peak(command)
        print(f"  {blocks:4d}  {memory[blocks] / 1e6:7.0f} MB  {seconds:5.1f} s", flush=True)
    print("7 B, 512 × 2048 tokens (projection, not measured):")
    for speed in (30e12, 100e12, 400e12):
        print(f"  {projection(speed)}")
    if args.json:
        record(args, {"tokens_per_second": rates, "peak_bytes": memory})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zeros"]:
        collect_zeros(Path(sys.argv[2]))
    else:
        main()
