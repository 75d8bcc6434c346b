"""Super weights of a model beside the largest ordinary weights of the same matrices: what zeroing each does.

    python benchmarks/super_weights.py SmolLM2-135M-Instruct/ wikitext2-valid-100kB.txt

All weights are zeroed one at a time; the loss is the mean negative log-likelihood of the first sample.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from record import record

from jquant import models
from jquant.calibration import SuperWeight, load_samples, loss, with_loss_changes
from jquant.calibration.report import as_json
from jquant.calibration.super_weights import loss_tokens, super_weights
from jquant.checkpoints.model import open_model


def largest_others(decoder: models.Decoder, found: list[SuperWeight], count: int) -> list[SuperWeight]:
    """The largest weights of the matrices that the found ones are in, without those."""
    super_, others = {w.key for w in found}, []
    for block, tensor in dict.fromkeys((w.block, w.tensor) for w in found):
        values = decoder.tensors.tensor(f"blk.{block}.{tensor}.weight")
        for flat in np.argsort(-np.abs(values), axis=None)[: count + len(found)]:
            index = tuple(int(i) for i in np.unravel_index(flat, values.shape))
            *expert, row, column = index
            other = SuperWeight(
                block, row, column, float(values[index]), tensor=tensor, expert=expert[0] if expert else None,
                found_by=("size",),
            )  # fmt: skip
            if (
                other.key not in super_
                and sum(w.key[0] == block and w.tensor == tensor for w in others) < count
            ):
                others.append(other)
    return others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--others", type=int, default=1, help="ordinary weights of each matrix (default: 1)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = open_model(args.model)
    samples = load_samples(model, str(args.text), samples=1, sequence_length=args.sequence_length)
    harmful, harmless = super_weights(model, samples)
    found = harmful + harmless
    if not found:
        print("No super weights found, and no spikes.")
        return
    decoder = model.decoder()
    tokens = loss_tokens(samples)
    base = loss(decoder, tokens)
    others = with_loss_changes(decoder, largest_others(decoder, found, args.others), tokens)
    print(f"perplexity of the whole model: {np.exp(base):.2f} ({tokens.shape[1]} tokens)\n")
    print("| weight | value | found by | loss without it | perplexity |\n|-|-|-|-|-|")
    for w in sorted([*found, *others], key=lambda w: (w.block, w.tensor, "size" in w.found_by)):
        place = f"blk.{w.block}.{w.tensor}[{', '.join(map(str, w.place.at))}]"
        change = w.loss_change or 0.0
        by = ", ".join(w.found_by).replace("size", "no one: the largest other")
        by += ", harmless" if w in harmless else ""
        print(f"| {place} | {w.value:.3g} | {by} | {change:+.4f} | {np.exp(base + change):.2f} |")
    if args.json:
        kinds = {"harmful": harmful, "harmless": harmless, "others": others}
        record(args, {"loss": base, **{kind: as_json(weights) for kind, weights in kinds.items()}})


if __name__ == "__main__":
    main()
