"""What can move in a block whose file is written: the real numbers of its formats and its norms' vectors.

A change is relative: a number a becomes (1 + c) a, for d and dmin of each block of a matrix, and each entry
of a norm's vector. Codes, and scales that are integers, stay. So a changed file has the types and the size of
the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, PyTree, UInt8

from jquant.core import Block, Format, Source, block_parameters
from jquant.formats import FORMATS
from jquant.models import Decoder

# By tensor: of a matrix one float32 [blocks] for each real number of its format, of a vector itself [width].
Numbers = dict[str, tuple[Any, ...]]
Changes = Numbers  # relative ones
Formats = tuple[tuple[str, Format], ...]  # of a block's coded matrices, by name


class Stored(NamedTuple):
    """The tensors of a block as the file has them."""

    coded: dict[str, Array]  # uint8 [rows, row bytes]
    vectors: dict[str, Array]  # float32 [width], of norms
    others: dict[str, Array]  # float32, which do not move


def load(model: Decoder, source: Source, i: int) -> tuple[Formats, Stored]:
    """Block i of the file that `model` computes with."""
    formats, stored = [], Stored({}, {}, {})
    for name, shape in model.blocks[i].shapes:
        spec = source.specs[f"blk.{i}.{name}"]
        format = FORMATS.get(spec.type)
        if format is not None and format.block_size > 1:
            stored.coded[name] = jnp.asarray(source.read(spec.name))
            formats.append((name, format))
        else:
            moves = spec.type == "F32" and len(shape) == 1 and "norm" in name
            kind = stored.vectors if moves else stored.others
            kind[name] = jnp.asarray(model.tensors.tensor(spec.name))
    return tuple(formats), stored


def no_changes(formats: Formats, stored: Stored) -> Changes:
    return jax.tree.map(jnp.zeros_like, numbers(formats, stored))


@partial(jax.jit, static_argnames=("block", "formats"))
def forward(
    block: Block, formats: Formats, stored: Stored, changes: Changes, x: Array, angles: Array
) -> Float[Array, "s t width"]:
    """The output of the changed block."""
    params = _params(block, dict(formats), stored, changes)
    return block.apply({"params": params}, x, angles, mutable="inputs")[0]


@partial(jax.jit, static_argnames=("block", "formats", "optimizer"))
def descend(
    block: Block,
    formats: Formats,
    optimizer: optax.GradientTransformation,
    stored: Stored,
    changes: Changes,
    state: PyTree,
    x: Float[Array, "s t width"],
    g: Float[Array, "s t width"],
    angles: Float[Array, "t pairs"],
) -> tuple[Float[Array, "s t width"], Changes, PyTree]:
    """One step against the gradient g with respect to the output: the gradient with respect to x, and the
    changes and the optimizer's state after the step."""
    _, pull = jax.vjp(lambda c, x: forward(block, formats, stored, c, x, angles), changes, x)
    gradient, before = pull(g)
    return before, *stepped(optimizer, gradient, changes, state)


def stepped(
    optimizer: optax.GradientTransformation, gradient: PyTree, x: PyTree, state: PyTree
) -> tuple[PyTree, PyTree]:
    """x and the optimizer's state after a step."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of counts
        updates, state = optimizer.update(gradient, state)
    return jax.tree.map(jnp.add, x, updates), state


@partial(jax.jit, static_argnames="formats")
def written(formats: Formats, stored: Stored, changes: Changes) -> Stored:
    """The tensors as a file with these changes has them: its formats round what moved."""
    old = numbers(formats, stored)
    new = jax.tree.map(lambda a, c: a * (1 + c), old, changes)
    coded = {name: _repacked(stored.coded[name], new[name], format) for name, format in formats}
    return stored._replace(coded=coded, vectors={name: new[name][0] for name in stored.vectors})


def numbers(formats: Formats, stored: Stored) -> Numbers:
    """What can move, as the file has it."""
    found = {name: _numbers(stored.coded[name], format) for name, format in formats}
    return found | {name: (value,) for name, value in stored.vectors.items()}


def with_numbers(formats: Formats, stored: Stored, numbers: Numbers) -> dict[str, np.ndarray]:
    """The bytes, uint8 [rows, row bytes], of these tensors with other numbers."""
    found = {}
    for name, format in formats:
        found[name] = np.asarray(_repacked(stored.coded[name], numbers[name], format))
    for name in stored.vectors:
        found[name] = np.asarray(numbers[name][0], "<f4")[None].view(np.uint8)
    return found


def _params(
    block: Block, formats: Mapping[str, Format], stored: Stored, changes: Changes
) -> dict[str, dict[str, Array]]:
    def value(name: str, shape: tuple[int, ...]) -> Array:
        if name in stored.coded:
            return _decoded(stored.coded[name], changes[name], formats[name]).reshape(shape)
        if name in stored.vectors:
            return stored.vectors[name] * (1 + changes[name][0])
        return stored.others[name].reshape(shape)

    return block_parameters(block.shapes, value)


def _moves(leaf: Array) -> bool:
    """One real number of a block, rather than integers."""
    return leaf.ndim == 1 and leaf.dtype == jnp.float32


def _unpacked(data: Array, format: Format) -> tuple[PyTree, PyTree]:
    return format.unpack(data.reshape(-1, format.block_bytes).T)


def _numbers(data: Array, format: Format) -> tuple[Array, ...]:
    return tuple(leaf for leaf in jax.tree.leaves(_unpacked(data, format)[1]) if _moves(leaf))


def _with(scales: PyTree, numbers: tuple[Array, ...]) -> PyTree:
    left = iter(numbers)
    return jax.tree.map(lambda a: next(left) if _moves(a) else a, scales)


def _changed(scales: PyTree, changes: tuple[Array, ...]) -> PyTree:
    moving = [a for a in jax.tree.leaves(scales) if _moves(a)]
    return _with(scales, tuple(a * (1 + c) for a, c in zip(moving, changes, strict=True)))


def _decoded(data: Array, changes: tuple[Array, ...], format: Format) -> Float[Array, "rows cols"]:
    codes, scales = _unpacked(data, format)
    return format.reconstruct(codes, _changed(scales, changes)).T.reshape(len(data), -1)


@partial(jax.jit, static_argnames="format")
def _repacked(data: Array, numbers: tuple[Array, ...], format: Format) -> UInt8[Array, "rows bytes"]:
    codes, scales = _unpacked(data, format)
    return format.pack(codes, _with(scales, numbers)).T.reshape(data.shape)
