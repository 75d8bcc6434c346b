"""IQ, ternary, FP4, one- and two-bit types decode to ggml's bits, and pack is the inverse of unpack."""

from __future__ import annotations

from functools import cache, partial

import gguf
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ggml, tables
from helpers.real_weights import smollm2
from hypothesis import strategies as st
from jax import lax

from jquant.core import Format, QuantizedTensor, dequantize
from jquant.formats import FORMATS

IQ = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"]
NAMES = [*IQ, "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"]
# gguf-py has no decoder for these, or does not know them.
ONLY_IN_GGML = {"Q1_0", "Q2_0"}
SPECIAL_HIGH_BYTES = (0x00, 0x03, 0x04, 0x3C, 0x7B, 0x7C, 0x7F, 0x80, 0xFC)  # of d: subnormal, ±∞, NaN, …

# ggml's encoder first tabulates neighbours in the grid, for seconds.
SLOW_TO_START = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"}


every_format = pytest.mark.parametrize("format", tables.formats(NAMES))


def edge_blocks(format: Format) -> np.ndarray:
    """Random blocks whose d takes every low byte and the special high ones: uint8 [2304, block_bytes].

    MXFP4's exponent is its first byte, so it takes every value too.
    """
    rng = np.random.default_rng(0)
    d = np.stack(np.meshgrid(np.arange(256), SPECIAL_HIGH_BYTES), axis=-1).reshape(-1, 2).astype(np.uint8)
    data = rng.integers(0, 256, (len(d), format.block_bytes), dtype=np.uint8)
    if format.name == "IQ1_M":  # a nibble of d at the top of each of the last four 16-bit words
        nibbles = np.stack([d & 15, d >> 4], axis=-1).reshape(-1, 4)
        data[:, -7::2] = data[:, -7::2] & 15 | nibbles << 4
    elif format.name in ("TQ1_0", "TQ2_0"):
        data[:, -2:] = d
    else:
        data[:, :2] = d
    return data


def random_rows(format: Format) -> np.ndarray:
    """uint8 [4, 3, row bytes], several steps of the loop and a rest."""
    blocks = (1 << 14) // format.block_size
    return np.random.default_rng(1).integers(0, 256, (4, 3, blocks * format.block_bytes), dtype=np.uint8)


def decode(format: Format, data) -> jax.Array:
    return dequantize(QuantizedTensor({"blocks": jnp.asarray(data)}, format))


TRANSFORMS = {
    "jit of vmap": lambda format, data: jax.jit(jax.vmap(partial(decode, format)))(data),
    "lax.map": lambda format, data: lax.map(partial(decode, format), jnp.asarray(data)),
}


def by_gguf_py(format: Format, data: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(format.ggml_type))


def by_ggml(format: Format, data: np.ndarray) -> np.ndarray:
    assert format.ggml_type is not None
    flat = ggml.decode(format.ggml_type, data.reshape(-1, data.shape[-1]))
    return flat.reshape(*data.shape[:-1], -1)


def assert_same_bits(format: Format, got, want: np.ndarray):
    """Equal bits, but any NaN equals any other; prints the first block that differs."""
    got = np.asarray(got)
    assert got.shape == want.shape
    same = (got.view(np.uint32) == want.view(np.uint32)) | np.isnan(got) & np.isnan(want)
    wrong = np.flatnonzero(~same.reshape(-1, format.block_size).all(axis=1))
    if wrong.size:
        block = slice(wrong[0] * format.block_size, (wrong[0] + 1) * format.block_size)
        raise AssertionError(
            f"{wrong.size} blocks of {format} differ; number {wrong[0]}:\n{got.ravel()[block]}\n"
            f"should be\n{want.ravel()[block]}"
        )


@pytest.mark.parametrize("format", [FORMATS[name] for name in NAMES], ids=str)
def test_the_format_has_ggmls_number_and_block(format):
    traits = ggml._lib.ggml_get_type_traits(format.ggml_type).contents
    assert traits.type_name.decode().upper() == format.name
    assert ggml.block_and_bytes(format.ggml_type) == (format.block_size, format.block_bytes)


