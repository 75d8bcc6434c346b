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
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from scores import progress, show

import jquant
from jquant.io.model_folder import files_beside
from jquant.text.samples import Text

OUTLIERS, FACTOR = 6, 50.0
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
        opened = jquant.open_model(model)
        samples = jquant.load_samples(
            opened, args.calibration, samples=args.samples, sequence_length=args.sequence_length
        )
        runs: dict[str, dict[str, Any]] = {"no smoothing": {"smooth": False}}
        runs |= {f"alpha {alpha:g}": {"alpha": alpha} for alpha in args.alphas}
        if not args.no_search:
            runs["searched"] = {}
        if args.feedback:
            name, arguments = list(runs.items())[-1]
            runs[f"{name}, fed back"] = arguments | {"feedback": True}
        files = {model: "original"}
        for name, arguments in runs.items():
            out, start = Path(folder, name), time.monotonic()
            arguments = {"feedback": False, "keep": "none"} | arguments
            jquant.to_folder(
                opened, out, samples=samples, asymmetric_activations=args.asymmetric, **arguments
            )
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            files[out] = name
        text = Text(args.text.name, args.text.read_bytes())
        found = jquant.evaluate(
            list(files), text=text, chunks=args.chunks, engine="jax", cache=False, progress=progress
        )
        show(args, found, files)


if __name__ == "__main__":
    main()
