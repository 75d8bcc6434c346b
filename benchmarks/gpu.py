"""What jquant does a second on one GPU, beside the chip's own limits.

    python benchmarks/gpu.py limits encoders calibration int8 feedback [--json gpu.json]
    python benchmarks/gpu.py model --tokenizer smol135 --text wikitext2-train-1MB.txt --folder /dev/shm/7B

limits: a large copy and a large product of bfloat16: what this chip can move and multiply. encoders: weights
on the device to bytes on the device, and that the bytes decode as gguf-py decodes them. calibration: a block
of Llama-2-7B with its statistics. int8: a linear layer of W8A8 beside bfloat16. feedback: one matrix with its
factor. model: a 7 B of random weights from a folder to IQ2_XXS with its importance, by the command line;
--error-feedback: with that.
Figures are medians of several runs; what is compiled is timed apart. Without a GPU it runs on the CPU: use
--small.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from shapes import MODELS, Headers, block_shapes, write_folder

from jquant import SCALED_FORMATS, core, models, quantize
from jquant import calibration as calibrate
from jquant.calibration import HESSIAN, SECOND_MOMENTS
from jquant.formats import FORMATS
from jquant.int8 import int8_rows, matmul, xla_dot
from jquant.int8 import rounding as activations
from jquant.ldlq import ldlq as feedback

PEAK = 989e12  # bfloat16 products of an H100 or H200 SXM, dense, as NVIDIA's data sheet has it
TYPES = (  # what compiles fast first
    *("Q8_0", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0"),
    *("IQ2_XXS", "IQ3_XXS", "IQ2_S", "IQ3_S", "IQ2_XS", "IQ1_S", "IQ1_M"),
)

Row = dict[str, object]


def seconds(work: Callable[[], object], repeats: int, queued: int = 1) -> tuple[float, float]:
    """(first run, median of the others, of one of so many that are waited for together)."""
    start = time.perf_counter()
    made = jax.block_until_ready(work())
    first, times = time.perf_counter() - start, []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queued):
            made = work()
        jax.block_until_ready(made)
        times.append((time.perf_counter() - start) / queued)
    return first, statistics.median(times)


def limits(args: argparse.Namespace) -> Iterator[Row]:
    n = 1024 if args.small else 8192
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    _, s = seconds(partial(jax.jit(lambda a: a @ a), a), args.repeats)
    yield {"what": f"bfloat16 product {n}", "TFLOP/s": 2 * n**3 / s / 1e12}
    big = jnp.ones((1 << (20 if args.small else 30),), jnp.float32)
    _, s = seconds(partial(jax.jit(lambda a: a + 1), big), args.repeats)
    yield {"what": "copy", "GB/s": 2 * big.nbytes / s / 1e9}
    host = np.ones(1 << (20 if args.small else 27), np.float32)
    _, s = seconds(partial(jax.device_put, host), args.repeats)
    yield {"what": "to the device", "GB/s": host.nbytes / s / 1e9}
    there = jnp.asarray(host)
    _, s = seconds(lambda: np.asarray(there + 1), args.repeats)
    yield {"what": "from the device", "GB/s": host.nbytes / s / 1e9}


def encoders(args: argparse.Namespace) -> Iterator[Row]:
    rows, cols = (64, 4096) if args.small else (16384, 4096)
    x = 0.02 * jax.random.t(jax.random.key(0), 5.0, (rows, cols), jnp.float32)
    w = jnp.exp(jax.random.normal(jax.random.key(1), (cols,), jnp.float32))
    deadline = time.perf_counter() + args.budget
    for name in args.types:
        if time.perf_counter() > deadline:
            print(f"no time left for {name}", flush=True)
            continue
        format = FORMATS[name]

        def encode(x: jax.Array = x, format: core.Format = format) -> jax.Array:
            return quantize(x, format, w).parts["blocks"]

        first, s = seconds(encode, args.repeats)
        data = np.asarray(encode()[:64])
        kind = gguf.GGMLQuantizationType(format.ggml_type)
        theirs = gguf.quants.dequantize(data, kind).astype(np.float64)
        ours = np.asarray(core.dequantize(core.QuantizedTensor({"blocks": jnp.asarray(data)}, format)))
        given = np.asarray(x[:64], np.float64)
        error = np.sum(np.asarray(w) * (given - theirs) ** 2) / np.sum(np.asarray(w) * given**2)
        yield {
            "what": name,
            "Gweights/s": x.size / s / 1e9,
            "GB/s": x.size * (4 + format.bpw / 8) / s / 1e9,
            "compile s": first - s,
            "error": float(error),
            "decodes as gguf-py": bool((ours == theirs).all()),
        }


def calibration(args: argparse.Namespace) -> Iterator[Row]:
    """Samples on the device through a block, as `calibrate.through_block` does it."""
    config = MODELS["Llama-2-7B"]
    tokens, batch = (64, 1) if args.small else (2048, 4)
    decoder = models.decoder(Headers(config), Headers(config).metadata)
    rng = jax.random.key(0)
    x = jax.random.normal(rng, (batch, tokens, config["hidden_size"]), jnp.float32)
    real = jnp.full(batch, tokens, jnp.int32)
    weights = sum(a * b for a, b in (s for s in block_shapes(config).values() if len(s) > 1))
    heads = config["hidden_size"] * tokens * tokens / 2
    flops = 2 * batch * tokens * weights + 2 * 2 * batch * heads
    for precision in ("bfloat16", "float32"):
        block = decoder.at(precision).blocks[0]
        angles = jnp.zeros((tokens, block.rotary_dims // 2))

        def value(_: str, shape: tuple[int, ...], precision: str = precision) -> jax.Array:
            made = 0.02 * jax.random.normal(rng, shape, jnp.float32)
            return made.astype(precision) if len(shape) > 1 else jnp.ones(shape)

        params = core.block_parameters(block.shapes, value)
        for what, calibrator, more in (("imatrix", SECOND_MOMENTS, 0), ("Hessians", HESSIAN, 1)):
            inputs = ("attn_k", "attn_output", "ffn_down", "ffn_gate")
            made = calibrate.init_all(block, lambda shape, c=calibrator: c.init(shape[-1]))
            stats = {name: jax.tree.map(jnp.copy, made[name]) for name in inputs}
            widths = [dict(block.shapes)[f"{name}.weight"][1] for name in inputs]
            operations = flops + more * sum(2 * batch * tokens * width**2 for width in widths)

            run = partial(calibrate._step, block, calibrator, params)

            def step(run: Callable = run, angles: jax.Array = angles) -> object:
                nonlocal stats
                y, stats = run(stats, x, angles, real)
                return y, stats

            first, s = seconds(step, args.repeats, queued=4)
            yield {
                "what": f"block of 7 B, {what}, {precision}",
                "ms": 1e3 * s,
                "TFLOP/s": operations / s / 1e12,
                "share of peak": operations / s / PEAK,
                "minutes for 7 B, 512 × 2048": 512 / batch * s * 32 / 60,
                "compile s": first - s,
            }


def int8(args: argparse.Namespace) -> Iterator[Row]:
    sizes = [(4096, 4096, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (16384, 11008, 4096)]
    for n, out, depth in [(256, 256, 256)] if args.small else sizes:
        x = jax.random.normal(jax.random.key(0), (n, depth), jnp.bfloat16)
        W = 0.02 * jax.random.normal(jax.random.key(1), (out, depth), jnp.bfloat16)
        w = quantize(W, SCALED_FORMATS["INT8"])
        codes = jax.random.randint(jax.random.key(2), (n, depth), -127, 128, jnp.int8)
        others = jnp.ones((n, 1)), w.parts["weight"], w.parts["weight_scale"]
        work = {
            "bfloat16": partial(jax.jit(lambda x, W: x @ W.T), x, W),
            "int8 layer": partial(jax.jit(_as_bfloat16), x, w),
            "int8 product and scales": partial(jax.jit(xla_dot), codes, *others),
            "int8 product": partial(jax.jit(_integers), codes, w.parts["weight"]),
            "inputs rounded": partial(jax.jit(int8_rows), x),
            "inputs rounded by XLA": partial(jax.jit(activations.int8), x),
        }
        rounded = jax.jit(int8_rows)(x)
        taken = {name: seconds(f, args.repeats, queued=20)[1] for name, f in work.items()}
        yield {
            "what": f"{n} × {out} × {depth}",
            **{f"{name} ms": 1e3 * s for name, s in taken.items()},
            "times bfloat16": taken["bfloat16"] / taken["int8 layer"],
            "rounded as NumPy rounds": all(map(np.array_equal, rounded, _rounded(np.asarray(x, np.float32)))),
        }


def _rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, each division rounded once."""
    scales = np.max(np.abs(x), axis=1, keepdims=True) / np.float32(activations.LARGEST["int8"])
    return np.clip(np.rint(x / scales), -128, 127).astype(np.int8), scales