@every_format
def test_every_scale_decodes_to_ggmls_bits(format):
    data = edge_blocks(format)
    assert_same_bits(format, decode(format, data), by_ggml(format, data))


@pytest.mark.parametrize("format", tables.formats(n for n in NAMES if n not in ONLY_IN_GGML))
def test_every_scale_decodes_to_gguf_pys_bits(format):
    data = edge_blocks(format)
    assert_same_bits(format, decode(format, data), by_gguf_py(format, data))


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_format
def test_transformed_decode_equals_ggmls_bits(format, transform):
    data = random_rows(format)
    assert_same_bits(format, TRANSFORMS[transform](format, data), by_ggml(format, data))


@cache
def real_rows() -> np.ndarray:
    """float32 [8, 1536], of a model's second matrix of its feed-forward layer."""
    return smollm2(rows=8)


@pytest.mark.parametrize("format", tables.formats(NAMES, tables.FORMATS - SLOW_TO_START))
def test_rows_that_ggml_encoded_decode_to_its_bits_and_pack_to_its_bytes(format):
    x = real_rows()
    importance = np.random.default_rng(2).exponential(size=x.shape[1]).astype(np.float32)
    data = ggml.encode(format.ggml_type, x, importance)
    y = decode(format, data)
    assert_same_bits(format, y, by_ggml(format, data))
    if format.name not in ONLY_IN_GGML:
        assert_same_bits(format, y, by_gguf_py(format, data))
    assert np.square(y - x).sum() < np.square(x).sum()  # it is this tensor, not noise
    blocks = data.reshape(-1, format.block_bytes)
    np.testing.assert_array_equal(repacked(format, blocks), blocks)


@partial(jax.jit, static_argnames="format")
def _repacked(data, format):
    return format.pack(*format.unpack(data.T)).T


def repacked(format: Format, data: np.ndarray) -> np.ndarray:
    return np.asarray(_repacked(data, format))


@every_format
@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(data=st.data())
def test_pack_inverts_unpack(format, data):
    size = 4 * format.block_bytes
    blocks = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    blocks = blocks.reshape(4, format.block_bytes)
    again = repacked(format, blocks)
    if format.name == "TQ1_0":  # five digits take 243 values: 13 bytes are other spellings
        assert_same_bits(format, decode(format, again), by_ggml(format, blocks))
    else:
        has_number = ~np.isnan(by_ggml(format, blocks)).all(axis=1)  # a NaN need not keep its payload
        np.testing.assert_array_equal(again[has_number], blocks[has_number])


def test_tq1_0_packs_every_byte_that_ggml_writes():
    format, ggml_type = FORMATS["TQ1_0"], 34
    digits = np.random.default_rng(3).integers(0, 3, (512, 256))
    digits[:243, ::32] = np.indices((3,) * 5).reshape(5, -1).T[:, [0, 1, 2, 3, 4, 0, 1, 2]]
    digits[:, 5] = 2  # so that d, the absolute maximum, is 1
    want = ggml.encode(ggml_type, (digits - 1).astype(np.float32))
    got = jax.jit(format.pack)(jnp.asarray(digits.T.astype(np.int32)), np.ones(512, np.float32))
    np.testing.assert_array_equal(got.T, want)


@every_format
def test_a_code_belongs_to_its_group_of_weights(format):
    data = np.random.default_rng(4).integers(0, 256, (format.block_bytes, 8), dtype=np.uint8)
    groups = format.block_size // format.group_size
    group = groups // 2 + 1

    @jax.jit
    def with_and_without_another_code(data):
        codes, scales = format.unpack(data)
        scales = jax.tree.map(jnp.ones_like, scales)
        other = jax.tree.map(lambda c: c.at[group].set(c[group, ..., ::-1]), codes)
        return format.reconstruct(codes, scales), format.reconstruct(other, scales), jax.tree.leaves(codes)

    before, after, leaves = with_and_without_another_code(data)
    assert {leaf.shape[0] for leaf in leaves} == {groups}
    changed = np.flatnonzero((before != after).any(axis=1))
    assert set(changed // format.group_size) == {group}
