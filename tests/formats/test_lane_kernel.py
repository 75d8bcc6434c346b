"""The search for codewords as a kernel for GPUs: interpreted it finds the same codes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import specs
from helpers import tables
from jax.sharding import Mesh, PartitionSpec

from jquant import FORMATS, quantize
from jquant.distributed.shard_map import shard_map
from jquant.formats import _magnitudes, _shifted
from jquant.formats._codebook import codebook
from jquant.formats._lane_kernel import over_lanes

LANES = 300  # not a whole number of tiles
CASES = {
    "IQ2_XXS": _magnitudes._with_even_signs,
    "IQ2_S": _magnitudes._with_any_signs,
    "IQ3_XXS": _magnitudes._with_right_and_wrong,
    "IQ1_S": _shifted._with_shift,
}


@pytest.mark.parametrize("name", tables.rows(CASES, {"IQ3_XXS", "IQ1_S"}))
def test_a_kernel_finds_the_same_codes(name):
    rng, size = np.random.default_rng(0), codebook(name).group
    x, w = specs.student_t(size, LANES), rng.uniform(0.5, 2, (size, LANES))
    bit = jnp.asarray(rng.integers(0, 2, LANES), jnp.int32)
    t = np.sqrt(np.mean(x**2)) / np.mean(np.abs(codebook(name).levels)) * rng.uniform(0.5, 1.5, LANES)
    search, more = CASES[name], []
    if search is _shifted._with_shift:
        more = [bit]
    else:
        search, x = partial(search, codebook(name)), np.abs(x)
        more = [bit.astype(jnp.float32)] if name == "IQ2_XXS" else []
    given = (*(jnp.asarray(a, jnp.float32) for a in (t, w * x, w)), *more)
    wanted = jax.jit(search)(*given)
    assert len(np.unique(wanted)) > LANES // 10
    np.testing.assert_array_equal(jax.jit(partial(over_lanes, search, interpret=True))(*given), wanted)


@pytest.mark.parametrize("name", tables.rows(["IQ2_XXS", "IQ3_S", "IQ1_M"], {"IQ3_S"}))
def test_compiled_for_a_gpu_the_search_is_a_kernel(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.ones((8, 512))
    encode = lambda x: quantize(x, FORMATS[name], jnp.ones(512)).parts["blocks"]  # noqa: E731
    mesh, rows = Mesh(np.asarray(jax.devices()[:1]), ("rows",)), PartitionSpec("rows")
    split = shard_map(encode, mesh, (rows,), rows)
    for function in (encode, split):
        traced = jax.jit(function).trace(x)
        assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()
