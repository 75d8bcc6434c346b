"""Perplexity of a model in W8A8: not smoothed, with one alpha, with searched factors, with error feedback.

    python benchmarks/w8a8.py SmolLM2-135M/ wikitext2-test.txt --calibration wikitext2-train.txt --plant

--plant makes outliers first: in a copy of the model, 6 channels behind each norm of a block are multiplied by
50 and the weights that take them divided by it, so that the copy computes the same. All are run by
`jquant evaluate`'s code in JAX, inputs rounded as the folders declare.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from scores import progress, show

import jquant
from jquant.calibration import load_samples
from jquant.checkpoints.schemes import SCHEMES, asymmetric
from jquant.io.model_folder import files_beside
from jquant.smoothquant import by_range, by_token, fisher_of, search, smoothing
from jquant.text.samples import Text
from jquant.writers.folder import Ingredients, write_folder
from jquant.writers.folder_feedback import feed_back
from jquant.writers.folder_plan import as_stored, open_checkpoint, plan_folder
from jquant.writers.gguf_feedback import Feedback

OUTLIERS, FACTOR = 6, 50.0
FED = ", fed back"
BEHIND = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}


def plant(model: Path, out: Path) -> Path:
    """The copy, float32, of a model of Llama's form."""
    out.mkdir()
    tensors = {n: t.astype(np.float32) for f in model.glob("*.safetensors") for n, t in load_file(f).items()}
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": "float32"}
    rng = np.random.default_rng(0)
    for i in range(config["num_hidden_layers"]):
        channels = rng.choice(config["hidden_size"], OUTLIERS, replace=False)
        for norm, consumers in BEHIND.items():
            tensors[f"model.layers.{i}.{norm}.weight"][channels] *= FACTOR
            for name in tensors:
                if name.startswith(f"model.layers.{i}.") and name.split(".")[-2] in consumers:
                    tensors[name][:, channels] /= FACTOR
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    for file in files_beside(model):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("text", type=Path, help="to be measured on")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--chunks", type=int, help="only the first so many chunks of the text")
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--no-search", action="store_true")
    parser.add_argument("--asymmetric", action="store_true", help="inputs rounded with a zero")
    parser.add_argument(
        "--feedback", action="store_true", help="the last of the others with error feedback too"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir(), "jquant-benchmarks-xla")))
    with tempfile.TemporaryDirectory() as folder:
        model = plant(args.model, Path(folder, "planted")) if args.plant else args.model
        checkpoint = open_checkpoint(model)
        scheme = asymmetric(SCHEMES["W8A8"]) if args.asymmetric else SCHEMES["W8A8"]
        plan = plan_folder(checkpoint, scheme)
        samples = load_samples(
            checkpoint.model,
            str(args.calibration),
            samples=args.samples,
            sequence_length=args.sequence_length,
        )
        start = time.monotonic()
        stats = smoothing.measure(checkpoint.model, samples)
        print(f"measured in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        decoder = smoothing.open_decoder(checkpoint.model)
        made = {"no smoothing": None}
        made |= {f"alpha {alpha:g}": smoothing.fixed(decoder, stats, alpha) for alpha in args.alphas}
        if not args.no_search:
            chosen = set(plan.quantized)
            quantized = frozenset(n for n, w in checkpoint.weights.items() if w.parts[0] in chosen)
            start = time.monotonic()
            rounding = by_range if args.asymmetric else by_token
            fisher = fisher_of(decoder, samples)
            made["searched"] = search(decoder, samples, stats, quantized, fisher, rounding=rounding)
            print(f"searched in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        files = {model: "original"}
        if args.feedback:
            name, found = list(made.items())[-1]
            made[f"{name}{FED}"] = found
        for name, found in made.items():
            out, stored = Path(folder, name), None if found is None else as_stored(checkpoint, found)
            factors = None if stored is None else smoothing.factors(decoder, stored)
            write_folder(
                checkpoint,
                plan,
                out,
                Ingredients(factors or {}, smoothing.importance(decoder, stats, stored)),
                fed=feed_back(checkpoint, plan, Feedback(samples), factors) if name.endswith(FED) else None,
            )
            files[out] = name
        text = Text(args.text.name, args.text.read_bytes())
        found = jquant.evaluate(
            list(files), text=text, chunks=args.chunks, engine="jax", cache=False, progress=progress
        )
        show(args, found, files)


if __name__ == "__main__":
    main()
