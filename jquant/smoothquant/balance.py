"""A model whose inputs llama.cpp's rounding on a CPU harms less: the same function, with other numbers in its
norms and in the matrices behind them (`transforms.balance`).

balanced = balance_model(model, samples)
write_gguf(balanced.model, plan, out, imatrix=balanced.imatrix(imatrix))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jquant.calibration import Progress, Turn, batches, padded, real_tokens, walk, weights_of
from jquant.checkpoints.fingerprint import digest_of_arrays
from jquant.checkpoints.model import Model
from jquant.checkpoints.rescaled import Factors, ScaledSource
from jquant.core import UserError
from jquant.distributed.team import ALONE, Team
from jquant.io.imatrix import Imatrix
from jquant.models import Parameters, run_and_show
from jquant.smoothquant import _balance as balance
from jquant.smoothquant import _smooth as smooth
from jquant.smoothquant._smooth import Coupling
from jquant.text.samples import Samples

SAMPLES, TOKENS = 8, 512  # at most: a block has some dozens of factors only


class Place(NamedTuple):
    block: int
    name: str  # of the norm
    kept: float  # of the error that rounding makes of the outputs behind it: 1 is all


@dataclass(frozen=True)
class Balanced:
    model: Model  # the same function
    factors: Mapping[str, Factors]  # by GGUF name without ".weight"
    places: Sequence[Place]  # none where no input is a whole number of llama.cpp's blocks

    def imatrix(self, of_original: Imatrix) -> Imatrix:
        """Mean squares of this model's inputs, from those of the original's."""
        entries = dict(of_original.entries)
        for module, factors in self.factors.items():
            name = f"{module}.weight"
            if factors.cols is not None and name in entries:
                squares = np.square(np.asarray(factors.cols, np.float32))
                # In the .dat form a stack is one row.
                by_input = entries[name].reshape(-1, len(squares)) / squares
                entries[name] = by_input.astype(np.float32).reshape(entries[name].shape)
        return replace(of_original, entries=entries)

    def __str__(self) -> str:
        if not self.places:
            return (
                f"no input of this model is a whole number of blocks of {balance.BLOCK}: nothing to balance."
            )
        kept = [
            f"{fmean(place.kept for place in self.places if place.name == name):.0%} behind {name}"
            for name in dict.fromkeys(place.name for place in self.places)
        ]
        return f"inputs balanced: of what llama.cpp's rounding of them loses {', '.join(kept)} is left."


def balance_model(
    model: Model,
    samples: Samples,
    *,
    batch: int = 4,
    team: Team = ALONE,
    progress: Progress = lambda done, count: None,
) -> Balanced:
    """In memory are one block, and the activations of a few samples.

    team: processes that all call this; they get the factors of the first.
    Raises UserError for inputs that are not finite, and for an architecture that we do not know.
    """
    decoder = model.decoder()
    few = sorted({int(at) for at in np.linspace(0, len(samples.tokens) - 1, SAMPLES)})
    tokens = samples.tokens[few][:, :TOKENS]
    lengths = np.minimum(real_tokens(samples.tokens, samples.lengths)[few], TOKENS)
    x = decoder.embed(tokens)
    real = weights_of(jnp.asarray(x), jnp.asarray(lengths, jnp.int32))
    places: list[Place] = []
    factors: dict[str, Factors] = {}
    for at in walk(decoder, x.shape[1]):
        i, block, params = at.i, decoder.blocks[at.i], at.params
        couplings = {_seen(c, params): c for c in smooth.couplings(block) if _has_blocks(c)}
        seen = _through(at, tuple(couplings), x, batch)
        scales: dict[str, Array] = {}
        for coupling, (maxima, sizes) in zip(couplings.values(), seen, strict=True):
            if not np.isfinite(sizes).all():
                raise UserError(f"blk.{i}: what {coupling.name} gives is not finite; the model is damaged.")
            weights = balance.token_weights(jnp.asarray(sizes), real)
            best = balance.balance(jnp.asarray(maxima), _energies(coupling, params), weights)
            scales[coupling.name] = jnp.repeat(jnp.exp(best.logs), balance.GROUP)
            kept = float(best.after / best.before) if best.before > 0 else 1.0
            places.append(Place(i, coupling.name, kept))
        of_block = jax.device_get(smooth.factors_of(block, scales))
        factors |= {f"blk.{i}.{tensor}": value for tensor, value in of_block.items()}
        progress(i + 1, len(decoder.blocks))
    factors = team.first(factors)
    source = ScaledSource(model.source, factors)
    changed = model._replace(
        source=source, stored_bytes=model.tensor_bytes, changes=digest_of_arrays(factors)
    )
    return Balanced(changed, factors, places)


def _has_blocks(coupling: Coupling) -> bool:
    """Norms alone: what v and up lose, and what their weights lose by the factors, is hardly changed."""
    return "norm" in coupling.name and coupling.channels % balance.BLOCK == 0


def _seen(coupling: Coupling, params: Parameters) -> str:
    """A consumer that sees all tokens: none of a stack's experts does."""
    return next(name for name in coupling.consumers if params[name]["weight"].ndim == 2)


def _energies(coupling: Coupling, params: Parameters) -> Array:
    """Σ W² of each group of columns, over all matrices behind the norm that are quantized."""
    total = jnp.zeros(coupling.channels)
    for name in smooth.without_routers(coupling.consumers):
        w = jnp.asarray(params[name]["weight"])
        total += jnp.sum(jnp.square(w.reshape(-1, coupling.channels)), axis=0)
    return balance.group_energies(total)


def _through(
    at: Turn, names: tuple[str, ...], x: np.ndarray, batch: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """All samples through the block, in place; of the inputs of these matrices groups' maxima and |x|²."""
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in names]
    for part in batches(len(x), batch):
        count = part.stop - part.start
        y, inputs = run_and_show(at.block, at.params, padded(x[part], batch), at.angles, names)
        for so_far, name in zip(seen, names, strict=True):
            maxima, sizes = _sizes(inputs[name]["x"].reshape(-1, x.shape[-1]))
            so_far.append((np.asarray(maxima)[: count * x.shape[1]], np.asarray(sizes)[: count * x.shape[1]]))
        x[part] = y[:count]
    return [(np.concatenate([m for m, _ in of]), np.concatenate([s for _, s in of])) for of in seen]


@jax.jit
def _sizes(x: Float[Array, "n width"]) -> tuple[Float[Array, "n groups"], Float[Array, " n"]]:
    """The largest of each group of each token's input, and |x|²."""
    return balance.group_maxima(x), jnp.sum(jnp.square(x), axis=-1)
