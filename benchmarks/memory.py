"""Peak memory of `jquant quantize` for models of growing size: it should be flat.

    python benchmarks/memory.py --gigabytes 1 4 16
    python benchmarks/memory.py --shapes Llama-3-70B --blocks 1 3 --tokenizer SmolLM2-135M --text train.txt

The models are sparse files: a Llama of width 4096 with as many blocks as the size needs, all weights zero.
Memory does not depend on the values; the file that is written is real. With --shapes they are folders of
random weights, of a larger model's width and few of its blocks, that are quantized and analyzed; what all its
blocks would take is the first run and so many times what one more block added.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path

import gguf
import numpy as np
from record import record
from shapes import MODELS, write_folder

WIDTH, FFN, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 32000
BLOCK = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH * KV_HEADS // HEADS, WIDTH),
    "attn_v": (WIDTH * KV_HEADS // HEADS, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (FFN, WIDTH),
    "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN),
}


def sparse_model(path: Path, gigabytes: float) -> int:
    """A float16 GGUF file of about that size (10⁹ bytes); returns its number of blocks."""
    block_bytes = 2 * sum(rows * cols for rows, cols in BLOCK.values())
    blocks = max(1, round((gigabytes * 1e9 - 4 * VOCAB * WIDTH) / block_bytes))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(blocks)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(FFN)
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output.weight": (VOCAB, WIDTH)}
    for block in range(blocks):
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in BLOCK.items()}
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * shape[1]
        writer.add_tensor_info(name, shape, np.dtype(np.float16), nbytes)
        size += nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 32 + size)  # alignment, then a hole where the weights are
    return blocks


def peak(command: list[str]) -> tuple[int, float]:
    """(peak resident bytes of the process as the kernel counts them, seconds)"""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: failed with status {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - start


def few_blocks(args: argparse.Namespace) -> list[dict]:
    """Peak memory and seconds of `quantize` and of `analyze` for a few blocks of a model."""
    config, found = MODELS[args.shapes], []
    print(f"{args.shapes}: command, blocks, peak memory, seconds")
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            model, out = Path(folder, "model"), Path(folder, "out.gguf")
            # In a process of its own: a child's peak begins with that of the process it is forked from.
            shortened = {**config, "num_hidden_layers": blocks}
            make = Process(target=write_folder, args=(model, shortened, args.tokenizer))
            make.start()
            make.join()
            command = str(Path(sys.executable).with_name("jquant"))
            ways = {"quantize": [command, "quantize", str(model), str(out), "--type", args.type, "--quiet"]}
            if args.text is not None:
                ways["analyze"] = [command, "analyze", str(model), "-c", str(args.text), "--quiet"]
                ways["analyze"] += ["--samples", "8", "--batch", "1"]
            for way, words in ways.items():
                nbytes, seconds = peak(words)
                found.append({"command": way, "blocks": blocks, "peak_bytes": nbytes, "seconds": seconds})
                print(f"  {way:8} {blocks:4d}  {nbytes / 1e6:7.0f} MB  {seconds:6.1f}", flush=True)
    few, many = min(args.blocks), max(args.blocks)
    for way in dict.fromkeys(one["command"] for one in found) if many > few else ():
        seconds = {one["blocks"]: one["seconds"] for one in found if one["command"] == way}
        each = (seconds[many] - seconds[few]) / (many - few)
        whole = seconds[few] + each * (config["num_hidden_layers"] - few)
        print(f"  {way}: {each:.1f} s a block; all {config['num_hidden_layers']}: {whole / 60:.0f} min")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument(
        "--folder", type=Path, help="where the output has room (default: the temporary folder)"
    )
    parser.add_argument("--shapes", choices=MODELS, help="of a published model, in place of --gigabytes")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder of a tokenizer, for --shapes")
    parser.add_argument("--text", type=Path, help="to analyze on")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = few_blocks(args) if args.shapes else growing(args)
    if args.json:
        record(args, results)


def growing(args: argparse.Namespace) -> list[dict]:
    results = []
    print(f"{args.type}: model, blocks, peak memory, seconds")
    for gigabytes in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            model, out = Path(folder, "model.gguf"), Path(folder, "out.gguf")
            blocks = sparse_model(model, gigabytes)
            command = [str(Path(sys.executable).with_name("jquant")), "quantize", str(model), str(out)]
            nbytes, seconds = peak([*command, "--type", args.type, "--quiet"])
        results.append({"gigabytes": gigabytes, "blocks": blocks, "peak_bytes": nbytes, "seconds": seconds})
        print(f"  {gigabytes:5.1f} GB  {blocks:4d}  {nbytes / 1e6:7.0f} MB  {seconds:6.1f}", flush=True)
    return results


if __name__ == "__main__":
    main()
