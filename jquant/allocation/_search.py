"""Better plans by measuring whole candidates: KL divergence of the quantized model on calibration text.

The sum of damages is a second-order estimate of single changes; below three bits errors are large and add up
otherwise. Two kinds of steps in the weights of tensors make other plans of the same size, which are encoded,
run, and kept where they are better:

1. The weights that the tensors' shares in the divergence of the present plan ask for: see `shares`.
2. The weight of a group of tensors (a role, the outer layers) up or down. Pattern search: a step that helps
   is tried again, larger; one that does not is halved.

Source: Hooke & Jeeves 1961, "Direct search" solution of numerical and statistical problems.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jquant import models
from jquant.allocation.attribution import Shares, shares
from jquant.calibration import run_through
from jquant.checkpoints import slab_rows, transcode
from jquant.checkpoints.weights import Weights
from jquant.core import Metadata, Source, TensorSpec, kl_divergence
from jquant.formats import FORMATS
from jquant.models import Decoder, matrix

CACHE_BYTES = 1 << 30  # encoded tensors that are kept for the next candidate
FIRST_STEP, LAST_STEP = math.log(2.0), math.log(1.1)  # of a group's weight

# Candidates measured, best KL divergence so far in nats a token, seconds used.
Progress = Callable[[int, float, float], None]


class Encoder:
    """Tensors of a source as a runtime would see them in other types: encoded, kept, decoded when asked."""

    def __init__(self, source: Source, importance: Mapping[str, np.ndarray], threads: int = 2):
        self._source, self._importance, self._threads = source, importance, threads
        self._cache: dict[tuple[str, str], np.ndarray] = {}

    def prepare(self, types: Mapping[str, str]) -> None:
        """Encode what is not there yet; what was not used for longest makes room."""
        wanted = [(n, t) for n, t in types.items() if t != self._source.specs[n].type]
        self._cache = {
            **{key: data for key, data in self._cache.items() if key not in wanted},
            **{key: self._cache[key] for key in wanted if key in self._cache},
        }
        new = [key for key in wanted if key not in self._cache]
        needed = sum(TensorSpec(n, self._source.specs[n].shape, t).nbytes for n, t in new)
        for key in list(self._cache):
            if key in wanted or sum(data.nbytes for data in self._cache.values()) + needed <= CACHE_BYTES:
                break
            del self._cache[key]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="jquant") as pool:
            for key, data in zip(new, pool.map(self._encode, new), strict=True):
                self._cache[key] = data

    def _encode(self, key: tuple[str, str]) -> np.ndarray:
        name, type = key
        spec, importance = self._source.specs[name], self._importance.get(name)
        parts = []
        for start in range(0, spec.rows, slab_rows(spec.cols)):
            stop = min(start + slab_rows(spec.cols), spec.rows)
            w = None
            if importance is not None:
                w = importance[np.arange(start, stop) * len(importance) // spec.rows]
            data = self._source.read(name, start, stop)
            parts.append(transcode(data, FORMATS[spec.type], FORMATS[type], w).data)
        return np.concatenate(parts)

    def rows(self, name: str, type: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor in this type, float32."""
        spec = self._source.specs[name]
        if type == spec.type or (name, type) not in self._cache:
            return Weights(self._source).rows(name, start, stop)
        data = self._cache[name, type][start:stop]
        step = slab_rows(spec.cols)
        parts = [
            transcode(data[i : i + step], FORMATS[type], FORMATS["F32"]).data
            for i in range(0, len(data), step)
        ]
        return np.concatenate(parts).view(np.float32)


class _Quantized(NamedTuple):
    """The model's tensors in the types of a plan."""

    encoder: Encoder
    specs: Mapping[str, TensorSpec]
    types: Mapping[str, str]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.encoder.rows(name, self.types.get(name, self.specs[name].type), start, stop)

    def tensor(self, name: str) -> np.ndarray:
        return self.rows(name).reshape(self.specs[name].shape)


class Measure:
    """The mean KL divergence from a model to what quantization makes of it, on some text."""

    def __init__(
        self,
        source: Source,
        metadata: Metadata,
        importance: Mapping[str, np.ndarray],
        tokens: Int[np.ndarray, "s t"],
        threads: int = 2,
    ):
        """Runs the original once. Raises UserError where the architecture's forward pass is not known."""
        self._encoder = Encoder(source, importance, threads)
        self._source, self._metadata, self._tokens = source, metadata, tokens
        self._original = models.decoder(Weights(source), metadata)
        self._x = _last(self._original, tokens)

    def __call__(self, types: Mapping[str, str]) -> float:
        """Nats a token. types: of the tensors that are not as in the source."""
        quantized = self._quantized(types)
        x = _last(quantized, self._tokens)
        parts = [
            kl_divergence(self._original.logits(jnp.asarray(a[None])), quantized.logits(jnp.asarray(b[None])))
            for a, b in zip(self._x, x, strict=True)
        ]
        return float(np.mean([float(jnp.mean(part)) for part in parts]))

    def shares(self, types: Mapping[str, str]) -> Shares:
        """The same, and what each tensor has of it. Takes some four times as long."""
        return shares(self._original, self._quantized(types), self._x, self._tokens)

    def _quantized(self, types: Mapping[str, str]) -> Decoder:
        self._encoder.prepare(types)
        return models.decoder(_Quantized(self._encoder, self._source.specs, types), self._metadata)


