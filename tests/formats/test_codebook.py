"""The search of the codebook types: exact nearest codewords, less error than ggml, safe at the edges."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from helpers import ggml, k_blocks, tables
from helpers.real_weights import smollm2

from jquant.core import Format, quantize
from jquant.formats import FORMATS
from jquant.formats._codebook import codebook
from jquant.formats._grids import grid

RUNS = {"IQ1_S": 8, "IQ1_M": 16, "IQ2_XXS": 8, "IQ2_XS": 16, "IQ2_S": 16, "IQ3_XXS": 8, "IQ3_S": 8}
UNIT = {"IQ2_XXS": 1 / 8, "IQ2_XS": 1 / 8, "IQ2_S": 1 / 8, "IQ3_XXS": 1 / 4}  # of the others 1
HAS_EVEN_SIGNS = {"IQ2_XXS", "IQ2_XS", "IQ3_XXS"}


# Compiling a search takes seconds, so that one type is in every run.
every_format = pytest.mark.parametrize("format", tables.formats(RUNS, {"IQ3_S"}))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "IQ1_M"])
def test_shared_maxima_cover_the_grid_and_nothing_else(name):
    book, values = codebook(name), grid(name)
    levels, half = len(book.levels), book.half
    leaves = [{b} for b in range(levels**half)]
    for i, j in book.shared:
        leaves.append(leaves[i] | leaves[j])
    found = {(a, b) for a, nodes in book.rows for node in nodes for b in leaves[node]}
    numbers = np.searchsorted(book.levels, values)
    powers = levels ** np.arange(half - 1, -1, -1)
    pairs = (numbers[:, :half] @ powers).tolist(), (numbers[:, half:] @ powers).tolist()
    assert found == set(zip(*pairs, strict=True))


def random_blocks() -> tuple[np.ndarray, np.ndarray]:
    """Two blocks and their importance, float32 [256, 2]."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_t(5, (256, 2)), np.exp(rng.standard_normal((256, 2)))
    return x.astype(np.float32), w.astype(np.float32)


def random_scales(format: Format, x: np.ndarray) -> tuple:
    """A d that suits x, and any integer scales and shifts."""
    rng = np.random.default_rng(1)
    top = 7 if format.name.startswith("IQ1") else 15
    s = rng.integers(0, top + 1, (RUNS[format.name], 2)).astype(np.int32)
    d = np.abs(x).max(axis=0) / (float(np.abs(grid(format.name)).max()) * top * UNIT.get(format.name, 1.0))
    d = d.astype(np.float16).astype(np.float32)
    if format.name == "IQ1_S":
        return d, s, rng.integers(0, 2, (8, 2)).astype(np.int32)
    return d, s


