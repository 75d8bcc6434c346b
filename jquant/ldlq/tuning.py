"""Tuning a quantized model as a whole: what its file can still express moves towards the original.

What moves is said in `moving`. The loss is the mean KL divergence of the distribution of the next token from
the original's, and Adam descends it (Kingma & Ba 2015). Among research formats, the second phase of
EfficientQAT (Chen et al. 2024) does this, which moves scales while codes rest.

The gradient goes through one block at a time: on the way forward a step keeps what goes into each block; on
the way back each block is run again with its gradient, and takes its step at once. The device holds one
block, or the output matrices of both models.

After each epoch, samples that were set aside judge the very numbers that would be written. What did best
there is kept, be it the file as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, UInt8

from jquant.calibration import embed_into, padded, real_tokens, run_through
from jquant.calibration.activations import IN_MEMORY, scratch
from jquant.core import Source, UserError, kl_divergence, kl_gradient
from jquant.ldlq import _tunable as moving
from jquant.ldlq._tunable import Changes, Formats, Numbers, Stored
from jquant.models import Decoder

LOGITS = 1 << 26  # values of a step through the output matrices: 256 MB each, or one sample
NORM = "output_norm.weight"

# divergence: nats per token, of the batch just learned from, or of the samples set aside.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Settings:
    epochs: int = 2
    rate: float = 2e-3  # Adam's first, relative to what moves; a cosine takes it to 0
    batch: int = 4  # samples a step
    seed: int = 0  # of their order


class Gain(NamedTuple):
    """Mean KL divergence from the original on the samples set aside: nats per token."""

    before: float
    after: float

    def __str__(self) -> str:
        if self.after == self.before:
            return f"tuning gained nothing on samples set aside; their KL divergence is {self.before:.4f}."
        return f"tuning: KL divergence on samples set aside {self.before:.4f} -> {self.after:.4f}."


class Tuned(NamedTuple):
    gain: Gain
    numbers: Numbers  # by GGUF tensor name, as the file should have them; empty: nothing was gained


class _Batch(NamedTuple):
    tokens: np.ndarray  # int [s, t]
    real: np.ndarray  # int [s]
    outputs: np.ndarray  # float32 [s, t, width], of the original's last block


def tune(
    original: Decoder,
    quantized: Decoder,
    source: Source,
    tokens: Int[np.ndarray, "s t"],
    *,
    aside: int,
    lengths: Int[np.ndarray, " s"] | None = None,
    settings: Settings = Settings(),
    folder: Path | None = None,
    progress: Progress = lambda done, count, divergence: None,
) -> Tuned:
    """What the file of a quantized model should have instead.

    source: the file that `quantized` computes with. tokens: samples; the last `aside` of them only decide
    what is kept. lengths: real tokens of each sample, the rest being padding; default: all. folder: for
    activations that do not fit in memory.

    Raises ValueError where no sample is left to learn from, UserError where the divergence is not finite.
    """
    if not 0 < aside < len(tokens):
        raise ValueError(f"of {len(tokens)} samples, {aside} cannot be set aside.")
    all_ = _Batch(tokens, real_tokens(tokens, lengths), _outputs(original, tokens, settings.batch, folder))
    learners = len(tokens) - aside
    size = min(settings.batch, learners)
    steps = learners // size
    count = settings.epochs * steps
    student = _Student(quantized, source, optax.adam(optax.cosine_decay_schedule(settings.rate, count)), size)
    heads = _Heads(original, quantized)

    def judge() -> float:
        parts = (np.arange(a, min(a + size, len(tokens))) for a in range(learners, len(tokens), size))
        sums = [student.judged(heads, _taken(all_, part)) for part in parts]
        return sum(s for s, _ in sums) / max(sum(n for _, n in sums), 1)

    before = least = judge()
    best = student.changes()
    progress(0, count, before)
    rng, done = np.random.default_rng(settings.seed), 0
    for _ in range(settings.epochs):
        for part in rng.permutation(learners)[: steps * size].reshape(steps, size):
            divergence = student.learn(heads, _taken(all_, np.sort(part)))
            done += 1
            progress(done, count, divergence)
        divergence = judge()
        progress(done, count, divergence)
        if divergence < least:
            least, best = divergence, student.changes()
    return Tuned(Gain(before, least), student.numbers(best) if least < before else {})


def apply(
    tuned: Numbers, quantized: Decoder, source: Source
) -> Iterator[tuple[str, UInt8[np.ndarray, "rows bytes"]]]:
    """The bytes of all tensors that have these numbers. Of the file's own only codes are read, so a file in
    which some have been applied already gives the same bytes."""
    for i in range(len(quantized.blocks)):
        formats, stored = moving.load(quantized, source, i)
        numbers = {name: tuned[f"blk.{i}.{name}"] for name in (*dict(formats), *stored.vectors)}
        for name, data in moving.with_numbers(formats, stored, numbers).items():
            yield f"blk.{i}.{name}", data
    if NORM in tuned:
        yield NORM, np.asarray(tuned[NORM][0], "<f4")[None].view(np.uint8)


def _outputs(model: Decoder, tokens: np.ndarray, batch: int, folder: Path | None) -> np.ndarray:
    """What the last block makes of all samples."""
    x = scratch((*tokens.shape, model.width), folder, IN_MEMORY)
    embed_into(x, model, tokens)
    run_through(model, x, batch=min(batch, len(tokens)))
    return x


def _taken(all_: _Batch, part: np.ndarray) -> _Batch:
    return _Batch(*(a[part] for a in all_))


class _Heads:
    """Both models from the output of the last block on."""

    def __init__(self, original: Decoder, quantized: Decoder):
        self._models = original, quantized
        self._rows = [jnp.asarray(m.tensors.tensor(m.output_name)) for m in self._models]

    def divergence(
        self, batch: _Batch, x: Float[Array, "s t width"], norm: Float[Array, " width"]
    ) -> tuple[float, int]:
        """Summed over tokens, and how many these are."""
        total = sum(float(divergence) for _, divergence, _, _ in self._parts(batch, x, norm))
        return _finite(total), int(batch.real.sum())

    def gradients(
        self, batch: _Batch, x: Float[Array, "s t width"], norm: Float[Array, " width"]
    ) -> tuple[float, np.ndarray, Array]:
        """The mean divergence, and its gradients with respect to x and to the norm."""
        total, of_x, of_norm = 0.0, np.empty(x.shape, np.float32), jnp.zeros_like(norm)
        for part, divergence, g, pull in self._parts(batch, x, norm):
            of_x[part], more = pull(g)
            total, of_norm = total + float(divergence), of_norm + more
        return _finite(total) / max(int(batch.real.sum()), 1), of_x, of_norm

    def _parts(self, batch: _Batch, x: Array, norm: Array) -> Iterator[tuple[slice, Array, Array, Callable]]:
        """A few samples at a time: which, what `_divergence` says of them, and what takes the gradient back
        to x and the norm."""
        samples, length = batch.tokens.shape
        step = max(LOGITS // (length * len(self._rows[0])), 1)
        count = jnp.float32(batch.real.sum())

        def project(x: Array, norm: Array) -> Array:
            return self._models[1].project(self._rows[1], x, norm)

        for start in range(0, samples, step):
            part = slice(start, min(start + step, samples))
            wanted = self._models[0].project(self._rows[0], jnp.asarray(batch.outputs[part]))
            logits, pull = jax.vjp(project, x[part], norm)
            counted = np.arange(length)[None] < batch.real[part, None]
            divergence, g = _divergence(wanted, logits, jnp.asarray(counted), count)
            yield part, divergence, g, pull


def _finite(divergence: float) -> float:
    if not math.isfinite(divergence):
        raise UserError(
            "the divergence from the original is not finite; one of the models is damaged, or float32 is "
            "too small for it."
        )
    return divergence


@jax.jit
def _divergence(
    wanted: Float[Array, "s t vocab"],
    logits: Float[Array, "s t vocab"],
    counted: Array,
    count: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, "s t vocab"]]:
    """Σ KL(p ‖ q) over the tokens that count, and the gradient of its mean with respect to q's logits."""
    g = jnp.where(counted[..., None], kl_gradient(wanted, logits) / count, 0.0)
    return jnp.sum(jnp.where(counted, kl_divergence(wanted, logits), 0.0)), g


