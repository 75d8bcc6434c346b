"""Strict numerics for every test: two CPU devices, no implicit promotion, checked annotations."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook

install_import_hook("jquant", "beartype.beartype")