def _as_bfloat16(x: jax.Array, w: core.QuantizedTensor) -> jax.Array:
    return matmul(x, w).astype(jnp.bfloat16)


def _integers(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def feedbacks(args: argparse.Namespace) -> Iterator[Row]:
    width, rows = (512, 512) if args.small else (4096, 4096)
    x = jax.random.normal(jax.random.key(0), (2 * width, width))
    H = x.T @ x
    W = 0.02 * jax.random.normal(jax.random.key(1), (rows, width))
    for name in args.feedback_types:
        G = FORMATS[name].group_size
        first, s = seconds(lambda G=G: feedback.factor(H, G), args.repeats)
        yield {"what": f"factor of {width}, groups of {G}", "s": s, "compile s": first - s}
        factors = feedback.factor(H, G)
        code = partial(feedback.feedback, W, factors, FORMATS[name])
        first, s = seconds(lambda code=code: code().parts["blocks"], 1)
        what = f"feedback {rows} × {width}, {name}"
        yield {"what": what, "s": s, "Mweights/s": W.size / s / 1e6, "compile s": first - s}


def model(args: argparse.Namespace) -> Iterator[Row]:
    config = {**MODELS["Llama-2-7B"], "vocab_size": 49152}
    if args.small:
        config |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    start = time.perf_counter()
    shutil.rmtree(args.folder, ignore_errors=True)
    count = write_folder(args.folder, config, args.tokenizer)
    print(f"{count / 1e9:.2f} G weights written in {time.perf_counter() - start:.0f} s", flush=True)
    text = args.folder / "calibration.txt"
    text.write_text(args.text.read_text(encoding="utf-8") * 5, encoding="utf-8")
    samples, length = ("8", "64") if args.small else (args.samples, args.sequence_length)
    command = [sys.executable, "-c", "from jquant_cli.main import main; main()", "quantize"]
    command += [str(args.folder), str(args.folder / "out.gguf"), "--type", "IQ2_XXS", "--force"]
    command += ["--analyze", "--calibration", str(text), "--samples", samples, "--sequence-length", length]
    command += ["--feedback" if args.error_feedback else "--no-feedback", *args.more]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    what = f"7 B to IQ2_XXS with {'error feedback' if args.error_feedback else 'importance'}"
    yield {"what": what, "s": time.perf_counter() - start, "weights": count}


PARTS = {
    "limits": limits,
    "encoders": encoders,
    "calibration": calibration,
    "int8": int8,
    "feedback": feedbacks,
    "model": model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--feedback-types", nargs="+", default=["Q4_K", "IQ2_XXS"])
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no encoder is begun")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU: does it run at all?")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder of a tokenizer")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--samples", default="512")
    parser.add_argument("--sequence-length", default="2048")
    parser.add_argument("--error-feedback", action="store_true", help="part model: with error feedback")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/jquant-7B"))
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="options of jquant quantize")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    found = []
    for part in args.parts:
        for row in PARTS[part](args):
            found.append(row)
            print(
                ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True,
            )
    if args.json:
        from record import record

        record(args, found)


if __name__ == "__main__":
    main()
