"""The contract of core: the same bits under any transform, a pytree without a static shape, clear errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from helpers import tables
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jquant.core import Format, QuantizedTensor, chunk_blocks, dequantize, quantize
from jquant.distributed.shard_map import shard_map
from jquant.formats import FORMATS

SHAPE = (2, 3, 512)
TWO_DEVICES = Mesh(np.array(jax.devices()[:2]), ("rows",))
ENCODABLE = [f for f in FORMATS.values() if f.can_encode]
# One format of each kind by each transform, the others by all at once, which compiles once. In every run: the
# one that compiles at once by each, and one with a search by all at once.
EACH_KIND = {"F16", "Q4_0", "Q4_1", "Q4_K"}
QUICK = "IQ4_NL"


def sharded(function: Callable, x: jax.Array) -> jax.Array:
    rows = PartitionSpec("rows")
    return jax.jit(shard_map(function, TWO_DEVICES, (rows,), rows))(x)


# function of [..., cols] arrays, array [2, 3, cols] → the same result, each by another way.
TRANSFORMS: dict[str, Callable[[Callable, jax.Array], jax.Array]] = {
    "jit": lambda f, x: jax.jit(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "nested vmap": lambda f, x: jax.jit(jax.vmap(jax.vmap(f), in_axes=1, out_axes=1))(x),
    "lax.map": lambda f, x: lax.map(lambda rows: lax.map(f, rows), x),
    "shard_map": sharded,
}


def at_once(function: Callable, x: jax.Array) -> jax.Array:
    return sharded(lambda rows: lax.map(jax.vmap(function), rows), x)


def transformed(found: Iterable[Format]) -> list:
    """Parameters format and transform."""
    cases = []
    for format in found:
        if format.name in EACH_KIND:
            marks = () if format.name == "F16" else pytest.mark.every
            for name, transform in TRANSFORMS.items():
                cases.append(pytest.param(format, transform, id=f"{format.name}-{name}", marks=marks))
        else:
            name = f"{format.name}-shard_map of lax.map of vmap"
            marks = () if format.name == QUICK else pytest.mark.every
            cases.append(pytest.param(format, at_once, id=name, marks=marks))
    return cases


def weights() -> jax.Array:
    """float32 [2, 3, 512] with a block of zeros, an outlier, and ties in magnitude."""
    x = specs.student_t(6, 512).reshape(SHAPE)
    x[0, 0, :256] = 0
    x[0, 1, 7] = 30
    x[1, 2, 256:] = np.sign(x[1, 2, 256:])
    return jnp.asarray(x)


def encoder(format: Format, importance: jax.Array | None = None) -> Callable[[jax.Array], jax.Array]:
    return lambda x: quantize(x, format, importance).parts["blocks"]


@pytest.mark.parametrize(("format", "transform"), transformed(f for f in ENCODABLE if not f.needs_importance))
def test_transformed_encoding_gives_the_same_bytes(format, transform):
    encode, x = encoder(format), weights()
    assert (np.asarray(transform(encode, x)) == np.asarray(encode(x))).all()


@pytest.mark.parametrize(("format", "transform"), transformed(ENCODABLE))
def test_transformed_encoding_by_importance_gives_the_same_bytes(format, transform):
    encode, x = encoder(format, jnp.asarray(specs.importance(SHAPE[-1]))), weights()
    assert (np.asarray(transform(encode, x)) == np.asarray(encode(x))).all()


@pytest.mark.parametrize(("format", "transform"), transformed(FORMATS.values()))
def test_transformed_decoding_gives_the_same_bits(format, transform):
    row_bytes = SHAPE[-1] // format.block_size * format.block_bytes
    data = np.random.default_rng(0).integers(0, 256, (*SHAPE[:-1], row_bytes), dtype=np.uint8)

    def bits(data: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(dequantize(QuantizedTensor({"blocks": data}, format)), jnp.uint32)

    data = jnp.asarray(data)
    assert (np.asarray(transform(bits, data)) == np.asarray(bits(data))).all()


@pytest.mark.parametrize("name", tables.rows([QUICK, "Q4_0", "Q4_1", "F16"], {QUICK, "F16"}))
def test_a_block_has_the_same_bytes_wherever_it_stands(name):
    """Chunks, their padding and the other blocks have no influence."""
    format = FORMATS[name]
    cols = 2 * chunk_blocks(format) * format.block_size + 96
    x = jnp.asarray(specs.gaussian(1, cols))
    parts = [x[:, :96], x[:, 96:]]
    whole = np.asarray(quantize(x, format).parts["blocks"])
    assert (whole == np.concatenate([quantize(p, format).parts["blocks"] for p in parts], axis=1)).all()


@pytest.mark.parametrize("name", tables.rows([QUICK, "Q4_1"], {QUICK}))
def test_importance_of_a_vmapped_call_may_be_shared_or_its_own(name):
    format, x, w = FORMATS[name], jnp.asarray(np.asarray(weights())[0]), jnp.asarray(specs.importance(512))

    def encode(x, w):
        return quantize(x, format, w).parts["blocks"]

    expected = np.asarray(encode(x, w))
    assert (np.asarray(jax.vmap(encode, in_axes=(0, None))(x, w)) == expected).all()
    own = jnp.asarray(np.broadcast_to(w, x.shape))
    assert (np.asarray(jax.vmap(encode)(x, own)) == expected).all()


@pytest.mark.parametrize("name", tables.rows([QUICK, "Q4_0"], {QUICK}))
def test_half_precision_weights_are_encoded_as_their_float32_values(name):
    format, x = FORMATS[name], jnp.asarray(np.asarray(weights()).astype(jnp.bfloat16))
    as_float32 = quantize(jnp.asarray(np.asarray(x).astype(np.float32)), format)
    assert (np.asarray(quantize(x, format).parts["blocks"]) == np.asarray(as_float32.parts["blocks"])).all()


@pytest.mark.parametrize("format", ENCODABLE, ids=str)
def test_the_shape_follows_the_leaves(format):
    row_bytes = SHAPE[-1] // format.block_size * format.block_bytes
    q = QuantizedTensor({"blocks": np.zeros((*SHAPE[:-1], row_bytes), np.uint8)}, format)
    assert q.shape == SHAPE
    assert q.nbytes * 8 == format.bpw * np.prod(SHAPE)
    assert jax.tree.map(lambda leaf: leaf[1], q).shape == SHAPE[1:]
    assert jax.tree.map(lambda *leaves: np.stack(leaves), q, q).shape == (2, *SHAPE)


@pytest.mark.parametrize("name", tables.rows([QUICK, "Q8_0"], {QUICK}))
def test_a_quantized_tensor_passes_through_transforms(name):
    format = FORMATS[name]
    q = jax.jit(lambda x: quantize(x, format))(weights())
    assert (q.shape, q.format) == (SHAPE, format)
    seen = []

    def decode(q: QuantizedTensor) -> jax.Array:
        seen.append(q.shape)
        return dequantize(q)

    decoded = np.asarray(jax.vmap(decode)(q))
    assert seen == [SHAPE[1:]]
    assert (decoded == np.asarray(jax.jit(dequantize)(q))).all()
    assert jax.vmap(lambda x: quantize(x, format))(weights()).shape == SHAPE


def test_a_format_is_a_static_argument():
    assert len({FORMATS["Q4_0"], FORMATS["Q4_0"], FORMATS["Q4_1"]}) == 2
    assert str(FORMATS["Q4_0"]) == "Q4_0"
    assert (FORMATS["Q4_0"].bpw, FORMATS["Q8_0"].bpw, FORMATS["F16"].bpw) == (4.5, 8.5, 16)


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match=r"Q4_0 needs rows of a multiple of 32 weights; got shape \(4, 40\)"):
        quantize(jnp.zeros((4, 40)), FORMATS["Q4_0"])


def test_a_format_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match="F8_E4M3 can be decoded but not encoded"):
        quantize(jnp.zeros((4, 32)), FORMATS["F8_E4M3"])


@pytest.mark.parametrize("shape", [(31,), (5, 32), (2, 4, 32)])
def test_importance_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"importance of shape .* does not fit \(4, 32\)"):
        quantize(jnp.zeros((4, 32)), FORMATS["Q4_0"], jnp.ones(shape))


@pytest.mark.parametrize("shape", [(0, 32), (4, 0)])
def test_nothing_encodes_to_nothing(shape):
    q = quantize(jnp.zeros(shape), FORMATS["Q4_0"])
    assert q.shape == shape
    assert dequantize(q).shape == shape
