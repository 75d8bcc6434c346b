"""Strict numerics for every test: two CPU devices, no implicit promotion, checked annotations."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The user's own cache is not for tests to fill.
os.environ["JQUANT_CACHE"] = tempfile.mkdtemp(prefix="jquant-tests-")
atexit.register(shutil.rmtree, os.environ["JQUANT_CACHE"], ignore_errors=True)

# Most of the time of these tests is XLA's: what it compiles is kept for the other workers, for the commands
# that tests start, and for the next run.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "xla"
COMPILED.mkdir(parents=True, exist_ok=True)
if "PYTEST_XDIST_WORKER" not in os.environ and sum(e.stat().st_size for e in COMPILED.iterdir()) > 4 << 30:
    shutil.rmtree(COMPILED)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# Before the helpers are imported: their asserts speak as those of tests do.
pytest.register_assert_rewrite("helpers")
pytest_plugins = ["helpers.budget"]

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


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("data/models/stories15M")`: that path in ../shared, or the test is skipped."""
    from helpers.places import if_shared

    def found(name: str) -> Path:
        if (path := if_shared(name)) is None:
            pytest.skip(f"needs ../shared/{name}, which the repository does not hold")
        return path

    return found