class _Student:
    """The quantized model on its way."""

    def __init__(self, model: Decoder, source: Source, optimizer: optax.GradientTransformation, batch: int):
        self._model, self._source, self._optimizer, self._batch = model, source, optimizer, batch
        self._changes = [moving.no_changes(*self._load(i)) for i in range(len(model.blocks))]
        self._norm_before = jnp.asarray(model.tensors.tensor(NORM))
        self._norm = jnp.zeros_like(self._norm_before)
        self._states = [optimizer.init(changes) for changes in self._changes]
        self._norm_state = optimizer.init(self._norm)
        self._norm_moves = source.specs[NORM].type == "F32"

    def changes(self) -> tuple[list[Changes], Array]:
        """Of each block, and of the norm before the output matrix."""
        return list(self._changes), self._norm

    def learn(self, heads: _Heads, batch: _Batch) -> float:
        """One step; the divergence before it."""
        inputs = [jnp.asarray(self._model.embed(batch.tokens))]
        length = batch.tokens.shape[1]
        for i, block in enumerate(self._model.blocks):
            formats, stored = self._load(i)
            inputs.append(
                moving.forward(block, formats, stored, self._changes[i], inputs[-1], self._angles(i, length))
            )
        divergence, before, of_norm = heads.gradients(batch, inputs.pop(), self._changed_norm())
        if self._norm_moves:
            of_norm = of_norm * self._norm_before
            self._norm, self._norm_state = moving.stepped(
                self._optimizer, of_norm, self._norm, self._norm_state
            )
        g = jnp.asarray(before)
        for i in range(len(self._model.blocks) - 1, -1, -1):
            formats, stored = self._load(i)
            g, self._changes[i], self._states[i] = moving.descend(
                self._model.blocks[i],
                formats,
                self._optimizer,
                stored,
                self._changes[i],
                self._states[i],
                inputs.pop(),
                g,
                self._angles(i, length),
            )
        return divergence

    def judged(self, heads: _Heads, batch: _Batch) -> tuple[float, int]:
        """The divergence summed over tokens, and how many, with all that moved rounded as the file would."""
        x = padded(self._model.embed(batch.tokens), self._batch)
        for i, block in enumerate(self._model.blocks):
            formats, stored = self._load(i)
            stored = moving.written(formats, stored, self._changes[i])
            none = jax.tree.map(jnp.zeros_like, self._changes[i])
            x = moving.forward(block, formats, stored, none, x, self._angles(i, batch.tokens.shape[1]))
        return heads.divergence(batch, x, self._changed_norm())

    def numbers(self, changes: tuple[list[Changes], Array]) -> Numbers:
        """All that moves, changed and rounded, on the host."""
        numbers: Numbers = {}
        for i, of_block in enumerate(changes[0]):
            formats, stored = self._load(i)
            new = moving.numbers(formats, moving.written(formats, stored, of_block))
            numbers |= {f"blk.{i}.{name}": value for name, value in jax.device_get(new).items()}
        if self._norm_moves:
            numbers[NORM] = (np.asarray(self._norm_before * (1 + changes[1])),)
        return numbers

    def _changed_norm(self) -> Array:
        return self._norm_before * (1 + self._norm)

    def _load(self, i: int) -> tuple[Formats, Stored]:
        return moving.load(self._model, self._source, i)

    def _angles(self, i: int, length: int) -> Array:
        return jnp.asarray(self._model.angles(i, length))