def errors_of_all(x: np.ndarray, w: np.ndarray, t: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Σ w (x − t v)² for every codeword: [32, 2, weights] and [32, 2] → [32, 2, codewords]."""
    return (w[:, :, None] * (x[:, :, None] - t[..., None, None] * values) ** 2).sum(axis=-1)


def least_with_signs(size: np.ndarray, w: np.ndarray, t: np.ndarray, values: np.ndarray) -> tuple:
    """The least error over all codewords with all signs right, and with one wrong."""
    right = errors_of_all(size, w, t, values)
    flips = 4 * t[..., None, None] * (w * size)[:, :, None] * values  # what a wrong sign costs
    return right.min(axis=-1), (right + flips.min(axis=-1)).min(axis=-1)


def least_error(format: Format, x: np.ndarray, w: np.ndarray, scales: tuple) -> np.ndarray:
    """The least Σ w (x − x̂)² of each 8 weights, by trying every codeword, shift and wrong sign: [32, 2]."""
    name, (d, s) = format.name, scales[:2]
    t = np.repeat(d * UNIT.get(name, 1.0) * (2 * s + 1), 32 // len(s), axis=0)
    x, w = (a.reshape(32, 8, 2).transpose(0, 2, 1).astype(np.float64) for a in (x, w))
    values = grid(name).astype(np.float64)
    if name.startswith("IQ1"):
        by_shift = [errors_of_all(x, w, t, values + shift).min(axis=-1) for shift in (0.125, -0.125)]
        if name == "IQ1_M":
            return np.minimum(*by_shift)
        return np.where(np.repeat(scales[2], 4, axis=0) == 1, by_shift[1], by_shift[0])
    size, odd = np.abs(x), (x < 0).sum(axis=-1) % 2 == 1
    if values.shape[1] == 8:
        right, wrong = least_with_signs(size, w, t, values)
    else:
        first = least_with_signs(size[..., :4], w[..., :4], t, values)
        second = least_with_signs(size[..., 4:], w[..., 4:], t, values)
        right, wrong = first[0] + second[0], np.minimum(first[1] + second[0], first[0] + second[1])
    return np.where(odd, wrong, right) if name in HAS_EVEN_SIGNS else right


@every_format
def test_assign_finds_the_best_of_all_codewords_and_signs(format):
    x, w = random_blocks()
    scales = random_scales(format, x)
    given = tuple(map(jnp.asarray, scales))
    codes = jax.jit(format.assign)(jnp.asarray(x), jnp.asarray(w), given)
    found = np.asarray(jax.jit(format.reconstruct)(codes, given), np.float64)
    got = (w * (x - found) ** 2).reshape(32, 8, 2).sum(axis=1)
    best = least_error(format, x, w, scales)
    # Gains nearer than 2⁻¹⁶ may change places; codewords far from the weights have large ones.
    t = (scales[0] * UNIT.get(format.name, 1.0) * (2 * scales[1] + 1)).max()
    tolerance = 1e-4 * float((w * (np.abs(x) + t * float(np.abs(grid(format.name)).max())) ** 2).max())
    assert np.abs(got - best).max() <= tolerance
    np.testing.assert_allclose(got.sum(), best.sum(), rtol=1e-4)


@cache
def samples() -> dict[str, np.ndarray]:
    """float32 [16, 1536] each."""
    real = smollm2(rows=16)
    return {"gaussian": specs.gaussian(16, 1536), "student": specs.student_t(16, 1536), "real": real}


encode = partial(k_blocks.encode, to=128)  # of all tests, so that one program serves them


def decoded(format: Format, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Weights as ggml decodes the bytes."""
    assert format.ggml_type is not None
    return ggml.decode(format.ggml_type, data).reshape(shape)


def error(format: Format, data: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """Σ w (x − x̂)² as ggml decodes the bytes."""
    return float((w * (x - decoded(format, data, x.shape).astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("equal", [False, True], ids=["importance", "equal importance"])
@every_format
def test_the_error_is_at_least_five_percent_below_ggmls(format, equal):
    for name, x in samples().items():
        w = np.ones(1536, np.float32) if equal else specs.importance(1536)
        ours = error(format, encode(format, x, w), x, w)
        theirs = error(format, ggml.encode(format.ggml_type, x, w), x, w)
        assert ours < 0.95 * theirs, name


@every_format
def test_the_error_is_below_ggmls_where_one_column_has_nearly_all_importance(format):
    """As super weights make it: the column's own weights are small, and the others still count."""
    x, w = specs.student_t(16, 1536), specs.importance(1536)
    w[7::256] = 3e4
    x[:, 7::256] *= np.float32(0.3)
    ours = error(format, encode(format, x, w), x, w)
    theirs = error(format, ggml.encode(format.ggml_type, x, w), x, w)
    assert ours < 0.95 * theirs


@every_format
def test_edge_blocks_decode_to_finite_weights_near_them(format):
    for name, x in specs.edge_blocks().items():
        # Weights beyond the types' reach are another test's: the file types refuse them.
        x = x.reshape(-1)[: min(x.size // 256, 8) * 256].reshape(-1, 256).clip(-65504, 65504)
        found = decoded(format, encode(format, x, np.ones(256, np.float32)), x.shape)
        assert np.isfinite(found).all(), name
        rest = ((x - found.astype(np.float64)) ** 2).sum()
        # float16's smallest scale is 2⁻²⁴: smaller weights round to it or to zero.
        assert rest <= 0.6 * (x.astype(np.float64) ** 2).sum() + x.size * 2.0**-40, name


@every_format
def test_zeros_decode_to_zeros_beside_other_blocks(format):
    x = specs.gaussian(4, 512)
    x[1] = 0
    x[2, :256] = 0
    found = decoded(format, encode(format, x, np.ones(512, np.float32)), x.shape)
    assert (found[1] == 0).all()
    assert (found[2, :256] == 0).all()


@every_format
def test_weights_eight_times_as_large_get_the_same_codes(format):
    x, w = specs.student_t(4, 512), specs.importance(512)
    one, eight = (decoded(format, encode(format, f * x, w), x.shape) for f in (np.float32(1), np.float32(8)))
    np.testing.assert_array_equal(8 * one, eight)


BEST = ["Q4_0", "IQ4_NL", "TQ1_0", "Q4_K"]


@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.every)])
@pytest.mark.parametrize("format", tables.formats(BEST, {"IQ4_NL"}))
def test_the_best_effort_is_never_worse_in_any_block(format, weighted):
    x = specs.student_t(32, 1024)
    w = specs.importance(1024) if weighted else np.ones(1024, np.float32)
    errors = []
    for effort in ("fast", "best"):
        data = encode(format, x, w if weighted else None, effort=effort, to=1024)
        rest = w * (x - decoded(format, data, x.shape).astype(np.float64)) ** 2
        errors.append(rest.reshape(-1, format.block_size).sum(axis=1))
    fast, best = errors
    assert (best <= fast * (1 + 1e-5)).all()


def test_the_best_effort_searches_where_fast_keeps_ggmls_bytes():
    format, x = FORMATS["Q4_0"], specs.student_t(32, 1024)
    q = quantize(jnp.asarray(x), format, effort="best")
    assert q.format is format
    data = ggml.encode(format.ggml_type, x), np.asarray(q.parts["blocks"])
    fast, best = (((x - decoded(format, one, x.shape)) ** 2).sum() for one in data)
    assert best < 0.95 * fast


@pytest.mark.parametrize("format", tables.formats(BEST, {"IQ4_NL"}))
def test_the_best_effort_bears_the_largest_importance(format):
    x, w = specs.student_t(4, 256), specs.importance(256)
    w[7] = 3e38
    data = (encode(format, x, w, effort=effort, to=1024) for effort in ("fast", "best"))
    fast, best = (decoded(format, one, x.shape) for one in data)
    assert ((x - best) ** 2).mean() < 2 * ((x - fast) ** 2).mean()
