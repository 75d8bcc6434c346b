"""Super weights of a model on disk: found, measured, shown, and chosen for protection.

found = super_weights(model, samples)
positions = protected(found.harmful, model.source.specs, coverage=0.95)
write_gguf(model, protect(plan_, positions, "Q6_K"), out, protected=positions)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jquant.calibration._spikes import (
    Found,
    SuperWeight,
    find,
    judged,
    most_sensitive,
    united,
    with_loss_changes,
)
from jquant.calibration.gradients import FISHER, stream_gradients, text_labels
from jquant.checkpoints.model import Model
from jquant.core import TensorSpec, UserError
from jquant.core.human import text_table
from jquant.models import Decoder
from jquant.plan import Profile
from jquant.text.samples import Samples
from jquant.text.token_ids import from_metadata

PROMPT = "Apple Inc. is a worldwide tech company."  # what Yu et al. 2024 search super weights on
LOSS_TOKENS = 512
CANDIDATES = 16  # weights that gradients point to, each of which costs a forward pass to verify


def super_weights(model: Model, samples: Samples) -> Found:
    """Those that spike on a short prompt, or that gradients on some text point to, by what their removal does
    to the loss on that text."""
    tokens = loss_tokens(samples)
    decoder = model.decoder()
    prompt = np.array([from_metadata(model.metadata).encode(PROMPT)])
    return judged(
        with_loss_changes(decoder, united(find(decoder, prompt), sensitive(decoder, tokens)), tokens)
    )


def sensitive(decoder: Decoder, tokens: np.ndarray, count: int = CANDIDATES) -> list[SuperWeight]:
    """The weights of all matrices whose removal is expected to raise the loss on some text most."""
    found: list[tuple[float, SuperWeight]] = []
    for block in stream_gradients(decoder, tokens, FISHER, text_labels):
        for name, stats in block.items():
            fisher = np.asarray(stats["fisher"])
            weight = decoder.tensors.tensor(name).reshape(fisher.shape)
            found += most_sensitive(name, fisher, weight, count)
        found = sorted(found, key=lambda item: -item[0])[:count]
    return [weight for _, weight in found]


def protected(
    found: Sequence[SuperWeight], specs: Mapping[str, TensorSpec], coverage: float
) -> dict[str, list[tuple[int, int]]]:
    """(row, column) of the super weights to protect, by tensor name, for `plan.protect` and `write_gguf`.

    specs: the model's tensors; rows count through all experts of a stack. coverage: of the loss that the
    removal of each would cost, summed over all, the share that the protected ones account for; those that
    cost most come first. 1 protects all.
    """
    costs = [max(w.loss_change or 0.0, 0.0) for w in found]
    order = sorted(range(len(found)), key=lambda i: -costs[i])
    wanted, covered = coverage * sum(costs), 0.0
    out: dict[str, list[tuple[int, int]]] = {}
    for i in order:
        if coverage < 1 and covered >= wanted:
            break
        covered += costs[i]
        w, name = found[i], f"blk.{found[i].block}.{found[i].tensor}.weight"
        row = w.row if w.expert is None else w.expert * specs[name].shape[-2] + w.row
        out.setdefault(name, []).append((row, w.column))
    return out


def of_profile(profile: Profile, specs: Mapping[str, TensorSpec]) -> dict[str, list[tuple[int, int]]]:
    """The super weights that a profile names, as from `protected`. UserError for one that the model lacks."""
    out: dict[str, list[tuple[int, int]]] = {}
    for layer, row, column in profile.protect:
        name = f"blk.{layer}.ffn_down.weight"
        shape = specs[name].shape if name in specs else ()
        if len(shape) != 2 or row >= shape[0] or column >= shape[1]:
            what = f"has shape {list(shape)}" if shape else "is not in the model"
            raise UserError(
                f"{profile.name}: protect layer {layer}, row {row}, column {column}: {name} {what}; "
                "super weights are of one model: correct them, or leave them out."
            )
        out.setdefault(name, []).append((row, column))
    return out


def united_positions(
    *parts: Mapping[str, Sequence[tuple[int, int]]],
) -> dict[str, list[tuple[int, int]]]:
    """All of them, each once."""
    out: dict[str, list[tuple[int, int]]] = {}
    for part in parts:
        for name, positions in part.items():
            kept = out.setdefault(name, [])
            kept += [at for at in positions if at not in kept]
    return out


def note(found: Sequence[SuperWeight], positions: Mapping[str, Sequence]) -> str:
    """What is protected of what was found."""
    if not found:
        return "no super weights were found, so none are protected."
    kept = sum(map(len, positions.values()))
    return f"super weights: {len(found)} found, {kept} protected, in {', '.join(sorted(positions))}."


def loss_tokens(samples: Samples) -> np.ndarray:
    """[1, t]: the longest sample, without its padding, for `super_weights` to measure the loss on.

    Raises UserError where it is too short for a loss.
    """
    longest = int(samples.lengths.argmax())
    length = min(LOSS_TOKENS, int(samples.lengths[longest]))
    if length < 2:
        raise UserError(
            f"{samples.dataset}: its longest sample has {length} tokens, and a loss needs 2; give more text."
        )
    return samples.tokens[longest : longest + 1, :length]


def table(found: Found) -> str:
    header = ("block", "weight", "value", "input", "output", "spike", "loss without it", "found by")
    right = (0, 2, 3, 4, 5, 6)
    shown = "No super weights: there is no single weight that the model is lost without."
    if found.harmful:
        shown = text_table(header, _cells(found.harmful), right)
    if found.harmless:
        spikes = text_table(header, _cells(found.harmless), right)
        shown += f"\n\nSpikes of a single weight that the model can do without:\n{spikes}"
    return shown


def _cells(weights: Sequence[SuperWeight]) -> list[tuple[str, ...]]:
    return [
        (
            str(w.block),
            f"{w.tensor}[{', '.join(map(str, w.place.at))}]",
            f"{w.value:.4g}",
            *("" if x is None else f"{x:.4g}" for x in (w.input, w.output)),
            "" if w.spike is None else f"{w.spike:.0f} ×",
            f"{w.loss_change:+.4f}",
            ", ".join(w.found_by),
        )
        for w in weights
    ]