def _last(model: Decoder, tokens: np.ndarray) -> Float[np.ndarray, "s t width"]:
    """The output of the last block; one sample at a time goes through each block."""
    x = model.embed(tokens)
    run_through(model, x)
    return x


def groups(names: Mapping[str, object], layers: int) -> dict[str, list[str]]:
    """Tensors whose weights are searched together: by role, and those of the first and last layers."""
    found: dict[str, list[str]] = {}
    for name in names:
        part = re.match(r"blk\.(\d+)\.(\w+?)(_exps|_shexp)?\.", name)
        if part is None:
            found.setdefault("embeddings and output", []).append(name)
            continue
        row = matrix(part[2] + (part[3] or "")) or matrix(part[2])
        found.setdefault((row and row.searched_with) or part[2], []).append(name)
        third = 3 * int(part[1]) // max(layers, 1)
        if third != 1:
            found.setdefault(("first third", "", "last third")[third], []).append(name)
    return found


class Found(NamedTuple):
    scales: dict[str, float]  # by which the weight of each tensor is multiplied
    divergence: float  # of the best plan, nats a token
    first: float  # of the plan before the search
    measured: int  # candidates


# Types of a plan and the scales it was made with → factors for the weights of tensors.
Reweigh = Callable[[Mapping[str, str], Mapping[str, float]], Mapping[str, float]]
_REWEIGH_COST = 4  # candidates that one takes the time of


def search(
    measure: Callable[[Mapping[str, str]], float],
    allocate: Callable[[Mapping[str, float]], Mapping[str, str]],
    grouped: Mapping[str, list[str]],
    *,
    seconds: float,
    reweigh: Reweigh | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = lambda measured, best, used: None,
) -> Found:
    """The scales of weights whose plan has the least measured divergence, within a time.

    allocate: types for weights multiplied by these scales, always of the same size. No candidate is begun
    that would end after `seconds` by the mean duration of those before; the first is always measured.
    """
    run = _Run(measure, allocate, seconds, clock, progress, [n for group in grouped.values() for n in group])
    if reweigh is not None:
        _by_shares(run, reweigh)
    _by_groups(run, grouped)
    return Found(run.scales, run.best, run.first, run.measured)


class _Run:
    """The best candidate so far, and what was spent on it."""

    def __init__(
        self,
        measure: Callable[[Mapping[str, str]], float],
        allocate: Callable[[Mapping[str, float]], Mapping[str, str]],
        seconds: float,
        clock: Callable[[], float],
        progress: Progress,
        names: list[str],
    ):
        self._measure, self._allocate, self._seconds = measure, allocate, seconds
        self._clock, self._progress, self._start = clock, progress, clock()
        self.scales = dict.fromkeys(names, 1.0)
        self.types = allocate(self.scales)
        self._seen = {tuple(self.types.values())}
        self.first = self.best = measure(self.types)
        self.measured, self._spent = 1, 1
        progress(1, self.best, clock() - self._start)

    def has_time(self, candidates: int = 1) -> bool:
        """Whether so many more would end in time."""
        used = self._clock() - self._start
        return used * (self._spent + candidates) / self._spent <= self._seconds

    def spend(self, candidates: int) -> None:
        self._spent += candidates

    def is_better(self, scales: Mapping[str, float]) -> bool | None:
        """Measures the plan of these scales and keeps it where it is better. None: it was measured before."""
        types = self._allocate(scales)
        if tuple(types.values()) in self._seen:
            return None
        self._seen.add(tuple(types.values()))
        divergence = self._measure(types)
        self.measured, self._spent = self.measured + 1, self._spent + 1
        better = divergence < self.best
        if better:
            self.scales, self.types, self.best = dict(scales), types, divergence
        self._progress(self.measured, self.best, self._clock() - self._start)
        return better


def _by_shares(run: _Run, reweigh: Reweigh) -> None:
    """Weights that the shares in the present plan ask for, or part of the way where all of it is too far."""
    power = 1.0
    while run.has_time(_REWEIGH_COST + 1):
        factors = reweigh(run.types, run.scales)
        run.spend(_REWEIGH_COST)
        while power >= 0.25:
            if not run.has_time():
                return
            if run.is_better({n: s * factors.get(n, 1.0) ** power for n, s in run.scales.items()}):
                break
            power /= 2
        else:
            return


def _by_groups(run: _Run, grouped: Mapping[str, list[str]]) -> None:
    """Pattern search over the groups' weights."""
    steps = dict.fromkeys(grouped, FIRST_STEP)
    while max(map(abs, steps.values()), default=0.0) >= LAST_STEP:
        for group, step in list(steps.items()):
            for move in (step, -step):
                if not run.has_time():
                    return
                factor = math.exp(move)
                tried = {n: s * (factor if n in grouped[group] else 1.0) for n, s in run.scales.items()}
                if run.is_better(tried):
                    steps[group] = 1.5 * move
                    break
            else:
                steps[group] = step / 2
