"""What error feedback costs for larger models: operations, memory, and the time that measured rates imply.

    python benchmarks/feedback_cost.py --models Llama-2-7B Llama-3-70B --samples 64 --chips 1 16

Rates are those of one H200, of IQ2_XXS's search of one H100 (benchmarks/gpu.py); a chip of a pod is taken for
such a one, with rows and samples spread evenly and nothing lost to communication. Reading the model,
compiling and tuning are not counted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import NamedTuple

from shapes import MODELS, block_shapes

from jquant.ldlq.correction import JUDGED, RIDGES

# Measured: operations a second of a block's forward pass and of Hessians in float32, of a Cholesky factor
# with its solves (4096³ in 3 ms), and weights a second of the search with feedback.
FORWARD, PRODUCTS, FACTOR = 48e12, 50e12, 4096**3 / 3e-3
CODED = {"Q4_K": 226e6, "IQ2_XXS": 382e6}
# The input of each matrix; those that share one come in one stage.
INPUT_OF = {
    "attn_q": 0, "attn_k": 0, "attn_v": 0, "attn_output": 1, "ffn_gate": 2, "ffn_up": 2, "ffn_down": 3,
}  # fmt: skip


class Cost(NamedTuple):
    forward: float  # operations
    products: float
    factors: float
    weights: float  # that are coded
    device: float  # bytes: a block twice, H and C of a stage in halves and whole, a batch of both streams
    host: float  # bytes: both streams

    def seconds(self, type: str, chips: int) -> float:
        work = self.forward / FORWARD + self.products / PRODUCTS + self.weights / CODED[type]
        return work / chips + self.factors / FACTOR  # a factor is made on one chip, or on each


def cost(config: Mapping, samples: int, length: int, batch: int) -> Cost:
    tokens, blocks = samples * length, config["num_hidden_layers"]
    matrices = {name: shape for name, shape in block_shapes(config).items() if len(shape) == 2}
    sizes = {name: math.prod(shape) for name, shape in matrices.items()}
    widths = {stage: matrices[name][1] for name, stage in INPUT_OF.items()}
    scores = 2 * config["hidden_size"] * length  # of a token, causal: q k and p v
    # Each stage runs both streams up to its inputs; at the end both go through the block.
    run = 0.0
    for stage in widths:
        before = sum(sizes[name] for name in matrices if INPUT_OF[name] < stage)
        run += 2 * tokens * (2 * before + (scores if stage > 0 else 0))
    run += 2 * tokens * (2 * sum(sizes.values()) + scores)
    products = sum(2 * 2 * tokens * width**2 for width in widths.values())
    # Per matrix: the errors carried on and W (C − H)(H + λ)⁻¹, with its factor, and in each half for each λ a
    # factor and what a few rows cost.
    tried = 2 * len(RIDGES)
    products += sum((2 * rows + 4 * tried * JUDGED) * 2 * width**2 for rows, width in matrices.values())
    factors = sum(2 * width**3 for width in widths.values())
    factors += sum((1 + tried) / 3 * width**3 for _, width in matrices.values())
    largest = max(widths.values())
    device = 2 * 4 * sum(sizes.values()) + 6 * 4 * largest**2 + 2 * 4 * batch * length * sum(widths.values())
    host, weights = 2 * 4 * tokens * config["hidden_size"], sum(sizes.values())
    return Cost(blocks * run, blocks * products, blocks * factors, blocks * weights, device, host)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    dense = [name for name, config in MODELS.items() if "num_experts" not in config]
    parser.add_argument("--models", nargs="+", choices=dense, default=["Llama-2-7B", "Llama-3-70B"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chips", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    times = [(type, chips) for type in CODED for chips in args.chips]
    head = ["forward", "H, C, W", "factors", "coded", "device", "host"]
    head += [f"{type}, {chips} chips" for type, chips in times]
    print(f"| model | {' | '.join(head)} |\n|{'-|' * (len(head) + 1)}")
    for name in args.models:
        c = cost(MODELS[name], args.samples, args.sequence_length, args.batch)
        counts = [f"{x:.1e}" for x in (c.forward, c.products, c.factors, c.weights)]
        memory = [f"{x / 1e9:.1f} GB" for x in (c.device, c.host)]
        found = [f"{c.seconds(type, chips) / 60:.1f} min" for type, chips in times]
        print(f"| {name} | {' | '.join(counts + memory + found)} |")


if __name__ == "__main__":
    main()
