"""W8A8 by llm-compressor, to be compared with ours: SmoothQuant, then the nearest codes.

    pip install llmcompressor  # into an environment of its own, with torch
    python benchmarks/llm_compressor.py SmolLM2-135M/ out/ --calibration wikitext2-train.txt

Inputs are rounded each token by a scale of its own, weights each row, `lm_head` stays; as `jquant quantize
--type W8A8`. `jquant evaluate MODEL OUT …` measures such folders beside ours.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--strength", type=float, default=0.8, help="alpha, by the library's examples 0.8")
    args = parser.parse_args()

    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.calibration.read_text(encoding="utf-8").replace("\r", "")
    tokens = tokenizer(text[: args.samples * args.sequence_length * 12])["input_ids"]
    n = args.sequence_length
    rows = [tokens[i * n : (i + 1) * n] for i in range(args.samples)]
    assert len(rows[-1]) == n, f"{args.calibration}: too short for {args.samples} samples"
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * n] * len(rows)})
    start = time.monotonic()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=[
            SmoothQuantModifier(smoothing_strength=args.strength),
            QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        max_seq_length=n,
        num_calibration_samples=len(rows),
    )
    print(f"{time.monotonic() - start:.0f} s")
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
