"""Strict numerics for every test: two CPU devices, no implicit promotion, checked annotations."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The user's own compilation cache is not for tests to fill.
os.environ["JQUANT_CACHE"] = tempfile.mkdtemp(prefix="jquant-tests-")
atexit.register(shutil.rmtree, os.environ["JQUANT_CACHE"], ignore_errors=True)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook

install_import_hook("jquant", "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Programs of one file are of no use to the next, and the system grants a process so many mapped regions
    only: where they end, the compiler crashes."""
    yield
    jax.clear_caches()
